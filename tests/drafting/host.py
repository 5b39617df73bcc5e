"""Drafters without a model in plain Python: a slot, a node, a token at a time.

Nothing here runs on a device or is imported from a drafter but the numbers that are
tuned there. Estimates are float64; where they do not decide, `Doubt` says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from treespec_jax.drafting import last_logits, matches, rates, recycle
from treespec_jax.drafting.children import REST
from treespec_jax.trees.shapes import BestFirstShape, StaticShape

# Logarithms that are nearer than this may come in either order in float32.
NEAR = 2e-5
Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Guess:
    """A token that may follow a node, the logarithm of its worth, and its source."""

    token: int
    log: float
    source: int = 0


# Guesses after a path below the root, in the drafter's order.
Guesses = Callable[[Path], list[Guess]]


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of a tree: its path from the root, and the logarithms along it."""

    path: Path
    logs: tuple[float, ...]
    source: int

    @property
    def total(self) -> float:
        return sum(self.logs)


class Doubt(Exception):
    """Rounding decides."""


def falling(
    nodes: Sequence[Node], count: int, near: float, ordered: bool = True
) -> list[Node]:
    """The best `count`, of equal ones the first; best first.

    Args:
      nodes: in the drafter's order.
      count: wanted.
      near: sums that are nearer may come in either order; 0 where they are exact.
      ordered: whether it matters in which order they come.

    Raises:
      Doubt: rounding decides which they are, or, if that matters, in which order.
    """
    best = sorted(nodes, key=lambda node: -node.total)
    pairs = list(zip(best, best[1:], strict=False))[:count]
    for one, other in pairs if ordered else pairs[count - 1 :]:
        # Two numbers have one sum; of three it depends on their order.
        same = sorted(one.logs) == sorted(other.logs)
        sure = one.logs == other.logs or (same and len(one.logs) <= 2)
        if abs(one.total - other.total) < near and not sure:
            raise Doubt
    return best[:count]


def children(node: Node | None, guesses: Guesses, count: int, near) -> list[Node]:
    """The best children of a node; None is the root."""
    path, logs = (node.path, node.logs) if node else ((), ())
    found = [Node((g.token,), (g.log,), g.source) for g in guesses(path)]
    return [
        Node((*path, *child.path), (*logs, *child.logs), child.source)
        for child in falling(found, count, near)
    ]


def grow(shape, guesses: Guesses, near: float = NEAR) -> list[Node | None]:
    """The drafted nodes in order; None for one that a static tree lacks.

    Raises:
      Doubt: rounding decides.
    """
    if isinstance(shape, StaticShape):
        return _static(shape, guesses, near)
    return _best_first(shape, guesses, near)


def _static(shape: StaticShape, guesses: Guesses, near: float):
    topology, nodes = shape.topology, {0: None}
    families: dict[int, list[Node]] = {}
    for number in range(1, topology.num_nodes):
        parent = topology.parents[number]
        if parent not in families:
            exists = parent == 0 or nodes[parent] is not None
            count = topology.parents.count(parent)
            families[parent] = (
                children(nodes[parent], guesses, count, near) if exists else []
            )
        family, rank = families[parent], topology.ranks[number]
        nodes[number] = family[rank] if rank < len(family) else None
    return [nodes[number] for number in range(1, topology.num_nodes)]


def _best_first(shape: BestFirstShape, guesses: Guesses, near: float):
    level = children(None, guesses, shape.root_children, near)
    seen = list(level)
    for _ in range(1, shape.depth):
        frontier = falling(level, shape.width, near)
        level = [
            child
            for node in frontier
            for child in children(node, guesses, shape.children, near)
        ]
        seen += level
    chosen = falling(seen, shape.nodes, near, ordered=False)
    return [node for node in seen if any(node is other for other in chosen)]


