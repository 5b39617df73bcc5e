"""What XLA makes of the cache: written in place, never copied, in any dispatch."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.support import speculate
from treespec_jax.cache.pages import Copies
from treespec_jax.cache.prefill import Chunk
from treespec_jax.config import EngineConfig
from treespec_jax.engine.costs import CATCH_UP
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.sharing import Additions
from treespec_jax.trees.shapes import ROOT_ONLY

pytestmark = pytest.mark.usefixtures("optimised_programs")

# A pool of 1021 pages: no other array of the program has such an axis.
POOL = 1020
BATCH, PAGE, MAX_LEN = 2, 16, 128


def build(target, draft, *more) -> Engine:
    config = EngineConfig(
        max_batch=BATCH,
        max_len=MAX_LEN,
        page_size=PAGE,
        num_pages=POOL,
        steps_per_dispatch=4,
        prefill_chunks=(16,),
    )
    made = speculate(draft, "regular:2x2")
    return Engine(
        target, config, dataclasses.replace(made, shapes=(*made.shapes, *more))
    )


def compiled(engine: Engine, what: str):
    """The optimised program of a dispatch or a prefill, as the engine calls it."""
    i32, executor = np.int32, engine._executor
    one, tokens = np.zeros(1, i32), np.zeros((1, 16), i32)
    table = np.zeros((1, MAX_LEN // PAGE), i32)
    leaves, state = executor._leaves, executor._state
    copies = Copies(np.zeros(64, i32), np.zeros(64, i32), i32(1))
    if what == "dispatch":
        function, args = engine.program()
    elif what == "prefill":
        function = executor._traced_prefill
        chunk = Chunk(tokens, one, one, table)
        args = leaves, state, i32(0), chunk, (tokens, one)
    elif what == "catch up":
        # Of what waits for the drafter's model.
        function = executor._program(CATCH_UP)
        args = leaves, state, executor._control(engine._scheduler.idle_plan())
    elif what == "fork":
        function = executor._fork
        args = leaves, state, Copies(one, one, i32(1)), copies
    elif what == "extend":
        function = functools.partial(executor._traced_extend, scored=True)
        args = leaves[0], state.pages, Additions(tokens, one, one, table)
    else:

        def function(_, pages, copies):
            return executor._traced_copy(pages, copies)

        args = (), state.pages, copies
    return jax.jit(function, donate_argnums=1).lower(*args).compile()


def copies(text: str) -> list[str]:
    """Instructions that give a new array of the pool's shape by copying it."""
    pool = re.compile(rf"= f32\[{POOL + 1},\d+,2,{PAGE},\d+\]\S* copy\(")
    return [line.strip() for line in text.splitlines() if pool.search(line)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["dispatch", "prefill", "catch up", "fork", "extend", "copy"]
)
def test_no_copy_of_the_cache(what, tiny_target, tiny_draft):
    """Neither an instruction nor a temporary as large as one layer's pages."""
    # Tokens wait where a dispatch may decode plainly.
    more = [ROOT_ONLY] if what == "catch up" else []
    engine = build(tiny_target, tiny_draft, *more)
    program = compiled(engine, what)
    text = program.as_text()
    assert f"f32[{POOL + 1}," in text, "the pool has another shape: a dead test"
    assert not copies(text)
    memory = program.memory_analysis()
    layer = engine._executor._state.pages[0].nbytes
    assert memory.temp_size_in_bytes < layer / 2
    # Every page is given back in the buffer that it came in.
    state = engine._executor._state
    held = [state.pages, *([] if what in ("extend", "copy") else [state.draft.pages])]
    cache = sum(x.nbytes for pages in held for x in pages)
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
