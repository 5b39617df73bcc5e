"""Static tree topologies: hashable, in level order, known before any token is."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

# A tree is verified in one pass and its mask is T x T: beyond this nothing gains.
MAX_NODES = 1024


@dataclasses.dataclass(frozen=True)
class Topology:
    """A rooted tree of T nodes, named by its parents.

    Attributes:
      parents: parents[0] is -1, the root's; nodes stand in level order, so that a
        parent stands before its children and a level is a run of indices.

    Raises:
      ValueError: parents that are not in level order.
    """

    parents: tuple[int, ...]

    def __post_init__(self):
        if not self.parents or self.parents[0] != -1:
            raise ValueError(f"parents must begin with -1, got {self.parents[:3]}")
        for node, parent in enumerate(self.parents[1:], 1):
            if not 0 <= parent < node or parent < max(self.parents[:node]):
                raise ValueError(f"node {node} with parent {parent}: not level order")

    @property
    def num_nodes(self) -> int:
        """T, the root included."""
        return len(self.parents)

    @functools.cached_property
    def depths(self) -> np.ndarray:
        """int32 [T], edges from the root."""
        depths = np.zeros(self.num_nodes, np.int32)
        for node, parent in enumerate(self.parents[1:], 1):
            depths[node] = depths[parent] + 1
        return depths

    @property
    def depth(self) -> int:
        """C, levels below the root."""
        return int(self.depths[-1])

    @functools.cached_property
    def ancestors(self) -> np.ndarray:
        """bool [T, T]: row t marks t and all that lie between it and the root."""
        seen = np.eye(self.num_nodes, dtype=bool)
        for node, parent in enumerate(self.parents[1:], 1):
            seen[node] |= seen[parent]
        return seen

    @functools.cached_property
    def ranks(self) -> np.ndarray:
        """int32 [T], place of a node among its siblings; 0 is the likeliest."""
        count, ranks = {}, np.zeros(self.num_nodes, np.int32)
        for node, parent in enumerate(self.parents):
            ranks[node] = count.get(parent, 0)
            count[parent] = int(ranks[node]) + 1
        return ranks

    def level(self, depth: int) -> np.ndarray:
        """Nodes at `depth`, ascending."""
        return np.flatnonzero(self.depths == depth)

    def inner(self, depth: int) -> np.ndarray:
        """Nodes at `depth` that have children, ascending."""
        return np.intersect1d(self.level(depth), np.asarray(self.parents[1:], int))


def chain(length: int) -> Topology:
    """A root and `length` nodes, each the only child of the one before."""
    return Topology(tuple(range(-1, length)))


def regular(branching: tuple[int, ...]) -> Topology:
    """Every node at depth d has branching[d] children."""
    parents, level = [-1], [0]
    for children in branching:
        below = []
        for parent in level:
            for _ in range(children):
                below.append(len(parents))
                parents.append(parent)
        level = below
    return Topology(tuple(parents))
