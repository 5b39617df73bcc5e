"""What became of a drafted tree, on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What one step drafted for a text, and what it kept; it emitted one token more.

    Attributes:
      nodes: drafted.
      ranks: which child of its parent each accepted node was, from the root down.
      sources: where each came from, see `Drafter.sources`.
    """

    nodes: int
    ranks: list[int]
    sources: list[int]

    @property
    def emitted(self) -> int:
        """Tokens."""
        return len(self.ranks) + 1

    def cut(self, tokens: int) -> StepRecord:
        """The same, had it emitted no more than so many tokens, at least 1."""
        accepted = tokens - 1
        return StepRecord(self.nodes, self.ranks[:accepted], self.sources[:accepted])


@dataclasses.dataclass(frozen=True)
class TreeRecord:
    """One tree of one text, and what became of it.

    Attributes:
      parents: int [T].
      log_prob: float [T], estimated log probability that a node is right given that
        its parent is; -inf for a number that no node has.
      path: int [C + 1], accepted nodes from the root (0) down, padded with 0.
      tokens: int [T], the root's first; None if nobody kept them.
      sources: int [T], where a node comes from (`Drafter.sources`), or None.
      target_log_prob: float [T], log p of a node's token after its parent under the
        target, before penalties, bias and temperature; 0 for the root. None if nobody
        kept them.
      emitted_log_prob: float [C + 1], the same of the tokens that the step emitted;
        what stands behind them means nothing.
    """

    parents: np.ndarray
    log_prob: np.ndarray
    path: np.ndarray
    tokens: np.ndarray | None = None
    sources: np.ndarray | None = None
    target_log_prob: np.ndarray | None = None
    emitted_log_prob: np.ndarray | None = None

    @property
    def accepted(self) -> list[int]:
        """Numbers of the accepted nodes."""
        return [int(node) for node in self.path[1:] if node > 0]

    def families(self) -> Iterable[tuple[np.ndarray, int | None]]:
        """Children of the root and of every accepted node, and the one accepted."""
        accepted = self.accepted
        for depth, parent in enumerate([0, *accepted]):
            children = np.flatnonzero(
                (self.parents == parent) & (self.log_prob > -np.inf)
            )
            children = children[children > 0]
            if len(children):
                yield children, accepted[depth] if depth < len(accepted) else None
