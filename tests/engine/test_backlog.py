"""Tokens of plain steps wait for a drafter's model; it drafts as if they had not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.drafting.heads import eagle
from tests.engine.told import Told
from treespec_jax import speculation
from treespec_jax.config import EngineConfig, SamplingParams, SpeculativeConfig
from treespec_jax.drafting.draft_model import DraftModel
from treespec_jax.engine import rehearsal
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import Request
from treespec_jax.engine.timing import Choice
from treespec_jax.trees.shapes import ROOT_ONLY

STEPS = 4
PLAIN, LOOK = Choice(ROOT_ONLY, None), Choice(ROOT_ONLY, None, True)


def made(tiny_target, tiny_draft, method: str) -> Engine:
    model = tiny_draft if method == "draft_model" else eagle(tiny_target, 3, few=True)
    settings = SpeculativeConfig(method=method, tree="auto:6@3+3@2", model="tiny")
    config = EngineConfig(
        max_batch=2,
        max_len=160,
        page_size=16,
        steps_per_dispatch=STEPS,
        prefill_chunks=(16,),
        record=True,
    )
    engine = Engine(tiny_target, config, speculation.make(settings, model))
    engine._chooser = Told()
    return engine


def serve(engine, prompts, choices) -> tuple[list, np.ndarray]:
    """The texts of requests side by side, and all estimates of trees beside them."""
    greedy = SamplingParams(max_tokens=100, ignore_eos=True)
    sampled = dataclasses.replace(greedy, max_tokens=90, temperature=0.7, seed=5)
    pairs = zip(prompts, (greedy, sampled), strict=True)
    requests = [Request(list(prompt), params) for prompt, params in pairs]
    engine.reset()
    engine._chooser.choices = list(choices)
    grown, dispatch = [], engine._executor.dispatch

    def listed(plan, name):
        outbox = dispatch(plan, name)
        if outbox.rehearsed is not None:
            grown.append(outbox.rehearsed.draft_logprob)
        elif name != ROOT_ONLY:
            grown.append(outbox.emission.trees.log_prob)
        return outbox

    engine._executor.dispatch = listed
    for request in requests:
        engine.submit(request)
    while engine.busy:
        engine.advance()
    engine.drain()
    engine._executor.dispatch = dispatch
    estimates = np.concatenate([np.array(x).ravel() for x in grown])
    return [request.tokens for request in requests], estimates


@pytest.mark.slow
# With the layer "auto" lets its rows wait, too.
@pytest.mark.parametrize("method", ["draft_model", "auto"])
def test_what_waited_changes_no_tree(
    method, tiny_target, tiny_draft, ragged_prompts, monkeypatch
):
    prompts = ragged_prompts[1:3]
    waiting = made(tiny_target, tiny_draft, method)
    tree, small = (Choice(shape, 2) for shape in waiting.speculation.shapes[:2])
    # More plain steps than can wait; trees at once; a few; one dispatch. The small one
    # has no room for all that waits behind plain steps or a larger one.
    choices = [*[PLAIN] * 18, LOOK, tree, tree, PLAIN, PLAIN, LOOK, PLAIN, small]
    choices += [small, tree, small, tree, LOOK]
    assert 18 * STEPS > rehearsal.BACKLOG
    passes = []
    catch_up = waiting._executor.catch_up
    waiting._executor.catch_up = lambda *a, **k: passes.append(a) or catch_up(*a, **k)
    texts, estimates = serve(waiting, prompts, choices)
    # One for want of room, the others before trees that follow plain steps.
    assert 3 <= len(passes) <= 6
    monkeypatch.setattr(rehearsal, "BACKLOG", 0)
    monkeypatch.setattr(DraftModel, "narrowed", lambda self, state, *_: state)
    prompt = made(tiny_target, tiny_draft, method)
    assert prompt._backlog.size == 0 < waiting._backlog.size
    told, expected = serve(prompt, prompts, choices)
    assert told == texts and prompt.compilations["catch_up"] == 0
    real = np.isfinite(expected) & (expected != 0)
    np.testing.assert_array_equal(real, np.isfinite(estimates) & (estimates != 0))
    np.testing.assert_allclose(estimates[real], expected[real], rtol=1e-4, atol=1e-5)
    assert len(np.unique(expected[real])) > 40, "trees are worth comparing"
