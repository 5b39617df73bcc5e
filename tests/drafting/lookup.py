"""Drafting by earlier matches in plain Python: lists, loops and float64.

Written from what `drafting.matches` promises, not from how it does it. Constants that
are tuned come from the package. Ties are open: a tree is right if some order of equal
estimates leads to it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from treespec_jax.drafting import matches, rates
from treespec_jax.drafting.children import REST
from treespec_jax.sampling.noise import EULER
from treespec_jax.trees.shapes import BestFirstShape, StaticShape

END = matches.NOBODY
# Estimates closer than this may be ordered either way.
TIE = 1e-4

Path = tuple[int, ...]


class Corpora:
    """The text of each slot, and all that was written before.

    Args:
      slots: number of them.
      history: tokens of the ring, ends of texts included.
    """

    def __init__(self, slots: int, history: int):
        self.texts: list[list[int]] = [[] for _ in range(slots)]
        self.stream = [END] * history
        self.history = history

    def begin(self, slot: int) -> None:
        """What the slot's text has become is written down."""
        if self.texts[slot]:
            self.stream += [*self.texts[slot], END]
        self.texts[slot] = []

    def extend(self, slot: int, tokens: Sequence[int]) -> None:
        self.texts[slot] += tokens

    @property
    def ring(self) -> list[int]:
        """Oldest first."""
        return self.stream[len(self.stream) - self.history :]


@dataclasses.dataclass(frozen=True)
class Match:
    """An earlier place where a text's end stood.

    Attributes:
      length: tokens.
      following: tokens after it, as many as were wanted and as there are.
    """

    length: int
    following: list[int]


