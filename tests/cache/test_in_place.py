"""What XLA makes of the cache: written in place, never copied, in any dispatch."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treespec_jax.acceptance.policy import Sampling
from treespec_jax.config import EngineConfig
from treespec_jax.drafting.draft_model import DraftModel
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.state import Control
from treespec_jax.trees import shapes

# A pool of 1021 pages: no other array of the program has such an axis.
POOL = 1020
BATCH, PAGE, MAX_LEN = 2, 16, 128


def build(target, draft) -> Engine:
    config = EngineConfig(
        max_batch=BATCH,
        max_len=MAX_LEN,
        page_size=PAGE,
        num_pages=POOL,
        steps_per_dispatch=4,
        prefill_chunks=(16,),
    )
    return Engine(target, DraftModel(draft, shapes.parse("regular:2x2"), 0.5), config)


def compiled(engine: Engine, what: str):
    """The optimised program of a dispatch or a prefill, as the engine calls it."""
    width = MAX_LEN // PAGE
    i32 = np.int32
    if what == "dispatch":
        control = Control(
            page_table=np.zeros((BATCH, width), i32),
            remaining=np.zeros(BATCH, i32),
            eos=np.full((BATCH, 1), -1, i32),
            sampling=Sampling(
                temperature=np.zeros(BATCH, np.float32),
                top_k=np.zeros(BATCH, i32),
                top_p=np.ones(BATCH, np.float32),
                min_p=np.zeros(BATCH, np.float32),
                seed=np.zeros(BATCH, np.uint32),
            ),
            want_logprobs=np.zeros(BATCH, bool),
            max_steps=i32(4),
        )
        args = (control,)
    else:
        tokens, table = np.zeros((1, 16), i32), np.zeros((1, width), i32)
        args = (i32(0), tokens, i32(0), i32(0), i32(0), table)
    call = getattr(engine, f"_{what}")
    return call.lower(engine._leaves, engine._state, *args).compile()


def copies(text: str) -> list[str]:
    """Instructions that give a new array of the pool's shape by copying it."""
    pool = re.compile(rf"= f32\[{POOL + 1},\d+,2,{PAGE},\d+\]\S* copy\(")
    return [line.strip() for line in text.splitlines() if pool.search(line)]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["dispatch", "prefill"])
def test_no_copy_of_the_cache(what, tiny_target, tiny_draft):
    """Neither an instruction nor a temporary as large as one layer's pages."""
    engine = build(tiny_target, tiny_draft)
    program = compiled(engine, what)
    text = program.as_text()
    assert f"f32[{POOL + 1}," in text, "the pool has another shape: a dead test"
    assert not copies(text)
    memory = program.memory_analysis()
    layer = engine._state.pages[0].nbytes
    assert memory.temp_size_in_bytes < layer / 2
    # Every page is given back in the buffer that it came in.
    cache = sum(x.nbytes for x in (*engine._state.pages, *engine._state.draft.pages))
    assert memory.alias_size_in_bytes >= cache


def test_the_search_finds_a_copy():
    """A write between two reads: what the engine's programs must not hold."""

    @jax.jit
    def bad(pages):
        changed = pages.at[3].set(1.0)
        return changed, jnp.sum(pages[5] * 2.0) + pages

    pages = jnp.zeros((POOL + 1, 2, 2, PAGE, 8))
    text = bad.lower(pages).compile().as_text()
    assert copies(text)
