"""Temperatures that follow a tree: of the drafter, and of the policy.

The oracle divides the logits of one causal pass, token by token.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.support import build, run, speculate
from tests.oracles import TIE, Ties, full_logits, sampling
from treespec_jax.adaptive import AdaptiveTemperature
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.engine.engine import Engine
from treespec_jax.errors import UserError
from treespec_jax.sampling import noise
from treespec_jax.speculation import Speculation
from treespec_jax.trees import shapes

SAMPLED = SamplingParams(max_tokens=16, temperature=1.0)
CONFIG = EngineConfig(
    max_batch=2, max_len=128, page_size=16, steps_per_dispatch=1, prefill_chunks=(16,)
)
# Of texts without a policy's temperature, sampled and greedy.
USUAL = SAMPLED, SamplingParams(max_tokens=16)
LONGER = dataclasses.replace(SAMPLED, max_tokens=32)


@pytest.fixture(scope="module")
def branching(tiny_target, tiny_draft):
    """An engine for all policies, whose nodes have 2, 1 and no children."""
    return Engine(tiny_target, CONFIG, speculate(tiny_draft, "regular:2x1"))


@pytest.fixture(scope="module")
def plain(tiny_target, ragged_prompts):
    """Texts of plain decoding, of two prompts each."""
    engine = Engine(tiny_target, CONFIG, speculate(None, "none"))
    return {
        params: run(engine, ragged_prompts[:2], params) for params in (*USUAL, LONGER)
    }


@pytest.fixture(scope="module")
def drafted(tiny_target, tiny_draft, ragged_prompts):
    """The longer ones with trees, whose drafter has no temperature by the tree."""
    engine = Engine(tiny_target, CONFIG, speculate(tiny_draft, "dynamic:9@4"))
    return run(engine, ragged_prompts[:2], LONGER)


def factor(given: AdaptiveTemperature, logits, depth: int, children: int) -> float:
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return {
        "depth": given.strength**depth,
        "siblings": float(max(children, 1)) ** given.strength,
        "entropy": 0.8 ** (given.strength / -(p * np.log(p)).sum()),
    }[given.form]


def check_texts(model, requests, children_by_depth) -> None:
    """Every token is the best of the logits over T times its factor, plus noise."""
    for request in requests:
        depths = [d for _, count in request.arrivals for d in range(count)]
        assert len(depths) == len(request.tokens)
        params, text = request.params, list(request.prompt)
        for depth, token in zip(depths, request.tokens, strict=True):
            logits = full_logits(model, text)[-1].astype(np.float64)
            children = children_by_depth[depth]
            hot = params.temperature * factor(params.adaptive, logits, depth, children)
            seed = sampling(params).seed
            own = noise.gumbel(seed, jnp.full(1, len(text)), len(logits))[:, 0]
            scores = logits / hot + np.asarray(own)
            assert scores[token] > scores.max() - TIE / hot
            text.append(token)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["depth:0.5", "siblings:0.5", "entropy:1"])
def test_a_policy_has_the_temperature_of_its_node(
    tiny_target, branching, plain, ragged_prompts, given
):
    """In a fixed tree, whose nodes have 2, 1 and no children from the root down."""
    params = dataclasses.replace(SAMPLED, adaptive_temperature=given)
    branching.reset()
    requests = run(branching, ragged_prompts[:2], params)
    check_texts(tiny_target, requests, (2, 1, 0))
    assert max(count for r in requests for _, count in r.arrivals) == 3, "a dead test"
    label = f"exact (lossy: temperature {given})"
    for request in requests:
        assert request.stats.label == label and not request.stats.lossless
    # Requests without it, and greedy ones, are in the same program what they were.
    for params in USUAL:
        requests = run(branching, ragged_prompts[:2], params)
        for one, request in zip(plain[params], requests, strict=True):
            assert request.stats.lossless
            Ties(tiny_target).check(
                request.prompt, one.tokens, request.tokens, request.params
            )


@pytest.mark.slow
def test_by_entropy_a_text_depends_on_no_tree(tiny_target, tiny_draft, ragged_prompts):
    params = dataclasses.replace(SAMPLED, adaptive_temperature="entropy:1")
    for tree in ("none", "dynamic:9@4"):
        engine = build(tiny_target, tiny_draft, tree, 2, 16, 1)
        requests = run(engine, ragged_prompts[:2], params)
        check_texts(tiny_target, requests, (0,) * 6)


@pytest.mark.slow
@pytest.mark.parametrize("given", [("depth", 0.4), ("entropy", 2.0)])
def test_a_drafters_temperature_changes_no_text(
    tiny_target, tiny_draft, plain, drafted, ragged_prompts, given
):
    """Of the exact rule; it changes what is accepted."""
    made = speculate(tiny_draft, "dynamic:9@4")
    other = dataclasses.replace(made, draft_temperature=AdaptiveTemperature(*given))
    requests = run(Engine(tiny_target, CONFIG, other), ragged_prompts[:2], LONGER)
    ties = Ties(tiny_target)
    for one, request in zip(plain[LONGER], requests, strict=True):
        ties.check(request.prompt, one.tokens, request.tokens, request.params)
    steps = [[r.stats.steps for r in texts] for texts in (drafted, requests)]
    assert steps[0] != steps[1], "a dead test"


def engine_of(target, draft, *trees) -> Engine:
    made = speculate(draft, trees[0])
    several = tuple(map(shapes.parse, trees))
    return Engine(target, CONFIG, Speculation(made.drafter, several))


@pytest.mark.parametrize(
    ("trees", "given", "why"),
    [
        (("chain:3", "none"), "depth:0.9", "changes from step to step"),
        (("none",), "siblings:1", "its root alone"),
        (("dynamic:5@2",), "siblings:1", "same noise"),
    ],
)
def test_a_policy_by_the_tree_needs_a_tree(tiny_target, tiny_draft, trees, given, why):
    engine = engine_of(tiny_target, tiny_draft, *trees)
    params = dataclasses.replace(SAMPLED, adaptive_temperature=given)
    with pytest.raises(UserError, match=why):
        engine.check_params(params)
    engine.check_params(dataclasses.replace(params, adaptive_temperature="entropy:1"))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(temperature=0.0), "changes no greedy text"),
        (dict(speculate=False), "grows none"),
        (dict(adaptive_temperature="heat:1"), "malformed"),
    ],
)
def test_requests_are_refused(changes, why):
    given = {"temperature": 1.0, "adaptive_temperature": "depth:0.9"}
    SamplingParams(**given)
    with pytest.raises(UserError, match=why):
        SamplingParams(**given | changes)
