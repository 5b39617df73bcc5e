"""How many tokens a step of each shape brings, request by request; free of jax.

A step tells of more shapes than the one that ran. Its tree's nodes are ordered by the
estimated probability of their paths, so that a smaller best-first tree would have been
the first of them: where each accepted node stands in that order says how far each
smaller shape would have come. What a larger one brings beyond is estimated from steps
that showed both.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from treespec_jax.trees.shapes import BestFirstShape, TreeShape
from treespec_jax.trees.token_tree import TokenTree

# Steps that a running mean remembers: of a request, of all, and of pairs of shapes.
MEMORY, LONG_MEMORY = 16, 256
# Steps that the mean of all counts for in a new request's, at least and at most: the
# more alike the first steps of so many requests are, the more.
CARRIED, CARRIED_AT_MOST, FIRST, REQUESTS = 2, 8, 8, 8
# Steps that a guess made beforehand counts for.
PRIOR = 4
# Children of the root that are rehearsed where no more levels are.
REHEARSED = 3
# Accepted nodes that doubling a tree adds, until steps show it: of drafters with a
# model, and without.
GAIN_OF_MODEL, GAIN = 0.4, 0.25


def observed_shapes(
    shapes: Sequence[TreeShape], with_model: bool
) -> tuple[TreeShape, ...]:
    """The shapes to choose from, and last the one that is rehearsed.

    That is the first, or one level of it if every level takes a pass of a model.
    """
    first = shapes[0]
    if with_model and first.depth > 1:
        first = BestFirstShape(REHEARSED, 1, 1, REHEARSED)
    return (*shapes, first)


def contained(shapes: Sequence[TreeShape], shape: TreeShape) -> np.ndarray:
    """bool [K]: shapes whose nodes are the first ones of that shape's."""
    return np.array(
        [s.num_nodes <= shape.num_nodes and s.depth <= shape.depth for s in shapes]
    )


def tokens_by_shape(
    shapes: Sequence[TreeShape], counts: np.ndarray, orders: np.ndarray
) -> np.ndarray:
    """float [..., K]: tokens that a step of each shape would have emitted.

    Right for the shapes that are `contained` in the one that ran.

    Args:
      shapes: K.
      counts: int [...], tokens that the step emitted; 0 of an idle slot.
      orders: int [..., C], see `engine.state.Emission`.
    """
    if not orders.shape[-1]:
        # Of plain steps, which are short.
        return np.ones((*counts.shape, len(shapes)))
    depth_C = np.arange(1, orders.shape[-1] + 1)
    accepted = depth_C < counts[..., None]
    reached = [
        np.sum(accepted & (orders < s.num_nodes) & (depth_C <= s.depth), axis=-1)
        for s in shapes
    ]
    return 1.0 + np.stack(reached, axis=-1)


def rehearsed_tokens(
    shapes: Sequence[TreeShape], tree: TokenTree, emitted: np.ndarray, count: np.ndarray
) -> np.ndarray:
    """float [B, K]: tokens that steps would have emitted, had they grown that tree.

    Where the emitted tokens end within the tree, its own estimates go on.

    Args:
      shapes: K.
      tree: grown before the tokens, of NumPy arrays.
      emitted: int [B, S], after the roots, in order.
      count: int [B], how many of them are real.
    """
    last = emitted.shape[1] - 1
    said_BT = np.take_along_axis(emitted, np.clip(tree.depth - 1, 0, last), axis=1)
    came_BT = (tree.tokens == said_BT) & tree.valid & (tree.depth <= count[:, None])
    came_BT |= tree.depth == 0
    accepted_BT = ~np.any(tree.ancestors & ~came_BT[:, None], axis=2)
    nodes_K11 = np.array([shape.num_nodes for shape in shapes])[:, None, None]
    depth_K11 = np.array([shape.depth for shape in shapes])[:, None, None]
    inside_KBT = (order_of(tree) < nodes_K11) & (tree.depth <= depth_K11)
    depth_KBT = np.where(accepted_BT & inside_KBT, tree.depth, 0)
    deepest_KB = np.argmax(depth_KBT, axis=2)
    accepted_KB = np.max(depth_KBT, axis=2)
    ends_KB = accepted_KB == count
    if not ends_KB.any():
        return 1.0 + accepted_KB.T
    # The nodes below the deepest accepted one, by their paths from there.
    text_1B = np.arange(len(count))[None]
    above_KBT = tree.ancestors[text_1B, deepest_KB]
    below_KBT = tree.ancestors.transpose(0, 2, 1)[text_1B, deepest_KB]
    below_KBT = below_KBT & inside_KBT & tree.valid & ~accepted_BT & ends_KB[..., None]
    path_KBTT = tree.ancestors & ~above_KBT[:, :, None]
    log_KBT = np.where(path_KBTT, tree.draft_logprob[:, None], 0.0).sum(axis=3)
    rest_KBT = np.exp(log_KBT, where=below_KBT, out=np.zeros(log_KBT.shape))
    return 1.0 + (accepted_KB + np.sum(rest_KBT, axis=2)).T