def common_end(one: Sequence[int], other: Sequence[int]) -> int:
    """How many last tokens two texts share."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def find(
    corpora: Corpora, slot: int, tail: Sequence[int], guessed: int, depth: int
) -> list[Match]:
    """All matches of a tail, the best first.

    Args:
      corpora: what to search.
      slot: whose text comes first.
      tail: tokens.
      guessed: how many of them are guesses, which come after the text.
      depth: tokens wanted after a match.
    """
    text = corpora.texts[slot]
    going_on = [*text, *tail[len(tail) - guessed :]]
    found = []
    for last in range(len(text) - 1):
        length = common_end(text[: last + 1], tail)
        circle = itertools.cycle(going_on[last + 1 :])
        found.append((length, 1, last, list(itertools.islice(circle, depth))))
    ring = corpora.ring
    for last in range(len(ring)):
        after = itertools.takewhile(lambda token: token != END, ring[last + 1 :])
        length = common_end(ring[: last + 1], tail)
        found.append((length, 0, last, list(itertools.islice(after, depth))))
    found.sort(key=lambda match: match[:3], reverse=True)
    return [Match(length, after) for length, _, _, after in found if length]


def branches(found: Sequence[Match], path: Path) -> tuple[dict[int, float], int]:
    """Shares of the tokens after a path, and the length of its longest match."""
    depth = len(path)
    agreeing = [
        match
        for match in found
        if tuple(match.following[:depth]) == path and len(match.following) > depth
    ]
    if not agreeing:
        return {}, 0
    longest = max(match.length for match in agreeing)
    weights: dict[int, float] = {}
    for match in agreeing:
        token = match.following[depth]
        weight = matches.GAIN ** (match.length - longest)
        weights[token] = weights.get(token, 0.0) + weight
    total = sum(weights.values())
    return {t: weight / total for t, weight in weights.items()}, longest + depth


class Worth:
    """Hits and tries by cell.

    Args:
      prior: rate of each cell at first.
    """

    def __init__(self, prior: Sequence[float]):
        self.hits = [rates.PRIOR * p for p in prior]
        self.tries = [rates.PRIOR for _ in prior]

    def log(self, cell: int) -> float:
        return math.log(self.hits[cell] / self.tries[cell])

    def add(self, observations: Sequence[tuple[int, bool]]) -> None:
        """Cells, and whether their guesses were right; takes them in at once."""
        for cell, hit in observations:
            self.tries[cell] += 1
            self.hits[cell] += hit
        for cell, tries in enumerate(self.tries):
            if tries > rates.MEMORY:
                self.hits[cell] *= rates.MEMORY / tries
                self.tries[cell] = rates.MEMORY


def cell_of(length: int) -> int:
    """Of a match."""
    return max(i for i, least in enumerate(matches.LENGTHS) if length >= least)


class LookupDrafter:
    """The methods "ngram" and "suffix".

    Args:
      slots: number of them.
      longest: tokens of a match at most.
      history: tokens of other requests.
      count: matches that are followed.
    """

    def __init__(self, slots: int, longest: int, history: int, count: int):
        self.corpora = Corpora(slots, history)
        self.worth = Worth(matches.PRIOR)
        self.found: list[list[Match]] = [[] for _ in range(slots)]
        self._longest, self._count = longest, count

    def look(self, slot: int, depth: int) -> None:
        """Before a tree is proposed."""
        tail = self.corpora.texts[slot][-self._longest :]
        found = find(self.corpora, slot, tail, 0, depth)
        self.found[slot] = found[: self._count]

    def children(self, slot: int, path: Path) -> dict[int, float]:
        """Log probabilities of the tokens after a path, the noise not known."""
        shares, length = branches(self.found[slot], path)
        return {
            token: math.log(share) + self.worth.log(cell_of(length))
            for token, share in shares.items()
        }

    def observe(self, emitted: dict[int, list[int]]) -> None:
        """Tokens of a step by slot."""
        for depth in range(max(map(len, emitted.values()), default=0)):
            observations = []
            for slot, tokens in emitted.items():
                if depth < len(tokens):
                    shares, length = branches(self.found[slot], tuple(tokens[:depth]))
                    if length:
                        observations.append((cell_of(length), tokens[depth] in shares))
            self.worth.add(observations)


def lean(logs: dict[int, float], noise: np.ndarray, tau: float) -> dict[int, float]:
    """Log probabilities once the noise [V] of the position is known.

    What the guesses leave over competes as one more token, of the noise's mean.
    """
    rest = math.log(max(1.0 - sum(map(math.exp, logs.values())), REST)) + EULER
    scores = {token: (log + noise[token]) / tau for token, log in logs.items()}
    total = np.logaddexp.reduce([*scores.values(), rest / tau])
    return {token: score - total for token, score in scores.items()}


Children = Callable[[Path], dict[int, float]]


def check(tree, slot: int, shape, children: Children) -> None:
    """Asserts that a tree of NumPy arrays is the one that estimates lead to.

    Args:
      tree: `TokenTree`.
      slot: which of its trees.
      shape: that was asked for.
      children: log probabilities of the tokens after a path.
    """
    paths: list[Path | None] = [()]
    for node in range(1, tree.tokens.shape[1]):
        parent = int(tree.parents[slot, node])
        assert parent < node
        if tree.valid[slot, node]:
            assert paths[parent] is not None, "a node below one that does not exist"
            paths.append((*paths[parent], int(tree.tokens[slot, node])))
            estimate = children(paths[parent])[paths[-1][-1]]
            assert abs(tree.draft_logprob[slot, node] - estimate) < TIE
        else:
            paths.append(None)
    real = [path for path in paths[1:] if path is not None]
    assert len(set(real)) == len(real), "siblings of one token"
    if isinstance(shape, StaticShape):
        _check_static(tree.parents[slot], paths, children)
    else:
        _check_best_first(shape, real, children)


def _check_static(parents, paths, children: Children) -> None:
    """The best children of every node, best first."""
    for node, path in enumerate(paths):
        family = [n for n in range(1, len(paths)) if parents[n] == node]
        if not family or path is None:
            continue
        estimates = children(path)
        best = sorted(estimates.values(), reverse=True)[: len(family)]
        real = [paths[n][-1] for n in family if paths[n] is not None]
        assert len(real) == len(best), "children are missing"
        assert np.allclose([estimates[token] for token in real], best, atol=TIE, rtol=0)


def _check_best_first(shape: BestFirstShape, tree: list[Path], children: Children):
    """The best paths of those that the search can have seen."""
    # The order of siblings is that of their estimates.
    for path, later in itertools.combinations(tree, 2):
        if path[:-1] == later[:-1]:
            estimates = children(path[:-1])
            assert estimates[path[-1]] > estimates[later[-1]] - TIE

    def level(frontier: dict[Path, float]) -> dict[Path, float]:
        found = {}
        for path, log in frontier.items():
            more = children(path)
            assert len(more) <= shape.children, "the oracle looks at all children"
            found |= {(*path, token): log + m for token, m in more.items()}
        return found

    def leads_to_it(seen: dict[Path, float], above: dict[Path, float], depth: int):
        if depth == shape.depth:
            return _best(seen, shape.nodes, tree)
        for chosen in _choices(above, shape.width, tree):
            below = level({path: above[path] for path in chosen})
            if leads_to_it(seen | below, below, depth + 1):
                return True
        return False

    first = level({(): 0.0})
    assert leads_to_it(first, first, 1)


def _best(seen: dict[Path, float], nodes: int, tree: list[Path]) -> bool:
    """Whether a tree has the best paths of some."""
    worth = sorted(seen.values(), reverse=True)[:nodes]
    if len(tree) != len(worth) or not set(tree) <= set(seen):
        return False
    least = worth[-1] if worth else 0.0
    return all(
        (log > least - TIE) if path in tree else (log < least + TIE)
        for path, log in seen.items()
    )


def _choices(above: dict[Path, float], width: int, tree: list[Path]):
    """Ways to take the `width` best, whose ties are open; likely ones first."""
    if len(above) <= width:
        yield tuple(above)
        return
    least = sorted(above.values(), reverse=True)[width - 1]
    sure = [path for path, log in above.items() if log > least + TIE]
    parents = {path[:-1] for path in tree}
    tied = [path for path, log in above.items() if abs(log - least) <= TIE]
    tied.sort(key=lambda path: path not in parents)
    for more in itertools.combinations(tied, width - len(sure)):
        yield (*sure, *more)
