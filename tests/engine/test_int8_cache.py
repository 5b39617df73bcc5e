"""A rounded cache: half the memory, and the text that plain decoding has with it."""

from __future__ import annotations

import jax
import pytest

from treespec_jax.checkpoints import load
from treespec_jax.checkpoints.catalogue import BUNDLED
from treespec_jax.commands.prompts import STORIES
from treespec_jax.config import SamplingParams
from treespec_jax.llm import LLM

PARAMS = SamplingParams(max_tokens=64, ignore_eos=True)
# More than a page and more than a chunk; a short one.
PROMPTS = [" ".join(STORIES), STORIES[0]]


@pytest.fixture(scope="module")
def pair():
    return load(BUNDLED / "target", "float32"), load(BUNDLED / "draft", "float32")


def run(pair, cache_dtype, tree):
    llm = LLM(
        pair[0],
        speculative=dict(model=pair[1], tree=tree, tau=0.7) if tree else None,
        max_batch=2,
        max_len=384,
        prefill_chunks=(128,),
        cache_dtype=cache_dtype,
    )
    size = sum(
        leaf.nbytes for leaf in jax.tree.leaves(llm.engine._executor._state.pages)
    )
    return llm.generate(PROMPTS, PARAMS), size


@pytest.mark.slow
def test_drafted_or_committed_a_row_is_the_same(pair):
    """So speculation emits the tokens of plain decoding with the same cache."""
    plain, small = run(pair, "int8", None)
    tree, _ = run(pair, "int8", "chain:3")
    assert [c.token_ids for c in tree] == [c.token_ids for c in plain]
    assert tree.stats.tokens_per_step > 1.5
    assert tree.stats.label == "exact (lossy: int8 cache)" and not tree.stats.lossless
    c = pair[0].config
    numbers = c.num_layers * 2 * c.num_kv_heads * (2 * 6 + 1) * 64
    assert small == numbers * (c.head_dim + 4)
