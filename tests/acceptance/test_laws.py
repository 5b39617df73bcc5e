"""Every lossless rule gives the target's own law, to rounding, by enumeration.

The rules as the papers have them (`enumeration`), and the shipped, jitted ones driven
through the same enumeration (`driving`): float64, error below 1e-10.
"""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from tests.acceptance import enumeration as ref
from tests.acceptance.driving import shipped_law
from treespec_jax.acceptance.block import BlockRule
from treespec_jax.acceptance.token import TokenRule
from treespec_jax.acceptance.traversal import TraversalRule
from treespec_jax.drafting import sampled
from treespec_jax.trees.shapes import DynamicShape
from treespec_jax.trees.topology import Topology

EXACT = 1e-10
RULES = {
    "token": (TokenRule(), ref.token),
    "traversal": (TraversalRule(), ref.traversal),
    "block": (BlockRule(), ref.block),
}
TOPOLOGIES = {
    "chain2": (-1, 0, 1),
    "chain3": (-1, 0, 1, 2),
    "full": (-1, 0, 0, 1, 1, 2, 2),
    "tapered": (-1, 0, 0, 0, 1, 2),
    "lopsided": (-1, 0, 0, 1, 1, 3),
    "late": (-1, 0, 0, 2, 2),
    "overfull": (-1, 0, 0, 0, 0, 4),
}
DYNAMIC = {
    "dynamic5@2": DynamicShape(5, 2, 0, 0),
    "dynamic6@3": DynamicShape(6, 3, 0, 0),
}


def depth_of(name) -> int:
    if name in DYNAMIC:
        return DYNAMIC[name].depth
    return Topology(TOPOLOGIES[name]).depth


def meta_of(name, replacement=False) -> dict:
    """Static fields of the tree's `Proposal`."""
    if name in DYNAMIC:
        levels = sampled.level_sizes(DYNAMIC[name])
        nodes = tuple(range(sum(levels[:-1])))
        most = tuple(min(n, 3) for n in levels[1:])
    else:
        topology = Topology(TOPOLOGIES[name])
        depths = range(topology.depth)
        nodes = tuple(int(n) for d in depths for n in topology.inner(d))
        levels = tuple(len(topology.level(d)) for d in range(topology.depth + 1))
        most = tuple(
            int(topology.ranks[topology.level(d + 1)].max()) + 1 for d in depths
        )
    return dict(nodes=nodes, levels=levels, most=most, replacement=replacement)


def allotted(world, sizes):
    """Parents of the next level of a dynamic tree, one node after the other."""

    def levels(tree, level):
        depth = list(np.cumsum(sizes) - sizes).index(level[0])
        budget, unseen = sizes[depth + 1], sampled.COVERED**depth
        parents = []
        for node in level:
            path = tree.paths[node]
            chance = 0.0
            if path is not None:
                chance = float(
                    np.prod([world.q[path[:i]][x] for i, x in enumerate(path)])
                )
            wish = int(np.ceil(budget * (chance / max(unseen, chance + 1e-9))))
            wish = budget if node == level[-1] else min(wish, budget)
            wish = wish if chance > 0 else 0
            parents += [node] * wish
            budget -= wish
            unseen = max(unseen - chance, 0.0)
        # Places that nobody got stay empty.
        return parents + [level[-1]] * budget

    return levels


def trees_of(name, world, replacement=False):
    """Every tree of a shape that q can draw."""
    if name in DYNAMIC:
        sizes = sampled.level_sizes(DYNAMIC[name])
        return ref.draw(world, allotted(world, sizes), world.depth)
    wish = ref.static(TOPOLOGIES[name])
    return ref.draw(world, wish, world.depth, replacement)


SAMPLED = [
    (rule, name)
    for rule, name in itertools.product(RULES, (*TOPOLOGIES, *DYNAMIC))
    if rule != "block" or name.startswith("chain")
]


@pytest.mark.parametrize("rule, name", SAMPLED)
def test_sampled_trees(rule, name):
    """Both the papers' rule and the shipped one, and as many tokens accepted."""
    shipped, paper = RULES[rule]
    for world in ref.worlds(depth_of(name)):
        trees = trees_of(name, world)
        assert sum(t.chance for t in trees) == pytest.approx(1.0, abs=1e-12)
        want = world.law()
        assert np.abs(ref.text_law(world, trees, paper) - want).max() < EXACT
        with jax.enable_x64(True):
            law, mean = shipped_law(shipped, world, trees, meta_of(name))
        assert np.abs(law - want).max() < EXACT
        own = sum(t.chance * ref.accepted(paper(world, t)) for t in trees)
        assert mean == pytest.approx(own, abs=EXACT)
