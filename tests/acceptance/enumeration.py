"""Exact distributions of sampling rules, by enumeration in float64; knows nothing of
the rules.

A toy world gives p and q after every short path. A generator lists every tree that a
drafter can draw, with its probability. A rule, written here as in the papers, adds up
the probability of every text of C + 1 tokens; what a step leaves open, plain decoding
fills in. A lossless rule gives p's own distribution whatever p, q and the generator
are.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

Path = tuple[int, ...]


class World:
    """p and q after every path of up to `depth` tokens.

    Args:
      depth: C.
      alpha: of the Dirichlet distributions; small ones are peaked.
      mix: share of p in q; 1 is a perfect drafter.
      seed: of the draw.
      vocab: V.
    """

    def __init__(self, depth, alpha=1.0, mix=0.0, seed=0, vocab=3):
        rng = np.random.default_rng(seed)
        self.depth, self.vocab = depth, vocab
        self.p: dict[Path, np.ndarray] = {}
        self.q: dict[Path, np.ndarray] = {}
        for length in range(depth + 1):
            for path in itertools.product(range(vocab), repeat=length):
                p, q = rng.dirichlet([alpha] * vocab, size=2)
                self.p[path], self.q[path] = p, mix * p + (1 - mix) * q

    def replace(self, p=None, q=None) -> World:
        """The same with functions of the old distributions in place of p or q."""
        world = copy.copy(self)
        # Worlds are shared between tests; what is done to this one stays in it.
        world.p, world.q = dict(self.p), dict(self.q)
        if p is not None:
            world.p = {path: p(own) for path, own in self.p.items()}
        if q is not None:
            world.q = {path: q(own) for path, own in self.q.items()}
        return world

    def probability(self, path: Path) -> float:
        """Of a text under p."""
        return math.prod(self.p[path[:i]][x] for i, x in enumerate(path))

    def distribution(self) -> np.ndarray:
        """Of the first C + 1 tokens under p."""
        distribution = np.zeros((self.vocab,) * (self.depth + 1))
        for path in np.ndindex(distribution.shape):
            distribution[path] = self.probability(path)
        return distribution

    def fill(self, distribution: np.ndarray, emitted: Path, probability: float) -> None:
        """Adds what a step emitted; plain decoding goes on behind it."""
        below = np.array(probability)
        for length in range(len(emitted), self.depth + 1):
            shape = (self.vocab,) * (length - len(emitted))
            rows = [self.p[(*emitted, *rest)] for rest in np.ndindex(shape)]
            below = below[..., None] * np.array(rows).reshape(*shape, self.vocab)
        distribution[emitted] += below


@dataclasses.dataclass
class Tree:
    """One drawn tree and its probability.

    Attributes:
      parents: of every node; that of the root is 0.
      paths: tokens from the root down to every node; None for a place left empty.
      shares: probability of each draw, given those before it.
      left: mass of q that the siblings before it left.
      before: mass of q, of what is left, on smaller tokens: the draw by inversion.
      probability: of the tree.
    """

    parents: list[int]
    paths: list[Path | None]
    shares: list[float]
    left: list[float]
    before: list[float]
    probability: float = 1.0

    @property
    def valid(self) -> list[bool]:
        return [path is not None for path in self.paths]

    def children(self, node: int) -> list[int]:
        return [
            n
            for n in range(1, len(self.parents))
            if self.parents[n] == node and self.paths[n] is not None
        ]

    def without(self, node: int) -> Tree:
        """Pruned: a sampled node and all below it are gone."""
        root = self.paths[node]
        paths = [
            None if path is not None and path[: len(root)] == root else path
            for path in self.paths
        ]
        return dataclasses.replace(self, paths=paths)

    def swapped(self, a: int, b: int) -> Tree:
        """Two leaves that are siblings change places."""
        order = list(range(len(self.paths)))
        order[a], order[b] = b, a
        return dataclasses.replace(self, paths=[self.paths[n] for n in order])


Wish = Callable[[Tree, list[int]], list[int]]


def draw(world: World, levels: Wish, depth: int, replacement=False) -> list[Tree]:
    """Every tree that can be drawn.

    Args:
      world: its q is drawn from.
      levels: parents of the nodes of the next level, given the tree so far and its
        newest level; ascending, -1 for places left empty.
      depth: C.
      replacement: siblings are drawn independently.
    """
    trees = [(Tree([0], [()], [1.0], [1.0], [0.0]), [0])]
    for _ in range(depth):
        grown = []
        for tree, level in trees:
            parents = levels(tree, level)
            first = len(tree.parents)
            fresh = list(range(first, first + len(parents)))
            partial = [tree]
            for parent in parents:
                partial = [
                    t for old in partial for t in _born(world, old, parent, replacement)
                ]
            grown += [(t, fresh) for t in partial]
        trees = grown
    return [tree for tree, _ in trees]


def _born(world, tree: Tree, parent: int, replacement) -> Iterator[Tree]:
    """The tree with one more child of `parent`."""
    path = tree.paths[parent] if parent >= 0 else None
    q = np.zeros(0) if path is None else world.q[path].copy()
    if path is not None and not replacement:
        for sibling in tree.children(parent):
            q[tree.paths[sibling][-1]] = 0.0
    mass = q.sum()

    def grown(path, share, before):
        return Tree(
            [*tree.parents, max(parent, 0)],
            [*tree.paths, path],
            [*tree.shares, share],
            [*tree.left, mass],
            [*tree.before, before],
            tree.probability * share,
        )

    if mass == 0:
        yield grown(None, 1.0, 0.0)
        return
    for token in np.flatnonzero(q):
        before = float(q[:token].sum() / mass)
        yield grown((*path, int(token)), float(q[token] / mass), before)


def static(parents: tuple[int, ...]) -> Wish:
    """A fixed topology in level order; parents[0] is -1."""

    def levels(tree, level):
        return [p for p in parents[1:] if p in level]

    return levels


def text_distribution(world: World, trees, rule, **mutation) -> np.ndarray:
    """Distribution of the first C + 1 tokens under a rule, over all trees."""
    distribution = np.zeros((world.vocab,) * (world.depth + 1))
    for tree in trees:
        for emitted, probability in rule(world, tree, **mutation).items():
            if probability > 0:
                world.fill(distribution, emitted, tree.probability * probability)
    return distribution


def _norm(x: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    return x / x.sum() if x.sum() > 0 else otherwise


def token(world: World, tree: Tree, replacement=False, update=True):
    """Emitted tokens and their probability under the token rule."""
    out: dict[Path, float] = {}
    at, alive = 0, 1.0

    def visit(at, alive):
        path = tree.paths[at]
        P = world.p[path]
        Q = world.q[path].copy() if path in world.q else None
        for child in tree.children(at):
            x = tree.paths[child][-1]
            accept = min(1.0, P[x] / Q[x])
            visit(child, alive * accept)
            alive *= 1 - accept
            P = _norm(np.maximum(P - Q, 0), P)
            if update and not replacement:
                Q[x] = 0
                Q = _norm(Q, Q)
        for y in range(world.vocab):
            emitted = (*path, y)
            out[emitted] = out.get(emitted, 0.0) + alive * P[y]

    visit(at, alive)
    return out


def traversal(world: World, tree: Tree, update=True):
    """Emitted tokens and their probability under the traversal rule."""
    out: dict[Path, float] = {}

    def visit(at, a, alive):
        """Probability that the node's whole family is rejected."""
        path = tree.paths[at]
        P = world.p[path]
        Q = world.q[path].copy()
        for child in tree.children(at):
            x = tree.paths[child][-1]
            w = min(1.0, a * P[x] / Q[x]) if Q[x] > 0 else 0.0
            alive = visit(child, w, alive)
            rest = np.maximum(a * P - Q, 0)
            S = rest.sum()
            P = _norm(rest, P)
            a = S / (S + 1 - a) if S + 1 - a > 0 else 1.0
            if update:
                Q[x] = 0
                Q = _norm(Q, Q)
        accept = 1.0 if at == 0 else a
        for y in range(world.vocab):
            emitted = (*path, y)
            out[emitted] = out.get(emitted, 0.0) + alive * accept * P[y]
        return alive * (1 - accept)

    visit(0, 1.0, 1.0)
    return out


