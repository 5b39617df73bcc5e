"""Static topologies against brute force over their parents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trees.strategies import level_order_parents
from treespec_jax.trees.topology import Topology, chain, regular

QUICK = settings(deadline=None, derandomize=True, max_examples=60)


def climb(parents, node) -> list[int]:
    """The node, its parent, …, the root."""
    path = []
    while node != -1:
        path.append(node)
        node = parents[node]
    return path


@QUICK
@given(level_order_parents())
def test_arrays_follow_from_parents(parents):
    """Depths, ancestors, ranks and levels, each by walking up from every node."""
    tree = Topology(parents)
    T = len(parents)
    paths = [climb(parents, node) for node in range(T)]
    assert tree.num_nodes == T
    assert tree.depths.tolist() == [len(path) - 1 for path in paths]
    assert tree.depth == max(len(path) - 1 for path in paths)
    brute = np.zeros((T, T), bool)
    for node, path in enumerate(paths):
        brute[node, path] = True
    np.testing.assert_array_equal(tree.ancestors, brute)
    ranks = [sum(parents[m] == parents[n] for m in range(n)) for n in range(T)]
    assert tree.ranks.tolist() == ranks
    levels = [tree.level(depth).tolist() for depth in range(tree.depth + 1)]
    # Levels are runs of indices that stand one after the other.
    assert sum(levels, []) == list(range(T))
    assert all(
        {len(paths[n]) - 1 for n in level} == {d} for d, level in enumerate(levels)
    )
    for depth, level in enumerate(levels):
        assert tree.inner(depth).tolist() == [n for n in level if n in parents[1:]]


@QUICK
@given(st.lists(st.integers(-1, 7), min_size=1, max_size=8))
def test_only_level_order_is_accepted(parents):
    """A tree is taken iff it is rooted, topological and sorted by depth."""
    parents = tuple(parents)
    rooted = parents[0] == -1 and all(
        0 <= parent < node for node, parent in enumerate(parents) if node
    )
    if rooted:
        depths = [len(climb(parents, node)) for node in range(len(parents))]
        # Children of an earlier parent come first within a level too.
        rooted = depths == sorted(depths) and list(parents) == sorted(parents)
    if rooted:
        assert Topology(parents).parents == parents
    else:
        with pytest.raises(ValueError, match="level order|begin with -1"):
            Topology(parents)


def test_no_nodes_are_refused():
    with pytest.raises(ValueError, match="begin with -1"):
        Topology(())


def test_chain_and_regular_have_the_expected_parents():
    assert chain(0).parents == (-1,)
    assert chain(3).parents == (-1, 0, 1, 2)
    assert regular((2, 1)).parents == (-1, 0, 0, 1, 2)
    assert regular((1, 1, 1)) == chain(3)
    tree = regular((4, 2, 1))
    assert [len(tree.level(depth)) for depth in range(4)] == [1, 4, 8, 8]


def test_equal_topologies_hash_alike():
    """They are jit statics: a second one must not compile again."""
    assert hash(regular((2, 2))) == hash(regular((2, 2)))
    assert len({chain(2), chain(2), chain(3)}) == 2
