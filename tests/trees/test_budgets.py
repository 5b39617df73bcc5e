"""Shapes cut to budgets: never exceeded, and a tree of the best nodes all the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trees.strategies import level_order_parents
from treespec_jax import limits
from treespec_jax.config import SpeculativeConfig
from treespec_jax.errors import UserError
from treespec_jax.trees import shapes
from treespec_jax.trees.budgets import Budgets
from treespec_jax.trees.paths import paths_of
from treespec_jax.trees.topology import Topology

COUNTS = st.none() | st.integers(1, 40)


@st.composite
def counted(draw):
    nodes = draw(st.integers(1, 40))
    depth = draw(st.integers(1, nodes))
    return shapes.parse(f"{draw(st.sampled_from(KINDS))}:{nodes}@{depth}")


KINDS = ["dynamic", "allotted"]
STATIC = level_order_parents(25).map(lambda p: shapes.StaticShape(Topology(p)))


@given(STATIC, COUNTS, COUNTS)
def test_a_static_tree_is_cut_to_the_best_of_its_nodes(shape, level, total):
    cut = Budgets(level, total).cut(shape)
    assert cut.num_nodes - 1 <= (total or 25)
    sizes = np.bincount(cut.topology.depths)
    assert sizes.max() <= (level or 25)
    before, after = set(paths_of(shape.topology)), set(paths_of(cut.topology))
    assert after <= before
    # Nothing goes without need.
    levels = Budgets(max_nodes_per_level=level).cut(shape)
    assert len(after) - 1 == min(levels.num_nodes - 1, total or 25)
    sizes, still = np.bincount(levels.topology.depths), set(paths_of(levels.topology))
    for path in before - still:
        assert path[:-1] not in still or sizes[len(path)] == level


@given(counted(), COUNTS, COUNTS)
def test_counts_are_cut_and_levels_hold_them(shape, level, total):
    budgets = Budgets(level, total)
    cut = budgets.cut(shape)
    assert cut.nodes <= min(shape.nodes, total or 40) and cut.depth <= shape.depth
    assert budgets.cut(cut) == cut
    if level is not None:
        assert cut.nodes <= level * cut.depth
    if isinstance(cut, shapes.AllottedShape):
        sizes = cut.level_sizes
        assert min(sizes) >= 1 and sum(sizes) == cut.num_nodes
        assert max(sizes) <= (level or 40)
    assert shapes.text_of(shapes.parse(shapes.text_of(cut))) == shapes.text_of(cut)
    assert budgets.bound(cut) == ()


def test_a_ladder_is_cut_shape_by_shape():
    ladder = shapes.parse("auto:7@4+3@3+15@5")
    budgets = Budgets(max_total_nodes=7)
    cut = budgets.cut(ladder)
    names = [shapes.text_of(shape) for shape in cut.shapes]
    assert names == ["dynamic:7@4", "dynamic:3@3", "dynamic:7@5", "none"]
    assert budgets.bound(ladder) == ("max_total_nodes",)
    assert Budgets(25, 200).cut(ladder) == ladder


def test_budgets_of_a_configuration():
    config = SpeculativeConfig(
        tree="regular:4x2x1", max_nodes_per_level=3, max_total_nodes=200
    )
    shape = limits.check_speculation(config)
    assert np.bincount(shape.topology.depths).tolist() == [1, 3, 3, 3]
    assert limits.bound_by(config) == ("max_nodes_per_level",)
    with pytest.raises(UserError, match="max_total_nodes must be .*1, got 0"):
        SpeculativeConfig(max_total_nodes=0)