def block(world: World, tree: Tree, stop=False, product=False):
    """Emitted tokens and their probability under the block rule.

    `stop` leaves the loop at the first failure, `product` multiplies the uniforms.
    """
    path, w, h = (), [1.0], [1.0]
    nodes = [n for n, ok in enumerate(tree.valid) if ok]
    c = len(nodes) - 1
    for i in range(1, c + 1):
        path = tree.paths[nodes[i]]
        p, q = world.p[path[:-1]][path[-1]], world.q[path[:-1]][path[-1]]
        w.append(min(1.0, w[-1] * p / q))
        if i < c:
            S = np.maximum(w[i] * world.p[path] - world.q[path], 0).sum()
            h.append(S / (S + 1 - w[i]) if S + 1 - w[i] > 0 else 1.0)
        else:
            h.append(w[i])
    out: dict[Path, float] = {}
    for k, probability in enumerate(_last_success(h[1:], stop, product)):
        P = world.p[path[:k]]
        if k < c:
            P = _norm(np.maximum(w[k] * P - world.q[path[:k]], 0), P)
        for y in range(world.vocab):
            out[(*path[:k], y)] = probability * P[y]
    return out


def _last_success(h, stop, product) -> list[float]:
    """Probability that test k = 0, 1, … is the last to pass."""
    c = len(h)
    if stop:
        return [math.prod(h[:k]) * (1 - h[k] if k < c else 1) for k in range(c + 1)]
    if product:
        grid = np.array(list(itertools.product((np.arange(60) + 0.5) / 60, repeat=c)))
        passed = np.cumprod(grid, axis=1) <= np.array(h)
        last = np.max(np.where(passed, np.arange(1, c + 1), 0), axis=1)
        return [float((last == k).mean()) for k in range(c + 1)]
    return [
        (h[k - 1] if k else 1.0) * math.prod(1 - x for x in h[k:]) for k in range(c + 1)
    ]


