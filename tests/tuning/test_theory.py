"""Expected tokens against enumeration of all outcomes, and against simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings

from tests.trees.strategies import level_order_parents
from treespec_jax.trees.records import TreeRecord
from treespec_jax.trees.topology import Topology, chain, regular
from treespec_jax.tuning import theory
from treespec_jax.tuning.theory import Acceptance, Costs

QUICK = settings(deadline=None, derandomize=True, max_examples=40)
RATES = Acceptance(((0.6, 0.2, 0.1), (0.5, 0.3), (0.7, 0.05, 0.02)))


def independent_outcomes(tree: Topology, alpha: float):
    """Every set of right nodes, its probability, and how deep a right path goes."""
    for right in itertools.product((False, True), repeat=tree.num_nodes - 1):
        probability = math.prod(alpha if r else 1 - alpha for r in right)
        reached = [True]
        for node, parent in enumerate(tree.parents[1:], 1):
            reached.append(reached[parent] and right[node - 1])
        yield probability, max(tree.depths[np.array(reached)])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("branching, depth", [(1, 4), (2, 2), (2, 3), (3, 2), (5, 1)])
def test_regular_trees_of_independent_nodes(branching, depth, alpha):
    tree = regular((branching,) * depth)
    outcomes = list(independent_outcomes(tree, alpha))
    deep = sum(p for p, reached in outcomes if reached == depth)
    tokens = sum(p * (1 + reached) for p, reached in outcomes)
    assert theory.survival(alpha, branching, depth) == pytest.approx(deep)
    assert theory.regular_tokens(alpha, branching, depth) == pytest.approx(tokens)
    if branching == 1:
        assert theory.chain_survival(alpha, depth) == pytest.approx(deep)
        assert theory.chain_tokens(alpha, depth) == pytest.approx(tokens)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9, 0.99])
def test_the_textbook_takes_paths_for_independent(alpha):
    """Exact for one path and for one level, and too high wherever paths share edges."""
    for size in (1, 3, 6):
        for shape in ((1, size), (size, 1)):
            exact = theory.survival(alpha, *shape)
            assert theory.textbook_survival(alpha, *shape) == pytest.approx(exact)
    for branching, depth in itertools.product((2, 4), (2, 3)):
        textbook = theory.textbook_survival(alpha, branching, depth)
        assert textbook == pytest.approx(1 - (1 - alpha**depth) ** branching**depth)
        assert textbook > theory.survival(alpha, branching, depth)
    assert round(theory.textbook_survival(0.5, 2, 2), 3) == 0.684
    assert round(theory.survival(0.5, 2, 2), 3) == 0.609


def exclusive_outcomes(tree: Topology, acceptance: Acceptance):
    """Every choice of one child or none at each inner node; tokens of the step."""
    inner = sorted(set(tree.parents) - {-1})
    children = {n: [c for c, p in enumerate(tree.parents) if p == n] for n in inner}
    depth = dict(enumerate(tree.depths.tolist()))
    for choice in itertools.product(*([*children[n], None] for n in inner)):
        probability, taken = 1.0, dict(zip(inner, choice, strict=True))
        for node, child in taken.items():
            rates = [
                acceptance.rate(depth[node], r) for r in range(len(children[node]))
            ]
            if child is None:
                probability *= 1 - sum(rates)
            else:
                probability *= rates[children[node].index(child)]
        tokens, node = 1, taken.get(0)
        while node is not None:
            tokens, node = tokens + 1, taken.get(node)
        yield probability, tokens


@QUICK
@given(level_order_parents(8))
def test_expected_tokens_by_enumeration(parents):
    tree = Topology(parents)
    outcomes = list(exclusive_outcomes(tree, RATES))
    assert sum(p for p, _ in outcomes) == pytest.approx(1)
    brute = sum(p * tokens for p, tokens in outcomes)
    assert theory.expected_tokens(tree, RATES) == pytest.approx(brute)
    spread = sum(p * (tokens - brute) ** 2 for p, tokens in outcomes) ** 0.5
    assert theory.deviation(tree, RATES) == pytest.approx(spread, abs=1e-6)


def test_a_chain_by_depth_is_the_closed_form():
    alpha = Acceptance(((0.7,),))
    for length in (0, 1, 5):
        closed = theory.chain_tokens(0.7, length)
        assert theory.expected_tokens(chain(length), alpha) == pytest.approx(closed)


def simulated(tree: Topology, acceptance: Acceptance, steps: int) -> list[TreeRecord]:
    """Records of steps whose target takes children with the given probabilities."""
    rng = np.random.default_rng(0)
    parents = np.array((0, *tree.parents[1:]))
    records = []
    for uniforms in rng.random((steps, tree.depth)):
        path, node = [0], 0
        for depth, u in enumerate(uniforms):
            children = np.flatnonzero(parents == node)
            children = children[children > 0]
            rates = [acceptance.rate(depth, r) for r in range(len(children))]
            rank = int(np.searchsorted(np.cumsum([0, *rates]), u, "right")) - 1
            if rank >= len(children):
                break
            node = int(children[rank])
            path.append(node)
        path += [0] * (tree.depth + 1 - len(path))
        log_prob = np.zeros(tree.num_nodes)
        records.append(TreeRecord(parents, log_prob, np.array(path)))
    return records


def test_counted_rates_and_expected_tokens_agree_with_simulation():
    """Four standard errors; fewer steps at greater depth, where the prior counts."""
    tree, steps = theory.probe(3, 3), 4000
    records = simulated(tree, RATES, steps)
    tokens = [1 + len(record.accepted) for record in records]
    slack = 4 * np.std(tokens) / steps**0.5
    assert abs(np.mean(tokens) - theory.expected_tokens(tree, RATES)) < slack
    counted = theory.count(records)
    assert len(counted.rates) == 3 and counted.families[0] == steps
    for depth, families in enumerate(counted.families):
        for rank in range(3):
            rate, true = counted.rate(depth, rank), RATES.rate(depth, rank)
            assert abs(rate - true) < 4 * 0.5 / families**0.5 + theory.PRIOR / families


def test_counting_by_hand():
    """The root has two children and the first of them one; one step took none."""
    parents, zeros = np.array([0, 0, 0, 1]), np.zeros(4)
    paths = [[0, 1, 3], [0, 1, 0], [0, 2, 0], [0, 0, 0]]
    records = [TreeRecord(parents, zeros, np.array(path)) for path in paths]
    pooled = 3 / 6, 1 / 4
    counted = theory.count(records)
    m = theory.PRIOR

    def rate(hits, seen, rank):
        return pytest.approx((hits + m * pooled[rank]) / (seen + m))

    assert counted.families == (4, 2)
    assert counted.rates == (
        (rate(2, 4, 0), rate(1, 4, 1)),
        (rate(1, 2, 0), rate(0, 0, 1)),
    )
    # Depths below the last are like it; an unknown rank is never accepted.
    assert counted.rate(7, 0) == counted.rate(1, 0) and counted.rate(0, 2) == 0
    # A node without a token in one of the steps counts there: it was not right.
    absent = np.array([0, -1, -np.inf, -1])
    lacking = [*records[:3], TreeRecord(parents, absent, np.array(paths[3]))]
    assert theory.count(lacking) == counted
    # One that never had a token is never right, and no other depth says otherwise.
    never = np.array([0, -1, -1, -np.inf])
    accepted = [[0, 1, 0], [0, 1, 0], [0, 2, 0]]
    deep = theory.count([TreeRecord(parents, never, np.array(p)) for p in accepted])
    assert deep.rate(0, 0) == pytest.approx(2 / 3) and deep.rate(1, 0) == 0
    with pytest.raises(ValueError, match="no drafted tree"):
        theory.count([TreeRecord(np.array([0]), np.zeros(1), np.array([0]))])


def test_the_probe_is_as_wide_as_its_paths_are_likely():
    tree = theory.probe(8, 3)
    paths = {(): 0}
    for node, parent in enumerate(tree.parents[1:], 1):
        path = next(p for p, n in paths.items() if n == parent)
        paths[(*path, int(tree.ranks[node]))] = node
    wanted = {
        path
        for depth in range(4)
        for path in itertools.product(range(8), repeat=depth)
        if math.prod(r + 1 for r in path) <= 8
    }
    assert set(paths) == wanted


def test_costs_of_a_step():
    costs = Costs(
        verify=((1, 10.0), (3, 14.0), (5, 16.0)),
        draft_root=2.0,
        draft_level=((1, 1.0), (3, 2.0)),
        rest=((1, 1.0), (5, 3.0)),
    )
    assert costs.step(Topology((-1,))) == 11
    # Two levels are expanded, of one node each.
    assert costs.step(chain(3)) == pytest.approx(2 + 2 * 1 + 15 + 2.5)
    # 7 nodes: beyond the last measured sizes; two inner nodes at depth 1.
    assert costs.step(regular((2, 2))) == pytest.approx(2 + 1.5 + 18 + 4)
    assert costs.speedup(chain(3), 3.0) == pytest.approx(3 * 11 / 21.5)
    flat = Costs(((1, 1.0),), 0.0, ((1, 0.0),), ((1, 0.0),))
    assert flat.speedup(chain(9), 4.0) == pytest.approx(4.0)
