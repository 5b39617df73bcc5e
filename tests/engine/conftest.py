"""A pair of models whose text is known; compiled once for all modules."""

from __future__ import annotations

import pytest

from tests.checkpoints.support import train_sentencepiece
from tests.engine.scripted import follow, scripted, write
from treespec_jax.checkpoints.tokenizers import load_tokenizer
from treespec_jax.llm import LLM

SIZES = dict(
    max_batch=2, max_len=64, page_size=16, steps_per_dispatch=4, prefill_chunks=(16,)
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return load_tokenizer(train_sentencepiece(tmp_path_factory.mktemp("llm")))


@pytest.fixture(scope="session")
def script(tokenizer):
    return write(tokenizer)


@pytest.fixture(scope="session")
def scripted_target(tokenizer, script):
    return scripted(tokenizer, follow([script.prompt_ids[-1], *script.ids]))


@pytest.fixture(scope="session")
def scripted_draft(tokenizer, script):
    """Right but for three tokens, so that accepted paths end here and there."""
    successors = follow([script.prompt_ids[-1], *script.ids])
    for index in (2, 7, 11):
        successors[script.ids[index]] = script.ids[0]
    return scripted(tokenizer, successors)


@pytest.fixture(scope="session")
def scripted_llm(scripted_target, scripted_draft):
    """Two slots of 64 tokens, 8 pages in all."""
    tree = {"model": scripted_draft, "tree": "regular:2x1x1"}
    return LLM(scripted_target, speculative=tree, **SIZES)
