"""The best static tree by measured acceptance and measured costs.

`Programme` is Sequoia's dynamic programme (2402.12374, section 3) with acceptance by
depth as well as rank. Costs then choose among the best trees of every size and depth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from treespec_jax.trees import paths
from treespec_jax.trees.paths import RankPath
from treespec_jax.trees.topology import Topology, regular
from treespec_jax.tuning.theory import Acceptance, Costs, expected_tokens


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A tree and what it should bring.

    Attributes:
      topology: of the tree.
      tokens: expected per step.
      seconds: of a step; None where no costs are known.
      speedup: over plain decoding; None likewise.
    """

    topology: Topology
    tokens: float
    seconds: float | None = None
    speedup: float | None = None

    @property
    def nodes(self) -> int:
        """Drafted ones, the root not counted."""
        return self.topology.num_nodes - 1


class Programme:
    """The best trees of at most 1, …, N nodes and at most so deep.

    Let V_d(n) be the largest expected number of accepted nodes below an accepted node
    at depth d that has n nodes below it, and G_{d,r}(n) the part of its children of
    rank r and more:

      V_d(n) = G_{d,0}(n)
      G_{d,r}(n) = max(0, max_k a[d][r] (1 + V_{d+1}(k - 1)) + G_{d,r+1}(n - k))

    where k counts the nodes of the child of rank r and below it. Of equal trees the one
    of fewer nodes is taken.

    Attributes:
      acceptance: by depth and rank.
      depth: levels below the root, at most.
    """

    def __init__(self, acceptance: Acceptance, nodes: int, depth: int):
        self.acceptance, self.depth = acceptance, depth
        ranks = min(acceptance.ranks, nodes)
        rate_DR = acceptance.array(depth, ranks)
        size = np.arange(nodes + 1)
        # [n, k]: nodes for younger siblings; negative where k is too many.
        spare_NK = size[:, None] - size[None, 1:]
        self._value = {depth: np.zeros(nodes + 1)}
        self._taken: dict[tuple[int, int], np.ndarray] = {}
        for level in reversed(range(depth)):
            younger = np.zeros(nodes + 1)
            for rank in reversed(range(ranks)):
                gain_K = rate_DR[level, rank] * (1 + self._value[level + 1][:-1])
                total_NK = gain_K + younger[np.maximum(spare_NK, 0)]
                total_NK = np.where(spare_NK >= 0, total_NK, -np.inf)
                best = total_NK.argmax(axis=1)
                value = np.take_along_axis(total_NK, best[:, None], axis=1)[:, 0]
                worth = value > 0
                self._taken[level, rank] = np.where(worth, best + 1, 0)
                younger = np.where(worth, value, 0.0)
            self._value[level] = younger

    def tree(self, nodes: int, trunk: int = 0) -> Topology:
        """The best tree of at most so many nodes.

        Args:
          nodes: at most those of the programme.
          trunk: levels at the top that have one node each; at most the depth and
            `nodes`.
        """
        found: list[RankPath] = [(0,) * (d + 1) for d in range(trunk)]
        waiting = [((0,) * trunk, nodes - trunk)]
        while waiting:
            path, below = waiting.pop()
            rank = 0
            while (len(path), rank) in self._taken:
                taken = int(self._taken[len(path), rank][below])
                if not taken:
                    break
                child = (*path, rank)
                found.append(child)
                waiting.append((child, taken - 1))
                below -= taken
                rank += 1
        return paths.topology_of(found)

    def candidate(self, nodes: int, trunk: int = 0) -> Candidate:
        """That tree and its expected tokens."""
        topology = self.tree(nodes, trunk)
        return Candidate(topology, expected_tokens(topology, self.acceptance))


def best_by_nodes(acceptance: Acceptance, nodes: int, depth: int) -> list[Candidate]:
    """The best trees of at most 1, …, `nodes` nodes, whatever they cost."""
    programme = Programme(acceptance, nodes, depth)
    return [programme.candidate(count) for count in range(1, nodes + 1)]


def best_trees(
    acceptance: Acceptance, nodes: int, depth: int, trunk: int = 0
) -> Iterator[Candidate]:
    """The best trees of every number of nodes and every depth, each once.

    Args:
      acceptance: by depth and rank.
      nodes: at most.
      depth: at most.
      trunk: levels at the top that have one node each.
    """
    seen = set()
    for limit in range(max(1, trunk), depth + 1):
        programme = Programme(acceptance, nodes, limit)
        for count in range(max(1, trunk), nodes + 1):
            found = programme.candidate(count, trunk)
            if found.topology not in seen:
                seen.add(found.topology)
                yield found


def regular_trees(
    acceptance: Acceptance, nodes: int, depth: int, multiple: int = 1
) -> Iterator[Candidate]:
    """Trees whose nodes of one depth have equally many children.

    Args:
      acceptance: by depth and rank.
      nodes: at most.
      depth: at most.
      multiple: T, the root included, is a multiple of it.
    """
    waiting: list[tuple[tuple[int, ...], int, int]] = [((), 1, 1)]
    while waiting:
        branching, level, total = waiting.pop()
        if len(branching) == depth:
            continue
        for children in range(1, acceptance.ranks + 1):
            below = level * children
            if total + below > nodes + 1:
                break
            longer = (*branching, children)
            waiting.append((longer, below, total + below))
            if (total + below) % multiple == 0:
                topology = regular(longer)
                yield Candidate(topology, expected_tokens(topology, acceptance))


def priced(candidates: Iterable[Candidate], costs: Costs) -> list[Candidate]:
    """The same with seconds and speed-up, the quickest first."""
    found = [
        dataclasses.replace(
            one,
            seconds=costs.step(one.topology),
            speedup=costs.speedup(one.topology, one.tokens),
        )
        for one in candidates
    ]
    return sorted(found, key=lambda one: -one.speedup)
