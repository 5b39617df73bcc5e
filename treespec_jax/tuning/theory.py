"""What a tree should bring: closed forms, and expected tokens of any topology.

Expected values count tokens per step, the bonus included. The closed forms know one
number, alpha, the probability that a node is right given that its parent is; the
expectation of a topology knows that probability by depth and rank, as measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from treespec_jax.trees.records import TreeRecord
from treespec_jax.trees.topology import Topology

# A rate counts as if so many more families had shown the rate of all depths together.
PRIOR = 16


def chain_survival(alpha: float, length: int) -> float:
    """Probability that a whole chain is accepted: alpha^K."""
    return alpha**length


def chain_tokens(alpha: float, length: int) -> float:
    """Expected tokens of a chain: (1 - alpha^(K+1)) / (1 - alpha), see 2211.17192."""
    if alpha == 1:
        return length + 1.0
    return (1 - alpha ** (length + 1)) / (1 - alpha)


def textbook_survival(alpha: float, branching: int, depth: int) -> float:
    """1 - (1 - alpha^D)^(B^D): as if the B^D paths of a regular tree were independent.

    They are not: paths share edges, so that they fail together. The formula is exact
    for one level or one path and above `survival` otherwise. For example alpha=0.5 and
    a tree of 2x2 gives 0.684; the exact probability is 0.609.
    """
    # Not alpha**D first: 1 - tiny would be 1.
    return float(-np.expm1(branching**depth * np.log1p(-(min(alpha, 1) ** depth))))


def survival(alpha: float, branching: int, depth: int) -> float:
    """Probability that a path of length D is accepted, of a regular tree.

    Every node is right with probability alpha, independently of all others: s_0 = 1,
    s_d = 1 - (1 - alpha s_(d-1))^B, since the B subtrees of a node share no edge.
    """
    reached = 1.0
    for _ in range(depth):
        reached = 1 - (1 - alpha * reached) ** branching
    return reached


def regular_tokens(alpha: float, branching: int, depth: int) -> float:
    """Expected tokens of a regular tree of independent nodes: 1 + s_1 + … + s_D."""
    return 1.0 + sum(survival(alpha, branching, d) for d in range(1, depth + 1))


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """How often a child is the accepted one, given that its parent is.

    Children of a node exclude each other: they are different tokens, and the target
    takes one.

    Attributes:
      rates: entry [d][r] of the child of rank r of an accepted node at depth d, in
        [0, 1]. Depths below the last row are like it; a rank past its row is never
        accepted.
      families: of each depth, accepted nodes with children that the row was counted
        on; empty if it was not counted.
    """

    rates: tuple[tuple[float, ...], ...]
    families: tuple[int, ...] = ()

    def rate(self, depth: int, rank: int) -> float:
        """Of the child of that rank of an accepted node at that depth."""
        row = self.rates[min(depth, len(self.rates) - 1)]
        return row[rank] if rank < len(row) else 0.0

    def array(self, depth: int, ranks: int) -> np.ndarray:
        """Rates of depths 0, …, depth - 1, float64 [depth, ranks]."""
        return np.array(
            [[self.rate(d, r) for r in range(ranks)] for d in range(depth)], float
        ).reshape(depth, ranks)

    @property
    def ranks(self) -> int:
        """Ranks that some row knows."""
        return max(map(len, self.rates))


def node_probabilities(topology: Topology, acceptance: Acceptance) -> np.ndarray:
    """Probability that each node is accepted, float64 [T]: the product on its path."""
    depths, ranks = topology.depths, topology.ranks
    reached = np.ones(topology.num_nodes)
    for node, parent in enumerate(topology.parents[1:], 1):
        rate = acceptance.rate(int(depths[parent]), int(ranks[node]))
        reached[node] = reached[parent] * rate
    return reached


def expected_tokens(topology: Topology, acceptance: Acceptance) -> float:
    """Expected tokens of a step: the bonus, and a token for every accepted node."""
    return float(node_probabilities(topology, acceptance).sum())


def deviation(topology: Topology, acceptance: Acceptance) -> float:
    """Standard deviation of the tokens of a step."""
    reached = node_probabilities(topology, acceptance)
    # At most one node of a depth is accepted, so that S_d = P(L >= d) is a sum over it.
    survival_C = np.bincount(topology.depths, reached)[1:]
    depth_C = np.arange(1, len(survival_C) + 1)
    mean, square = survival_C.sum(), ((2 * depth_C - 1) * survival_C).sum()
    return float(np.sqrt(max(0.0, square - mean**2)))


def count(records: Iterable[TreeRecord]) -> Acceptance:
    """Acceptance by depth and rank, counted over trees that were fixed beforehand.

    A rate is the share of accepted parents with a child of that rank whose child was
    the accepted one; a child that the drafter had no token for was not. Few parents are
    reached at great depth, so that every rate is drawn towards the rate of its rank
    over all depths (`PRIOR`), but for children that never had a token, such as those
    below the last Medusa head.

    Raises:
      ValueError: no record has a node below its root.
    """
    counts: dict[tuple[int, int], np.ndarray] = {}
    for record in records:
        accepted = record.accepted
        for depth, parent in enumerate((0, *accepted)):
            children = np.flatnonzero(record.parents[1:] == parent) + 1
            exists = record.log_prob[children] > -np.inf
            for rank, child in enumerate(children):
                cell = counts.setdefault((depth, rank), np.zeros(3))
                cell += 1, exists[rank], child in accepted
    if not counts:
        raise ValueError("no drafted tree to count")
    depths, ranks = 1 + np.max(list(counts), axis=0)
    count_DR3 = np.zeros((depths, ranks, 3))
    for cell, found in counts.items():
        count_DR3[cell] = found
    families = count_DR3[:, 0, 0]
    never_DR = (count_DR3[..., 0] > 0) & (count_DR3[..., 1] == 0)
    seen_DR, hit_DR = np.where(never_DR, 0, count_DR3[..., 0]), count_DR3[..., 2]
    pooled_R = hit_DR.sum(0) / np.maximum(seen_DR.sum(0), 1)
    rate_DR = (hit_DR + PRIOR * pooled_R) / (seen_DR + PRIOR)
    rates = np.where(never_DR, 0.0, rate_DR).tolist()
    return Acceptance(tuple(map(tuple, rates)), tuple(map(int, families)))


def probe(width: int, depth: int) -> Topology:
    """A tree to count acceptance on: wide where children are likely to be accepted.

    It has the nodes whose ranks r on the way down keep the product of all r + 1 within
    `width`. So a family at the root has `width` children, as has one below first
    children only, and one below a third child has a third of them.
    """
    parents, level = [-1], [(0, 1)]
    for _ in range(depth):
        below = []
        for node, product in level:
            for rank in range(width // product):
                below.append((len(parents), product * (rank + 1)))
                parents.append(node)
        level = below
    return Topology(tuple(parents))


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a step on one machine, between measured sizes linear.

    Beyond the largest measured size costs grow by the slope of the last two.

    Attributes:
      verify: (T, seconds) of the target's pass over T nodes, ascending in T.
      draft_root: seconds of a drafter's part of a step that need no level: taking in
        the accepted tokens, which also scores the root's children.
      draft_level: (nodes, seconds) of one more level by the nodes that it expands.
      rest: (T, seconds) of all else: deciding, committing, the host.
    """

    verify: tuple[tuple[int, float], ...]
    draft_root: float
    draft_level: tuple[tuple[int, float], ...]
    rest: tuple[tuple[int, float], ...]

    def draft(self, topology: Topology) -> float:
        """Seconds of the drafter."""
        if topology.depth == 0:
            return 0.0
        levels = range(1, topology.depth)
        sizes = [len(topology.inner(depth)) for depth in levels]
        return self.draft_root + sum(_between(self.draft_level, n) for n in sizes)

    def step(self, topology: Topology) -> float:
        """Seconds of a step."""
        nodes = topology.num_nodes
        return (
            self.draft(topology)
            + _between(self.verify, nodes)
            + _between(self.rest, nodes)
        )

    def speedup(self, topology: Topology, tokens: float) -> float:
        """Of a step that brings so many tokens over plain decoding."""
        return tokens * self.step(Topology((-1,))) / self.step(topology)


def _between(points: Sequence[tuple[int, float]], size: int) -> float:
    sizes, seconds = zip(*points, strict=True)
    if size <= sizes[-1] or len(points) == 1:
        return float(np.interp(size, sizes, seconds))
    slope = max(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
    return seconds[-1] + slope * (size - sizes[-1])
