"""Beam search over trees of verified tokens, on the host; free of jax.

A search goes level by level. A level needs the target's likeliest tokens after every
beam, which is a node of its slot's tree; while all new beams are nodes too, the next
level needs no further pass of the target. Every pass gives one level at least, and the
result is that of a search without trees (docs/branches.md). Hypotheses are counted,
ended and ordered as Hugging Face's `generate` does it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from treespec_jax.checks import as_int, check_float, shown
from treespec_jax.errors import UserError

NEVER = "never"


@dataclasses.dataclass(frozen=True)
class BeamParams:
    """How to search.

    Attributes:
      beams: K, texts that are followed at once.
      max_tokens: of a text, its end token included.
      length_penalty: a finished text scores sum(log p) / length ** length_penalty.
      early_stopping: True ends the search once K texts are finished; False when no
        beam as it stands scores above the worst of them; "never" when none could by
        growing to `max_tokens` either.
      n_best: texts to return, K at most.

    Raises:
      UserError: a value out of range; names it.
    """

    beams: int = 4
    max_tokens: int = 64
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    n_best: int = 1

    def __post_init__(self):
        for name in ("beams", "max_tokens", "n_best"):
            as_int(name, getattr(self, name), 1)
        check_float("length_penalty", self.length_penalty, -10, 10)
        if self.early_stopping not in (True, False, NEVER):
            raise UserError(
                "early_stopping must be True, False or 'never', got "
                f"{shown(self.early_stopping)}"
            )
        if self.n_best > self.beams:
            raise UserError(
                f"n_best={self.n_best} texts of beams={self.beams}; raise beams"
            )


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A finished text.

    Attributes:
      tokens: ids, an end token included.
      score: sum of log p over a power of its length.
    """

    tokens: tuple[int, ...]
    score: float


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a pass of the target says of the nodes of B trees, as NumPy arrays.

    Attributes:
      tokens: int32 [B, T].
      parents: int32 [B, T].
      valid: bool [B, T].
      best: int32 [B, T, N], likeliest tokens after each node, best first.
      log_probs: float32 [B, T, N], natural, of those.
    """

    tokens: np.ndarray
    parents: np.ndarray
    valid: np.ndarray
    best: np.ndarray
    log_probs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Beam:
    """A text that is followed, as it stands in the tree of a slot.

    Attributes:
      slot: whose tree it is in.
      node: where it stands; None: past the tree.
      path: nodes above, the root first.
      emitted: a token after each of them.
    """

    slot: int
    node: int | None = 0
    path: tuple[int, ...] = ()
    emitted: tuple[int, ...] = ()


class BeamSearch:
    """The search of one prompt.

    Args:
      params: how to search; `max_tokens` fits.
      eos_ids: tokens that end a text.

    Attributes:
      finished: the K best finished texts so far, best first.
      length: tokens of every beam.
    """

    def __init__(self, params: BeamParams, eos_ids: Collection[int]):
        self.params = params
        self.finished: list[Hypothesis] = []
        self.length = 0
        self._eos_ids = frozenset(eos_ids)
        self._count = candidates(params.beams, eos_ids)
        self._texts: list[tuple[int, ...]] = [()]
        self._scores = np.zeros(1, np.float32)

    @property
    def full(self) -> bool:
        """Whether K texts are finished."""
        return len(self.finished) >= self.params.beams

    def advance(self, best: np.ndarray, log_probs: np.ndarray) -> list[tuple[int, int]]:
        """Goes on by a level.

        Args:
          best: int32 [k, N], the likeliest tokens after every beam.
          log_probs: float32 [k, N].

        Returns:
          for every new beam the number of the one that it goes on from, and its token;
          none if the search has ended.
        """
        beams = self.params.beams
        totals = (self._scores[:, None] + log_probs).astype(np.float32)
        order = np.argsort(-totals, axis=None, kind="stable")[: self._count]
        self.length += 1
        last = self.length >= self.params.max_tokens
        chosen, texts, scores, ended = [], [], [], []
        for rank, index in enumerate(order.tolist()):
            beam, column = divmod(index, best.shape[1])
            token, total = int(best[beam, column]), totals[beam, column]
            text = (*self._texts[beam], token)
            if last or token in self._eos_ids:
                if rank < beams:
                    ended.append(Hypothesis(text, self._scored(float(total))))
            elif len(chosen) < beams:
                chosen.append((beam, token))
                texts.append(text)
                scores.append(total)
        # Stable: of equal ones the earlier stands first.
        ranked = sorted([*self.finished, *ended], key=_score, reverse=True)
        self.finished = ranked[:beams]
        self._texts, self._scores = texts, np.array(scores, np.float32)
        return chosen if chosen and self._may_improve() else []

    def _scored(self, total: float, length: int | None = None) -> float:
        return total / (length or self.length) ** self.params.length_penalty

    def _may_improve(self) -> bool:
        if not self.full:
            return True
        params = self.params
        if params.early_stopping is True:
            return False
        grows = params.early_stopping == NEVER and params.length_penalty > 0
        length = params.max_tokens if grows else self.length
        hoped = self._scored(float(self._scores[0]), length)
        return hoped > self.finished[-1].score


def candidates(beams: int, eos_ids: Collection[int]) -> int:
    """Texts that a level looks at, so that K of them end nothing."""
    return max(2, 1 + len(set(eos_ids))) * beams


def told(beams: int, eos_ids: Collection[int]) -> int:
    """N: tokens that a pass tells of after every node; few programs serve many K."""
    return max(16, 1 << (candidates(beams, eos_ids) - 1).bit_length())


def walk(search: BeamSearch, beams: Sequence[Beam], seen: Seen) -> list[Beam]:
    """Takes as many levels as the trees hold.

    Args:
      search: of the prompt.
      beams: at the roots of their slots.
      seen: of all slots.

    Returns:
      the beams after these levels, K at most; none if the search has ended.
    """
    children: dict[int, dict[tuple[int, int], int]] = collections.defaultdict(dict)
    for slot in {beam.slot for beam in beams}:
        nodes = np.flatnonzero(seen.valid[slot])
        tokens, parents = seen.tokens[slot].tolist(), seen.parents[slot].tolist()
        for node in nodes.tolist():
            if node:
                children[slot][parents[node], tokens[node]] = node
    beams = list(beams)
    while beams and all(beam.node is not None for beam in beams):
        slots = [beam.slot for beam in beams]
        nodes = [beam.node for beam in beams]
        chosen = search.advance(seen.best[slots, nodes], seen.log_probs[slots, nodes])
        beams = [
            Beam(
                beams[number].slot,
                children[beams[number].slot].get((beams[number].node, token)),
                (*beams[number].path, beams[number].node),
                (*beams[number].emitted, token),
            )
            for number, token in chosen
        ]
    return beams


def placed(beams: Sequence[Beam], slots: int) -> list[int]:
    """A slot for every new beam, so that none is copied over one that goes on.

    The first beam of a slot stays there; the others get slots that nobody goes on from.

    Args:
      beams: of all prompts.
      slots: that there are.
    """
    staying: dict[int, int] = {}
    for number, beam in enumerate(beams):
        staying.setdefault(beam.slot, number)
    free = (slot for slot in range(slots) if slot not in staying)
    return [
        beam.slot if staying[beam.slot] == number else next(free)
        for number, beam in enumerate(beams)
    ]


def _score(hypothesis: Hypothesis) -> float:
    return hypothesis.score
