"""How many tokens a step of each shape brings, request by request; free of jax.

A text is as easy for a drafter as its *rate* says: the true token after a node is its
child of rank r with probability p (1 - p)^r, and a tree holds the best paths. What the
rate is, is a belief, a distribution over some rates: Bayes' rule takes in every step,
and meanwhile a text may turn into another one (a hidden Markov model's filter, Rabiner
1989). New texts begin with the mean of what all texts were like. Which tokens each rate
brings is the model's; how far drafters with several ranks and levels differ from it is
learnt, shape by shape.

A step tells of more than that its tree brought so many tokens. The tree's nodes are
ordered by the estimated probability of their paths, so that a smaller best-first tree
would have been the first of them: where each accepted node stands in that order says
how far each smaller shape would have come, and whether the best child was right.
"""

from __future__ import annotations

import functools
import heapq
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from treespec_jax.trees.shapes import BestFirstShape, TreeShape
from treespec_jax.trees.token_tree import TokenTree

# What a text may be like: the probability that a drafter's best child is right.
RATES = (0.0, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.88, 0.94, 0.98)
# Steps after which a text has turned into another one, on average.
TURNS = 64
# Steps that the mean of all texts remembers, and for which it counts beside the belief
# that nothing is known.
LONG_MEMORY, PRIOR = 256, 8
# Accepted nodes that the model counts for beside what a shape brought.
FEW = 3
# The probability that a text is harder than its low estimate.
CAUTION = 0.08
# What is not of the model: so much of a step's probability is for any outcome alike.
ODD = 0.02
# Children of the root that are rehearsed where no more levels are.
REHEARSED = 3


def observed_shapes(
    shapes: Sequence[TreeShape], with_model: bool
) -> tuple[TreeShape, ...]:
    """The shapes to choose from, the best child alone, and last what is rehearsed.

    That is the first, or one level of it if every level takes a pass of a model.
    """
    first = shapes[0]
    if with_model and first.depth > 1:
        first = BestFirstShape(REHEARSED, 1, 1, REHEARSED)
    return (*shapes, BestFirstShape(1, 1, 1, 1), first)


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


@functools.cache
def survival(shape: TreeShape, rate: float) -> np.ndarray:
    """float [2, C + 2]: P(the path accepted is at least d deep), by the model.

    Row 1 of paths that begin with the best child, row 0 of all others; the first column
    of row 0 is 1.
    """
    found = np.zeros((2, shape.depth + 2))
    heap = [(-rate, 0, 1, 1)] if shape.depth else []
    spare = shape.num_nodes - 1
    while heap and spare:
        minus, rank, depth, first = heapq.heappop(heap)
        found[first, depth] -= minus
        spare -= 1
        again = first if depth > 1 else 0
        heapq.heappush(heap, (minus * (1 - rate), rank + 1, depth, again))
        if depth < shape.depth:
            heapq.heappush(heap, (minus * rate, 0, depth + 1, first))
    return found


def tokens_of(shape: TreeShape, rate: float) -> float:
    """Tokens of a step, by the model."""
    return 1.0 + float(survival(shape, rate).sum())


def _likelihood(shape: TreeShape) -> np.ndarray:
    """float [R, 2, C + 1]: log P(best child right or not, accepted nodes), by RATES."""
    found = []
    for rate in RATES:
        reached = survival(shape, rate)
        exactly = reached[:, :-1] - reached[:, 1:]
        exactly[:, 0] = 0.0
        exactly[0, 0] = 1.0 - exactly.sum()
        found.append(exactly)
    possible = 2 * shape.depth or 1
    return np.log((1 - ODD) * np.maximum(found, 0.0) + ODD / possible)


