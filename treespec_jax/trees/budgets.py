"""Shapes cut to budgets of nodes: so many per level, so many in all.

Budgets act on the shape, before anything is compiled: no tree of a cut shape can exceed
them, whatever the drafter proposes.
"""

from __future__ import annotations

import dataclasses
import math

from treespec_jax.trees import paths
from treespec_jax.trees.shapes import (
    ROOT_ONLY,
    AllottedShape,
    BestFirstShape,
    Ladder,
    StaticShape,
    TreeShape,
    dynamic,
)


@dataclasses.dataclass(frozen=True)
class Budgets:
    """How large a tree may be, the root not counted; None: as large as its shape.

    Attributes:
      max_nodes_per_level: drafted nodes of equal depth, >= 1.
      max_total_nodes: drafted nodes of a tree, >= 1.
    """

    max_nodes_per_level: int | None = None
    max_total_nodes: int | None = None

    def cut(self, shape: TreeShape | Ladder) -> TreeShape | Ladder:
        """The shape within the budgets: itself if it is; of a ladder every shape.

        A static tree keeps its nodes of the least product of (rank + 1) on the way
        down, first in every level, then in all: those whose parents and elder siblings
        the drafter thinks most probable. A best-first tree keeps the likeliest paths,
        level by level. An allotted tree gets smaller levels.
        """
        if isinstance(shape, Ladder):
            cut = [self.cut(one) for one in shape.shapes if one.depth]
            return Ladder((*dict.fromkeys(cut), ROOT_ONLY))
        if isinstance(shape, StaticShape):
            return self._cut_static(shape)
        return self._cut_counts(shape)

    def bound(self, shape: TreeShape | Ladder) -> tuple[str, ...]:
        """Names of the budgets that change the shape, each by itself."""
        names = [field.name for field in dataclasses.fields(self)]
        alone = {name: Budgets(**{name: getattr(self, name)}) for name in names}
        return tuple(n for n, budget in alone.items() if budget.cut(shape) != shape)

    def _cut_static(self, shape: StaticShape) -> StaticShape:
        topology, nodes = shape.topology, paths.paths_of(shape.topology)[1:]
        worth = [(math.prod(r + 1 for r in path), len(path), path) for path in nodes]
        limit = self.max_nodes_per_level or len(nodes)
        sizes = [0] * (topology.depth + 1)
        # In order. Parents and elder siblings come before a node: what remains is a
        # tree wherever the order is cut.
        remaining: dict[paths.RankPath, None] = {}
        for _, depth, path in sorted(worth):
            if sizes[depth] < limit and (depth == 1 or path[:-1] in remaining):
                sizes[depth] += 1
                remaining[path] = None
        cut = list(remaining)[: self.max_total_nodes]
        if len(cut) == len(nodes):
            return shape
        return StaticShape(paths.topology_of(cut))

    def _cut_counts(self, shape: BestFirstShape | AllottedShape):
        nodes, level = shape.nodes, shape.level
        if self.max_total_nodes is not None:
            nodes = min(nodes, self.max_total_nodes)
        depth = min(shape.depth, nodes)
        if self.max_nodes_per_level is not None:
            limit = min(self.max_nodes_per_level, level or nodes)
            nodes = min(nodes, limit * depth)
            # A level of a tree leaves a node to each other level.
            level = limit if limit < _largest_level(shape, nodes, depth) else level
        if (nodes, depth, level) == (shape.nodes, shape.depth, shape.level):
            return shape
        if isinstance(shape, AllottedShape):
            return AllottedShape(nodes, depth, level)
        smaller = dynamic(nodes, depth, level, shape.threshold, shape.priced)
        return dataclasses.replace(
            smaller,
            width=min(smaller.width, shape.width),
            children=min(smaller.children, shape.children),
        )


def _largest_level(shape, nodes: int, depth: int) -> int:
    """Nodes that a level may have at most, in a tree of so many."""
    if isinstance(shape, AllottedShape):
        return max(AllottedShape(nodes, depth).level_sizes)
    below = min(nodes - 1, shape.width * shape.children) if depth > 1 else 0
    return max(min(nodes, shape.root_children), below)
