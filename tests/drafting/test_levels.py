"""Levels of a best-first tree that are worth their time, against brute force."""

from __future__ import annotations

import dataclasses
import heapq
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import sampling
from treespec_jax.config import SamplingParams
from treespec_jax.drafting import levels
from treespec_jax.drafting.growth import grow
from treespec_jax.drafting.protocol import DraftContext
from treespec_jax.sampling.randomness import Given
from treespec_jax.trees import shapes
from treespec_jax.trees.shapes import BestFirstShape

PRICES = (0.0, 0.02, 0.1, 0.3, 0.6, 1.1)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(
        st.lists(st.floats(0.001, 1.0), min_size=3, max_size=3), min_size=4, max_size=4
    ),
    st.floats(0.001, 1.0),
)
def test_steps_that_stop_by_the_ratio_of_all_are_the_best_together(steps, level_time):
    """Of four steps whose gains fall: no other ends give more tokens per time.

    The rule sees the ratio that it attains, from a wrong one on.
    """
    gains = [sorted(step, reverse=True) for step in steps]
    tokens = [1.0 + np.cumsum([0.0, *step]) for step in gains]
    ends = itertools.product(range(4), repeat=len(steps))

    def ratio(stops):
        emitted = sum(step[stop] for step, stop in zip(tokens, stops, strict=True))
        return emitted / (len(steps) + level_time * sum(stops))

    best, found = max(map(ratio, ends)), 5.0
    for _ in range(20):
        price = found * level_time
        found = ratio([stop_of(step, price) for step in gains])
    assert found == pytest.approx(best, rel=1e-5)


def stop_of(gains, price) -> int:
    """Levels that one text runs."""
    here = np.ones(1, bool)
    pays = (levels.pays(np.array([gain]), here, price) for gain in gains)
    return next((n for n, one in enumerate(pays) if not one), len(gains))


VOCAB, NODES, DEPTH = 8, 12, 6
# Wide enough to see every path that can be among the best.
SHAPE = BestFirstShape(NODES, DEPTH, NODES, VOCAB, priced=True)


def brute_force(probability_V, depth: int) -> float:
    """Expected tokens of the best tree of NODES nodes, at most so deep."""
    heap = [(-p, 1) for p in probability_V]
    heapq.heapify(heap)
    total = 1.0
    for _ in range(NODES):
        worst, level = heapq.heappop(heap)
        total -= worst
        if level < depth:
            for p in probability_V:
                heapq.heappush(heap, (worst * p, level + 1))
        if not heap:
            break
    return total


@pytest.fixture(scope="module")
def growth():
    """A function from logits [V, B], active slots and a price to a tree and the levels
    that ran, compiled once, and how often it was."""
    ran, traces = [], []

    @jax.jit
    def run(logits_VB, active, price):
        traces.append(1)
        B = logits_VB.shape[1]
        context = DraftContext(
            target=None,
            vocab=VOCAB,
            active=active,
            root=jnp.zeros(B, jnp.int32),
            lengths=jnp.zeros(B, jnp.int32),
            page_table=jnp.zeros((B, 1), jnp.int32),
            sampling=sampling(SamplingParams(), B),
            randomness=Given(),
            proposal="best",
            level_price=price,
        )

        def expand(level, scratch):
            jax.debug.callback(lambda: ran.append(level.depth))
            return jnp.repeat(logits_VB, level.tokens.shape[1], axis=1), scratch

        return grow(SHAPE, context, logits_VB, expand, 1.0)

    def call(logits_VB, active, price):
        ran.clear()
        tree = jax.tree.map(np.asarray, run(logits_VB, active, np.float32(price)))
        jax.effects_barrier()
        return tree, len(ran), len(traces)

    return call


# From sure to at a loss.
SHARPNESS = (6.0, 3.0, 1.5, 0.7, 0.0)


def logits_of(*sharpness) -> np.ndarray:
    """float32 [V, B]: the same after every path."""
    scores = np.random.default_rng(3).permutation(VOCAB)[:, None] / 2
    return (scores * np.array(sharpness)).astype(np.float32)


def best_levels(logits_VB, price) -> int:
    """Levels of most tokens less their price, of texts that share the levels."""
    columns = np.exp(logits_VB - logits_VB.max(axis=0))
    columns /= columns.sum(axis=0)
    tokens = np.array(
        [sum(brute_force(q, d) for q in columns.T) for d in range(1, DEPTH + 1)]
    )
    assert (np.diff(tokens, 2) < 1e-5).all(), "gains must fall"
    # Of equal speeds the one of fewer levels.
    count = np.arange(DEPTH)
    price = price * logits_VB.shape[1] + 1e-6
    return int(np.argmax(tokens - price * count))


@pytest.mark.parametrize("price", PRICES)
def test_a_tree_ends_at_the_best_level(growth, price):
    """Of one text, sure or unsure, and of pairs of texts."""
    found = {}
    pairs = [(s, s) for s in SHARPNESS] + [(6.0, 0.0), (3.0, 0.7)]
    for pair in pairs:
        logits_VB = logits_of(*pair)
        tree, ran, traces = growth(logits_VB, np.ones(2, bool), price)
        assert ran == best_levels(logits_VB, price), pair
        assert np.where(tree.valid, tree.depth, 0).max() <= ran + 1
        found[pair] = ran
    assert traces == 1
    if 0 < price < 0.5:
        # Sure ones are deep and unsure ones shallow.
        assert found[6.0, 6.0] > found[0.0, 0.0]


def test_an_idle_slot_does_not_count(growth):
    logits_VB = logits_of(6.0, 0.0)
    alone = best_levels(logits_VB[:, 1:], 0.1)
    _, ran, _ = growth(logits_VB, np.array([False, True]), 0.1)
    assert ran == alone == 0
    _, ran, _ = growth(logits_VB, np.zeros(2, bool), 0.0)
    assert ran == 0


def test_sure_texts_get_narrow_deep_trees_and_unsure_ones_wide_shallow_ones(growth):
    """Also where all levels run, which is what every dynamic tree does by itself."""
    for price in (0.0, 0.05):
        tree, _, _ = growth(logits_of(6.0, 0.7), np.ones(2, bool), price)
        pairs = zip(tree.depth, tree.valid, strict=True)
        sizes = [np.bincount(depth[valid])[1:] for depth, valid in pairs]
        assert len(sizes[0]) > len(sizes[1]) and sizes[0][0] < sizes[1][0]


def test_a_name_says_it():
    shape = shapes.parse("dynamic:9@4/3~cost")
    assert shape == dataclasses.replace(shapes.parse("dynamic:9@4/3"), priced=True)
    assert shapes.parse("auto:7@4~cost+15@5").shapes[0].priced