class Expectation:
    """Learns what each shape brings, and says what the next step should bring.

    Args:
      shapes: K, as of `observed_shapes`.
      with_model: the drafter runs passes of a model. What it guesses is right more
        often.
    """

    def __init__(self, shapes: Sequence[TreeShape], with_model: bool):
        self.shapes = tuple(shapes)
        self._best = len(shapes) - 2
        rates = np.array(RATES)
        blank = np.where(rates > 0, 1.0 if with_model else 1.5 - rates, 0.0)
        self._blank_R = blank / blank.sum()
        self._model_RK = np.array(
            [[tokens_of(shape, rate) - 1.0 for shape in shapes] for rate in RATES]
        )
        self._depth_K = np.array([shape.depth for shape in shapes])
        self._contained = {s: contained(shapes, s) for s in shapes}
        self._logs = {shape: _likelihood(shape) for shape in shapes if shape.depth}
        self.reset()

    def reset(self) -> None:
        """Forgets all texts."""
        self._all_R, self._weight = self._blank_R.copy(), 0.0
        self._beliefs: weakref.WeakKeyDictionary[Any, np.ndarray] = (
            weakref.WeakKeyDictionary()
        )
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        # Accepted nodes by shape that the model expected, and that came.
        self._expected_K, self._came_K = np.zeros((2, len(self.shapes)))
        self._accepted_RK = self._model_RK

    def is_new(self, request: Any) -> bool:
        """Whether no step of it was taken in."""
        return request not in self._seen

    def tokens(self, request: Any) -> np.ndarray:
        """float [K]: expected tokens of a step for one request."""
        return 1.0 + self._of(request) @ self._accepted_RK

    def low(self, request: Any) -> np.ndarray:
        """float [K]: the same, if the text is as hard as it may well be."""
        belief_R = self._of(request)
        number = np.searchsorted(np.cumsum(belief_R), CAUTION)
        return 1.0 + np.minimum(self._accepted_RK[number], belief_R @ self._accepted_RK)

    def add(self, request: Any, shape: TreeShape, tokens: np.ndarray) -> None:
        """Takes in steps of one request.

        Args:
          request: any object that lives as long as its text.
          shape: whose tree was grown.
          tokens: float [N, K], of `tokens_by_shape`.
        """
        steps = len(tokens)
        if not steps:
            return
        stays = (1 - 1 / TURNS) ** steps
        before_R = stays * self._of(request) + (1 - stays) * self._prior_R()
        self._beliefs[request] = before_R
        if not shape.depth:
            # Plain steps tell nothing, but the text goes on.
            return
        number = self.shapes.index(shape)
        logs_R = self._told(shape, tokens[:, number], tokens[:, self._best])
        log_R = np.log(np.maximum(before_R, 1e-12)) + logs_R
        after_R = np.exp(log_R - log_R.max())
        after_R /= after_R.sum()
        self._learn(shape, after_R, tokens)
        self._weight = min(self._weight + steps, LONG_MEMORY)
        self._all_R += min(1.0, steps / self._weight) * (after_R - self._all_R)
        self._beliefs[request] = after_R
        self._seen.add(request)

    def _told(self, shape, tokens_N: np.ndarray, best_N: np.ndarray) -> np.ndarray:
        """float [R]: log-likelihood of steps; numbers between whole ones are shared."""
        logs_R2D = self._logs[shape]
        accepted_N = np.clip(tokens_N - 1.0, 0.0, shape.depth)
        low_N = np.floor(accepted_N).astype(int)
        part_N = accepted_N - low_N
        high_N = np.minimum(low_N + 1, shape.depth)
        first_N = (best_N > 1.5).astype(int)
        low_RN = logs_R2D[:, first_N * (low_N > 0), low_N]
        high_RN = logs_R2D[:, first_N, high_N]
        return np.sum((1 - part_N) * low_RN + part_N * high_RN, axis=1)

    def _learn(self, shape, belief_R: np.ndarray, tokens: np.ndarray) -> None:
        """Takes in how far a shape brings other tokens than the model says."""
        shown_K, steps = self._contained[shape], len(tokens)
        expected_K = steps * (belief_R @ self._model_RK)
        came_K = np.sum(tokens - 1.0, axis=0)
        stays = 1 - min(0.5, steps / LONG_MEMORY)
        for totals_K, new_K in (
            (self._expected_K, expected_K),
            (self._came_K, came_K),
        ):
            totals_K[shown_K] = stays * totals_K[shown_K] + new_K[shown_K]
        # What a shape did not show is as with all of them.
        ratio = (self._came_K.sum() + PRIOR) / (self._expected_K.sum() + PRIOR)
        ratio_K = (self._came_K + FEW * ratio) / (self._expected_K + FEW)
        self._accepted_RK = np.minimum(self._model_RK * ratio_K, self._depth_K)

    def _prior_R(self) -> np.ndarray:
        known = self._weight / (self._weight + PRIOR)
        return known * self._all_R + (1 - known) * self._blank_R

    def _of(self, request: Any) -> np.ndarray:
        if request not in self._beliefs:
            self._beliefs[request] = self._prior_R()
        return self._beliefs[request]
