"""Tree shapes of the enumeration, and every tree of a shape that q can propose."""

from __future__ import annotations

import numpy as np

from tests.acceptance import enumeration as ref
from treespec_jax.acceptance.block import BlockRule
from treespec_jax.acceptance.token import TokenRule
from treespec_jax.acceptance.traversal import TraversalRule
from treespec_jax.drafting import growth
from treespec_jax.trees.shapes import AllottedShape
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
ALLOTTED = {
    "allotted5@2": AllottedShape(5, 2),
    "allotted6@3": AllottedShape(6, 3),
}


def depth_of(name) -> int:
    if name in ALLOTTED:
        return ALLOTTED[name].depth
    return Topology(TOPOLOGIES[name]).depth


def meta_of(name, replacement=False) -> dict:
    """Static fields of the tree's `Proposal`."""
    if name in ALLOTTED:
        sizes = ALLOTTED[name].level_sizes
        nodes = tuple(range(sum(sizes[:-1])))
        children = tuple(min(n, 3) for n in sizes[1:])
    else:
        topology = Topology(TOPOLOGIES[name])
        depths = range(topology.depth)
        nodes = tuple(int(n) for d in depths for n in topology.inner(d))
        sizes = tuple(len(topology.level(d)) for d in range(topology.depth + 1))
        children = tuple(
            int(topology.ranks[topology.level(d + 1)].max()) + 1 for d in depths
        )
    return dict(
        nodes=nodes, level_sizes=sizes, max_children=children, replacement=replacement
    )


def allotted(world, sizes):
    """Parents of the next level of an allotted tree: one child at a time."""

    def levels(tree, level):
        depth = list(np.cumsum(sizes) - sizes).index(level[0])
        budget = sizes[depth + 1]
        most = min(budget, world.vocab)
        worth = {}
        for node in level:
            path = tree.paths[node]
            if path is not None:
                steps = [world.q[path[:i]][x] for i, x in enumerate(path)]
                worth[node] = float(np.prod(steps))
        parents = []
        for _ in range(budget):
            open_ = [n for n in worth if parents.count(n) < most and worth[n] > 0]
            if open_:
                parents.append(max(open_, key=worth.get))
                worth[parents[-1]] *= growth.DECAY
        # Places that nobody got stay empty.
        return sorted(parents) + [-1] * (budget - len(parents))

    return levels


def tempered(world, form, strength, children):
    """A world whose q has temperatures that follow the tree.

    By the papers' words, path by path: a power of the depth, a power of the number of
    siblings, or EDT's 0.8^(strength / entropy).

    Args:
      world: its p stays.
      form: of `treespec_jax.adaptive`.
      strength: of the form.
      children: of a node, at most, by depth.
    """
    q = {}
    for path, column in world.q.items():
        some = column[column > 0]
        if form == "depth":
            factor = strength ** len(path)
        elif form == "siblings":
            factor = float(children[min(len(path), len(children) - 1)]) ** strength
        else:
            factor = 0.8 ** (strength / -(some * np.log(some)).sum())
        powers = np.where(column > 0, column, 0.0) ** (1 / np.clip(factor, 0.05, 20))
        q[path] = powers / powers.sum()
    made = world.replace()
    made.q = q
    return made


def trees_of(name, world, replacement=False):
    """Every tree of a shape that q can draw."""
    if name in ALLOTTED:
        sizes = ALLOTTED[name].level_sizes
        return ref.draw(world, allotted(world, sizes), world.depth)
    wish = ref.static(TOPOLOGIES[name])
    return ref.draw(world, wish, world.depth, replacement)


def best_tree(world, topology):
    """The tree of q's likeliest tokens, rank by rank."""
    topology = Topology(topology)
    paths = [()]
    for node in range(1, topology.num_nodes):
        above = paths[topology.parents[node]]
        order = np.argsort(-world.q[above], kind="stable")
        paths.append((*above, int(order[topology.ranks[node]])))
    count = len(paths)
    parents = [max(p, 0) for p in topology.parents]
    return ref.Tree(parents, paths, [1.0] * count, [1.0] * count, [0.0] * count)
