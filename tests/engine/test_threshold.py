"""Dynamic trees that end where the drafter is unsure: other trees, the same tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.engine.support import build, serve
from tests.oracles import Ties
from treespec_jax.config import SamplingParams
from treespec_jax.engine.costs import Costs, usual_curve
from treespec_jax.engine.request import Request

PARAMS = [
    SamplingParams(max_tokens=16),
    SamplingParams(max_tokens=16, temperature=0.7),
]
THRESHOLD, COST = "dynamic:12@4~0.6", "dynamic:12@4~cost"


class Priced(Costs):
    """A level of the drafter has to add what the test says."""

    price = 0.8

    def level_price(self, shape, load, tokens):
        return self.price


def texts(engine, prompts) -> list[Request]:
    """Each prompt greedy and sampled, to the end."""
    requests = [
        Request(prompt, dataclasses.replace(params, seed=seed))
        for seed, prompt in enumerate(prompts)
        for params in PARAMS
    ]
    return serve(engine, requests)


def sizes(requests) -> list[int]:
    """Nodes that exist, the root among them, in every tree."""
    records = [record for request in requests for record in request.records]
    return [int((record.log_prob > -np.inf).sum()) for record in records]


@pytest.fixture(scope="module")
def plain(tiny_target, ragged_prompts):
    """Texts of plain decoding."""
    return texts(build(tiny_target, None, "none", 2, 16, 4), ragged_prompts[:2])


@pytest.mark.slow
@pytest.mark.parametrize("tree", [THRESHOLD, COST])
def test_tokens_equal_plain_decoding(
    tiny_target, tiny_draft, plain, ragged_prompts, tree
):
    costs, prompts = Priced(usual_curve(True, True), 2), ragged_prompts[:2]
    speculated = build(
        tiny_target, tiny_draft, tree, 2, 16, 4, record=True, costs=costs
    )
    ties, found = Ties(tiny_target), texts(speculated, prompts)

    def check(found):
        for one, request in zip(plain, found, strict=True):
            ties.check(request.prompt, one.tokens, request.tokens, request.params)

    check(found)
    # Trees differ in size: confidence decides, step by step.
    there = sizes(found)
    assert min(there) < max(there) <= 13, sorted(there)
    tokens = sum(request.stats.tokens for request in found)
    assert tokens > 1.1 * sum(request.stats.steps for request in found)
    if tree == COST:
        # Another price is no other program: all levels run where they cost nothing.
        costs.price = 0.0
        found = texts(speculated, prompts)
        check(found)
        assert set(sizes(found)) == {13}
        assert speculated.compilations["dispatch"] == 1
