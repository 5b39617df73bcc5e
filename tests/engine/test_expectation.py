"""What steps are expected to bring, learnt from steps with known acceptance."""

from __future__ import annotations

import numpy as np
import pytest

from treespec_jax.config import SamplingParams
from treespec_jax.engine.expectation import (
    Expectation,
    contained,
    observed_shapes,
    tokens_by_shape,
)
from treespec_jax.engine.request import Request
from treespec_jax.trees import shapes

LADDER = shapes.parse("auto:7@4+3@3+15@5+31@7").shapes
OBSERVED = observed_shapes(LADDER, True)
TREE = LADDER[0]


def request() -> Request:
    return Request([1], SamplingParams())


class Tosses:
    """Steps that accept a node of each depth with the same probability.

    The node at depth d has 2d - 2 nodes of other paths before it.
    """

    def __init__(self, rate, seed):
        self.rate, self.rng = rate, np.random.default_rng(seed)

    def tokens(self, shape) -> np.ndarray:
        """Of a step, for each shape of the ladder that is contained in that one."""
        counts = np.minimum(self.rng.geometric(1 - self.rate), shape.depth + 1)
        orders = 2 * np.arange(1, shape.depth + 1) - 1
        counts = np.minimum(counts, 1 + np.sum(orders < shape.num_nodes))
        tokens = tokens_by_shape(OBSERVED, counts, orders)
        return np.where(contained(OBSERVED, shape), tokens, np.nan)


def test_one_deep_shape_tells_of_all_smaller_ones():
    """And a few of its steps, of what it brings beyond a smaller one."""
    tosses, text, found = Tosses(0.7, 3), request(), []
    expectation = Expectation(OBSERVED, True)
    largest, small = LADDER[3], LADDER[1]
    for _ in range(400):
        tokens = tosses.tokens(largest)
        found.append(tokens)
        expectation.add(text, largest, tokens[None])
    mean = np.mean(found, axis=0)
    other = request()
    np.testing.assert_allclose(expectation.tokens(other), mean, rtol=0.15)
    for _ in range(60):
        expectation.add(other, small, tosses.tokens(small)[None])
    ratio = (expectation.tokens(other) - 1) / (mean - 1 + 1e-9)
    assert ratio[3] == pytest.approx(ratio[1], rel=0.2)


def test_a_request_is_told_apart_from_its_neighbours():
    expectation = Expectation(OBSERVED, True)
    texts = {request(): Tosses(rate, 4) for rate in (0.7, 0.05)}
    found = {text: [] for text in texts}
    for _ in range(64):
        for text, tosses in texts.items():
            tokens = tosses.tokens(TREE)
            found[text].append(tokens[0])
            expectation.add(text, TREE, tokens[None])
    good, bad = (np.mean(tokens) for tokens in found.values())
    for text, mean in zip(texts, (good, bad), strict=True):
        assert expectation.tokens(text)[0] == pytest.approx(mean, rel=0.15)
    new = expectation.tokens(request())[0]
    assert new == pytest.approx((good + bad) / 2, abs=0.3)
    assert expectation.low(request())[0] < 1.3