def follow(world: World, tree: Tree):
    """Samples x from p at each node and follows the child that carries it."""
    out: dict[Path, float] = {}
    paths = {path for path in tree.paths if path is not None}

    def visit(path, alive):
        for y in range(world.vocab):
            probability = alive * world.p[path][y]
            if (*path, y) in paths:
                visit((*path, y), probability)
            else:
                out[(*path, y)] = probability

    visit((), 1.0)
    return out


def typical(world: World, tree: Tree, eps=0.09, delta=0.3):
    """Emitted tokens and their probability under typical acceptance."""

    def passes(path):
        p = world.p[path[:-1]]
        some = p[p > 0]
        entropy = -(some * np.log(some)).sum()
        return p[path[-1]] > min(eps, delta * math.exp(-entropy))

    best = (0, 0.0, ())
    for path in tree.paths:
        if path and all(passes(path[: i + 1]) for i in range(len(path))):
            best = max(best, (len(path), math.log(world.probability(path)), path))
    path = best[2]
    return {(*path, y): world.p[path][y] for y in range(world.vocab)}


def accepted(out: dict[Path, float]) -> float:
    """Expected number of accepted tokens."""
    return sum(probability * (len(emitted) - 1) for emitted, probability in out.items())


@functools.cache
def worlds(depth: int) -> tuple[World, ...]:
    """Three kinds of p, four of q."""
    return tuple(
        World(depth, alpha, mix, seed=10 * i + j)
        for i, alpha in enumerate((0.3, 1.0, 3.0))
        for j, mix in enumerate((0.0, 0.3, 0.6, 0.9))
    )