def leaning(guesses: list[Guess], noise_V: np.ndarray, tau: float) -> list[Guess]:
    """The same once the noise of their position is known.

    What the guesses leave over is one more token, of noise as large as its mean.
    """
    rest = max(1.0 - sum(math.exp(guess.log) for guess in guesses), REST)
    scores = [(guess.log + float(noise_V[guess.token])) / tau for guess in guesses]
    scores.append((math.log(rest) + np.euler_gamma) / tau)
    norm = np.logaddexp.reduce(scores)
    return [
        dataclasses.replace(guess, log=float(score - norm))
        for guess, score in zip(guesses, scores, strict=False)
    ]


class Rates:
    """Of cells; begins like the drafter's."""

    def __init__(self, start):
        self.hits, self.tries = (np.array(x) for x in (start.hits, start.tries))

    def of(self, cell: int) -> float:
        return float(self.hits[cell] / self.tries[cell])

    def observe(self, seen: Sequence[tuple[int, bool]]) -> None:
        """Takes in cells whose guess could come true, and whether it did."""
        hits, tries = np.zeros_like(self.hits), np.zeros_like(self.tries)
        for cell, hit in seen:
            tries[cell] += 1
            hits[cell] += hit
        self.hits, self.tries = self.hits + hits, self.tries + tries
        for cell in np.flatnonzero(self.tries > rates.MEMORY):
            scale = np.float32(rates.MEMORY) / self.tries[cell]
            self.hits[cell] *= scale
            self.tries[cell] *= scale