def order_of(tree: TokenTree) -> np.ndarray:
    """int [B, T]: nodes that stand before each one by the probability of its path."""
    log_BT = np.where(tree.valid, tree.draft_logprob, -np.inf)
    path_BT = np.where(tree.ancestors, log_BT[:, None], 0.0).sum(axis=2)
    # Parents stand before their children, and equal paths in the order of the tree.
    best_BT = np.argsort(-path_BT, axis=1, kind="stable")
    order_BT = np.empty_like(best_BT)
    np.put_along_axis(order_BT, best_BT, np.arange(path_BT.shape[1])[None], axis=1)
    return order_BT


@dataclasses.dataclass
class _Means:
    """Running means of accepted nodes.

    Attributes:
      values: float [K].
      weight: steps that they stand for.
      first: sum of the first steps' accepted nodes, of the first shape, and how many.
    """

    values: np.ndarray
    weight: float
    first: tuple[float, float] = (0.0, 0.0)

    def add(self, values: np.ndarray, steps: float, memory: float) -> None:
        self.weight = min(self.weight + steps, memory)
        self.values += min(1.0, steps / self.weight) * (values - self.values)


class Expectation:
    """Learns what each shape brings, and says what the next step should bring.

    Args:
      shapes: K, trees and perhaps the root alone.
      gain: see `GAIN`.
    """

    def __init__(self, shapes: Sequence[TreeShape], gain: float):
        self._shapes = tuple(shapes)
        sizes = np.array([s.num_nodes for s in shapes])
        depths = np.array([s.depth for s in shapes])
        self._prior = np.minimum(gain * np.log2(sizes), depths)
        self._contained = {s: contained(shapes, s) for s in shapes}
        self.reset()

    def reset(self) -> None:
        """Forgets all texts."""
        self._all = _Means(self._prior.copy(), PRIOR)
        self._requests: weakref.WeakKeyDictionary[Any, _Means] = (
            weakref.WeakKeyDictionary()
        )
        # Squared differences of requests from the mean of all, over the variance that
        # so few steps have anyway.
        self._spread = 1 + FIRST / CARRIED
        count = len(self._shapes)
        # [k, s]: accepted nodes of shape k in steps that showed both k and s.
        self._together = np.tile(PRIOR * self._prior[:, None], (1, count))

    def is_new(self, request: Any) -> bool:
        """Whether no step of it was taken in."""
        return not self._of(request).first[1]

    def tokens(self, request: Any) -> np.ndarray:
        """float [K]: expected tokens of a step for one request."""
        return 1.0 + self._of(request).values

    def low(self, request: Any) -> np.ndarray:
        """float [K]: the same, a standard error lower.

        That of a mean of geometric counts, which numbers of accepted nodes resemble.
        """
        means = self._of(request)
        mean = np.maximum(means.values, 0.0)
        error = np.sqrt(mean * (1 + mean) / means.weight)
        return 1.0 + np.maximum(means.values - error, 0.0)

    def add(
        self, request: Any, shape: TreeShape, tokens: np.ndarray, steps: float
    ) -> None:
        """Takes in steps of one request.

        Args:
          request: any object that lives as long as its text.
          shape: whose tree was grown.
          tokens: float [K], means of `tokens_by_shape`.
          steps: of the mean.
        """
        if not steps or not shape.depth:
            return
        shown, accepted = self._contained[shape], tokens - 1.0
        self._together[np.ix_(shown, shown)] += steps * accepted[shown, None]
        self._together *= 1 - min(0.5, steps / LONG_MEMORY)
        self._together += min(0.5, steps / LONG_MEMORY) * PRIOR * self._prior[:, None]
        number = self._shapes.index(shape)
        beyond = self._together[:, number] / np.maximum(self._together[number], 1e-3)
        values = np.where(shown, accepted, accepted[number] * beyond)
        values = np.minimum(values, [s.depth for s in self._shapes])
        means = self._of(request)
        means.add(values, steps, MEMORY)
        if means.first[1] < FIRST:
            total, count = means.first
            means.first = total + steps * values[0], count + steps
            if means.first[1] >= FIRST:
                self._compare(*means.first)
        self._all.add(values, steps, LONG_MEMORY)

    def _compare(self, total: float, count: float) -> None:
        """Takes in how far the first steps of a request were from the mean of all."""
        mean = max(self._all.values[0], 0.05)
        variance = mean * (1 + mean) / count
        spread = (total / count - mean) ** 2 / variance
        self._spread += (min(spread, 1 + FIRST) - self._spread) / REQUESTS

    def _of(self, request: Any) -> _Means:
        if request not in self._requests:
            alike = FIRST / max(self._spread - 1, 1e-3)
            carried = min(max(alike, CARRIED), CARRIED_AT_MOST)
            self._requests[request] = _Means(self._all.values.copy(), carried)
        return self._requests[request]
