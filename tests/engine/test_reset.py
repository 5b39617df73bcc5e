"""An engine forgets what its drafter learnt, and compiles before it is used."""

from __future__ import annotations

import dataclasses

import pytest

from tests.engine import support
from treespec_jax import speculation
from treespec_jax.config import EngineConfig, SamplingParams, SpeculativeConfig
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import Request
from treespec_jax.trees.shapes import ROOT_ONLY

pytestmark = pytest.mark.slow
CONFIG = EngineConfig(
    max_batch=2, max_len=64, page_size=16, steps_per_dispatch=2, prefill_chunks=(16,)
)
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)


def test_a_reset_engine_is_a_new_one(tiny_target, ragged_prompts):
    made = speculation.make(SpeculativeConfig(method="ngram", tree="chain:3"))
    made = dataclasses.replace(made, shapes=(*made.shapes, ROOT_ONLY))
    engine = Engine(tiny_target, CONFIG, made)
    engine.compile()
    compiled = dict(engine.compilations)
    assert compiled["dispatch"] == 2

    def run():
        requests = [Request(list(p), PARAMS) for p in ragged_prompts[:3]]
        for request in requests:
            engine.submit(request)
        while engine.busy:
            # One shape, so that no clock decides how many steps there are.
            engine.advance(shape=made.shape)
        return [r.tokens for r in requests], sum(r.stats.steps for r in requests)

    tokens, cold = run()
    again, warm = run()
    assert again == tokens and warm < cold, "other requests' texts are searched"
    engine.submit(Request([5, 6], PARAMS))
    with pytest.raises(ValueError, match="under way"):
        engine.reset()
    support.serve(engine, [])
    engine.reset()
    assert run() == (tokens, cold)
    compiled["prefill"] = engine.compilations["prefill"]
    assert dict(engine.compilations) == compiled, "nothing was compiled again"