@dataclasses.dataclass(frozen=True)
class Row:
    """What the target said after one of its rows, in the order of slots and nodes."""

    slot: int
    token: int
    best: list[int]
    logits: list[float]


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of one slot.

    Attributes:
      slot: whose.
      start: position of the root.
      path: the root's token and those accepted below it.
      following: the token after each of them.
      newest: what the target said where it chose the last of these.
    """

    slot: int
    start: int
    path: list[int]
    following: list[int]
    newest: Row


class Recycle:
    """Token recycling: dictionaries from a token to its successors."""

    def __init__(self, slots: int, count: int, scope: str, start):
        self.count, self.scope = count, scope
        self.tables = [{} for _ in range(slots)]
        if scope == "engine":
            self.tables = [self.tables[0]] * slots
        self.rates = Rates(start)

    def chunk(self, slot, text, start, end, rows: Sequence[Row]) -> None:
        if start == 0 and self.scope == "request":
            self.tables[slot] = {}
        self._learn(rows)

    def steps(self, steps: Sequence[Step], rows: Sequence[Row]) -> None:
        self.rates.observe(
            [
                (cell, token == following)
                for step in steps
                for above, following in zip(step.path, step.following, strict=True)
                for token, cell in self._successors(step.slot, above)
            ]
        )
        self._learn(rows)

    def guesses(self, slot: int, root: int, path: Path) -> list[Guess]:
        return [
            Guess(token, math.log(self.rates.of(cell)))
            for token, cell in self._successors(slot, (root, *path)[-1])
        ]

    def look(self, slot: int, root: int, depth: int) -> None:
        """Nothing is looked up before a tree."""

    def _learn(self, rows: Sequence[Row]) -> None:
        for row in rows:
            best, logits = row.best[: self.count], row.logits[: self.count]
            self.tables[row.slot][row.token] = best, logits

    def _successors(self, slot: int, token: int) -> list[tuple[int, int]]:
        """Tokens and their cells."""
        best, logits = self.tables[slot].get(token, ([], []))
        total = sum(map(math.exp, logits))
        cells = []
        for rank, logit in enumerate(logits):
            bin_ = max(
                number
                for number, low in enumerate(recycle.BINS)
                if math.exp(logit) / total >= low
            )
            cells.append(rank * len(recycle.BINS) + bin_)
        return list(zip(best, cells, strict=True))


@dataclasses.dataclass
class Match:
    """An earlier place of a text that ends like its end, and what followed there."""

    length: int
    following: list[int]


class LastLogits:
    """Runners-up of the newest token, each completed by an earlier match."""

    def __init__(self, slots: int, count: int, width: int, worth, start):
        self.count, self.width = count, width
        self.candidates: list[list[int | None]] = [[None] * count] * slots
        self.texts: list[list[int]] = [[] for _ in range(slots)]
        self.found: dict[int, list[Match]] = {}
        self.worth, self.rates = Rates(worth), Rates(start)

    def chunk(self, slot, text, start, end, rows: Sequence[Row]) -> None:
        self.texts[slot] = list(text[: end + 1])
        newest = rows[-1] if rows else None
        self.candidates[slot] = self._runners_up(newest, text[end])

    def steps(self, steps: Sequence[Step], rows: Sequence[Row]) -> None:
        self.worth.observe(
            [
                (rank, token == step.following[0])
                for step in steps
                for rank, token in enumerate(self.candidates[step.slot])
                if token is not None
            ]
        )
        for depth in range(1, self.width):
            self.rates.observe(
                [seen for step in steps for seen in self._judged(step, depth)]
            )
        for step in steps:
            self.texts[step.slot] += step.following
            newest = self._runners_up(step.newest, step.following[-1])
            self.candidates[step.slot] = newest

    def look(self, slot: int, root: int, depth: int) -> None:
        assert self.texts[slot][-1] == root
        self.found[slot] = [
            self._match(self.texts[slot], token)
            for token in self.candidates[slot]
            if token is not None and depth
        ]

    def guesses(self, slot: int, root: int, path: Path) -> list[Guess]:
        if not path:
            return [
                Guess(token, math.log(self.worth.of(rank)))
                for rank, token in enumerate(self.candidates[slot])
                if token is not None
            ]
        shares, length = self._continuations(slot, path)
        rate = math.log(self.rates.of(self._cell(length))) if length else 0.0
        return [Guess(token, math.log(s) + rate) for token, s in shares.items()]

    def _runners_up(self, newest: Row | None, root: int) -> list[int | None]:
        others = [token for token in newest.best if token != root] if newest else []
        others = others[: self.count]
        return others + [None] * (self.count - len(others))

    def _match(self, text: list[int], token: int) -> Match:
        """Of the newest token and a candidate; of equal lengths the latest."""
        tail, best = [*text[-(last_logits.LONGEST - 1) :], token], (0, 0)
        for place in range(len(text) - 1):
            length = 0
            while (
                length < last_logits.LONGEST
                and place - length >= 0
                and text[place - length] == tail[-1 - length]
            ):
                length += 1
            if length:
                best = max(best, (length, place))
        length, place = best
        if not length:
            return Match(0, [token])
        following = []
        # At its own end a text goes on with the candidate, then in a circle.
        while len(following) < self.width - 1:
            following += [*text, token][place + 1 :]
        return Match(length, [token, *following[: self.width - 1]])

    def _continuations(self, slot: int, path: Path) -> tuple[dict[int, float], int]:
        """Shares of the tokens after a path, and the longest match that names one."""
        agreeing = [
            match
            for match in self.found[slot]
            if match.length and tuple(match.following[: len(path)]) == path
        ]
        weights: dict[int, float] = {}
        for match in agreeing:
            token = match.following[len(path)]
            weights[token] = weights.get(token, 0) + matches.GAIN**match.length
        total = sum(weights.values())
        length = max((match.length for match in agreeing), default=0)
        shares = {token: weight / total for token, weight in weights.items()}
        return shares, length + len(path) if length else 0

    def _cell(self, length: int) -> int:
        return sum(length >= least for least in matches.LENGTHS) - 1

    def _judged(self, step: Step, depth: int) -> list[tuple[int, bool]]:
        """Whether the matches that were right so far name the next token."""
        if depth >= len(step.following):
            return []
        shares, length = self._continuations(step.slot, tuple(step.following[:depth]))
        return [(self._cell(length), step.following[depth] in shares)] if length else []
