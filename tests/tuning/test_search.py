"""The dynamic programme against all trees there are."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from treespec_jax.trees.topology import Topology, chain, regular
from treespec_jax.tuning import search, theory
from treespec_jax.tuning.theory import Acceptance, Costs

NODES = 8


@functools.cache
def all_trees() -> tuple[Topology, ...]:
    """Every tree of 0 to 8 nodes below its root: parents that never fall."""
    found, grown = [], [(-1,)]
    for _ in range(NODES + 1):
        found += grown
        grown = [
            (*parents, parent)
            for parents in grown
            for parent in range(max(0, parents[-1]), len(parents))
        ]
    return tuple(map(Topology, found))


def test_the_enumeration_is_complete():
    """Ordered rooted trees are counted by the Catalan numbers."""
    counts = np.bincount([tree.num_nodes - 1 for tree in all_trees()])
    assert counts.tolist() == [1, 1, 2, 5, 14, 42, 132, 429, 1430]


def random_acceptance(seed: int, falling: bool) -> Acceptance:
    """Rates that need not fall with the rank, as measured ones need not."""
    rate_DR = np.random.default_rng(seed).dirichlet(np.ones(4), 3)[:, :3]
    if falling:
        rate_DR = -np.sort(-rate_DR, axis=1)
    return Acceptance(tuple(map(tuple, rate_DR.tolist())))


@pytest.mark.parametrize("falling", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_best_trees_equal_brute_force(seed, falling):
    """Of every number of nodes, depth and trunk."""
    acceptance = random_acceptance(seed, falling)
    tokens = {
        tree: theory.expected_tokens(tree, acceptance)
        for tree in all_trees()
        if tree.ranks.max() < 3
    }
    for depth in range(1, 6):
        programme = search.Programme(acceptance, NODES, depth)
        for trunk in range(min(3, depth + 1)):
            for nodes in range(max(1, trunk), NODES + 1):
                best = max(
                    value
                    for tree, value in tokens.items()
                    if tree.num_nodes <= nodes + 1
                    and tree.depth <= depth
                    and tree.parents[: trunk + 1] == chain(trunk).parents
                    and all(len(tree.level(d)) == 1 for d in range(trunk + 1))
                )
                found = programme.candidate(nodes, trunk)
                assert found.tokens == pytest.approx(best, abs=1e-12)
                assert found.nodes <= nodes and found.topology.depth <= depth
                assert all(len(found.topology.level(d)) == 1 for d in range(trunk + 1))


def test_where_rates_fall_the_best_tree_holds_the_likeliest_nodes():
    """An oracle for sizes that no enumeration reaches: the best n of all paths."""
    acceptance = random_acceptance(5, falling=True)
    whole = regular((3,) * 6)
    reached = np.sort(theory.node_probabilities(whole, acceptance))[::-1]
    for found in search.best_by_nodes(acceptance, 60, 6):
        assert found.tokens == pytest.approx(reached[: found.nodes + 1].sum())


def test_nodes_that_bring_nothing_are_left_out():
    found = search.Programme(Acceptance(((0.5, 0.0, 0.2),)), 9, 1).candidate(9)
    # The third child is worth its useless elder sibling; no fourth is known.
    assert found.topology == regular((3,)) and found.tokens == pytest.approx(1.7)
    assert search.Programme(Acceptance(((0.5, 0.0),)), 9, 2).tree(9) == chain(2)
    assert search.Programme(Acceptance(((0.0,),)), 3, 2).tree(3) == Topology((-1,))


def test_costs_choose():
    """All shapes of up to 8 nodes, priced by brute force."""
    acceptance = random_acceptance(7, falling=True)
    costs = Costs(
        verify=((1, 10.0), (4, 10.5), (9, 14.0)),
        draft_root=1.0,
        draft_level=((1, 0.7), (4, 0.9)),
        rest=((1, 1.0),),
    )
    found = search.priced(search.best_trees(acceptance, NODES, 4), costs)
    assert len({one.topology for one in found}) == len(found)
    for one in found:
        assert one.seconds == costs.step(one.topology)
        plain = costs.step(Topology((-1,)))
        assert one.speedup == pytest.approx(one.tokens * plain / one.seconds)
    assert [one.speedup for one in found] == sorted(
        (one.speedup for one in found), reverse=True
    )
    # Levels cost by their width, which no programme sees: the best of all trees may be
    # a little better than the best of those with most tokens.
    best = max(
        costs.speedup(tree, theory.expected_tokens(tree, acceptance))
        for tree in all_trees()
        if tree.depth <= 4
    )
    assert 0.99 * best <= found[0].speedup <= best + 1e-12


@pytest.mark.parametrize("multiple", [1, 4])
def test_regular_trees_are_all_there_are(multiple):
    acceptance = random_acceptance(1, falling=True)
    found = list(search.regular_trees(acceptance, NODES, 3, multiple))

    def widths(tree):
        children = np.bincount(tree.parents[1:], minlength=tree.num_nodes)
        return tuple(int(children[tree.level(d)[0]]) for d in range(tree.depth))

    wanted = {
        tree
        for tree in all_trees()
        if 1 <= tree.depth <= 3
        and tree.num_nodes % multiple == 0
        and tree.ranks.max() < 3
        and tree == regular(widths(tree))
    }
    assert {one.topology for one in found} == wanted
    assert len(found) == len(wanted) > 0
    for one in found:
        assert one.tokens == theory.expected_tokens(one.topology, acceptance)
