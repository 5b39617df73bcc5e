"""Best-first trees: all children seen are candidates, the tree is the best of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from treespec_jax.branches import branch
from treespec_jax.drafting.children import breadth
from treespec_jax.drafting.levels import family_profile, gain_of_level, pays
from treespec_jax.drafting.protocol import DraftContext, Level
from treespec_jax.sampling.select import ascending, top_k_rows
from treespec_jax.trees.shapes import BestFirstShape
from treespec_jax.trees.token_tree import TokenTree, ancestors_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Candidates:
    """All children seen at one depth, each [B, n].

    `parents` number candidates over all depths (-1 is the root); `slots` say which
    expanded node of the level above a child came from. `source` may be None.
    """

    tokens: jax.Array
    log_prob: jax.Array
    path: jax.Array
    parents: jax.Array
    slots: jax.Array
    source: jax.Array | None

    @property
    def count(self) -> int:
        return self.tokens.shape[1]

    def likeliest(self, limit: int | None) -> _Candidates:
        """The `limit` of them with the likeliest paths, in the same order."""
        if limit is None or limit >= self.count:
            return self
        chosen_BN = ascending(top_k_rows(self.path, limit)[1])
        return jax.tree.map(
            functools.partial(jnp.take_along_axis, indices=chosen_BN, axis=1), self
        )


def grow_best_first(
    context: DraftContext, shape: BestFirstShape, root_B, scores, expand, children
):
    """Best-first within a beam of `width` expanded nodes per level.

    All children seen are candidates; the tree is the best of them by the probability
    of their paths. A path is never likelier than its parent's and is numbered after
    it, so that the best ones always form a tree.
    """
    if children.keeps_q:
        raise ValueError("a best-first tree drops nodes, which no proposal of q allows")
    B = root_B.shape[0]
    frontier_BW = jnp.full((B, 1), -1, jnp.int32)
    path_BW = jnp.zeros((B, 1), jnp.float32)
    count = min(shape.root_children, breadth(scores))
    first_level = _candidates(children, scores, 0, count, frontier_BW, path_BW)
    levels, profile_BX = [first_level.likeliest(shape.level)], None
    if shape.priced:
        profile_BX = _profile(shape, path_BW, first_level)
    mask_BWU = scratch = None
    # Nodes expanded before a level, and before the one above it; the root is one.
    expanded = before = 1
    for depth in range(1, shape.depth):
        above = levels[-1]
        first = sum(level.count for level in levels[:-1])
        width = min(shape.width, above.count)
        path_BW, chosen_BW = top_k_rows(above.path, width)
        going_on = None
        if shape.threshold:
            worth_BW = path_BW >= math.log(shape.threshold)
            path_BW = jnp.where(worth_BW, path_BW, -jnp.inf)
            going_on = jnp.any(worth_BW & context.active[:, None])
        if shape.priced:
            going_on = _pays(context, shape, levels, (path_BW, profile_BX))
        slot_BW = jnp.take_along_axis(above.slots, chosen_BW, axis=1)
        mask_BWU = extend_mask(mask_BWU, slot_BW)
        level = Level(
            jnp.take_along_axis(above.tokens, chosen_BW, axis=1),
            slot_BW + (0 if depth == 1 else before),
            depth,
            mask_BWU,
        )
        before, expanded = expanded, expanded + width

        def go_on(
            level=level, scratch=scratch, path_BW=path_BW, frontier_BW=chosen_BW + first
        ):
            scores, scratch = expand(level, scratch)
            count = min(shape.children, breadth(scores))
            below = _candidates(
                children, scores, level.depth, count, frontier_BW, path_BW
            )
            profile_BX = _profile(shape, path_BW, below) if shape.priced else None
            return below.likeliest(shape.level), profile_BX, scratch

        if context.sampling.known.straight:
            # All levels run, where a conditional would cost more than they do.
            going_on = None
        below, profile_BX, scratch = _level_if(going_on, go_on)
        levels.append(below)
    return _select(shape, root_B, levels)


def _profile(shape: BestFirstShape, parent_BW, below: _Candidates):
    """How sure children are, rank by rank, see `levels.family_profile`."""
    path_BWX = jnp.exp(below.path).reshape(*parent_BW.shape, -1)
    # The root has more children than other nodes are asked for.
    return family_profile(jnp.exp(parent_BW), path_BWX[:, :, : shape.children])


def _pays(context, shape: BestFirstShape, levels: list[_Candidates], frontier):
    """bool []: whether a level pays that expands a frontier.

    Args:
      context: whose active slots count.
      shape: of the tree.
      levels: seen so far.
      frontier: log probabilities of the paths [B, W], and the profile [B, X] of the
        families of the last level.
    """
    path_BW, profile_BX = frontier
    seen_BN = jnp.exp(jnp.concatenate([level.path for level in levels], axis=1))
    gain_B = gain_of_level(seen_BN, jnp.exp(path_BW), profile_BX, shape.nodes)
    return pays(gain_B, context.active, context.level_price)


def _level_if(going_on, go_on: Callable[[], tuple[_Candidates, Any, Any]]):
    """`go_on()`, or a level without a candidate, in no time, where nobody goes on.

    Args:
      going_on: bool []; None: somebody does.
      go_on: returns the candidates of a level, their profile and the scratch after it.
    """
    if going_on is None:
        return go_on()

    def stop():
        shapes = jax.eval_shape(go_on)
        empty, *rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        never = jnp.full_like(empty.path, -jnp.inf)
        return dataclasses.replace(empty, path=never, log_prob=never), *rest

    return branch(going_on, go_on, stop)


def extend_mask(mask_BWU, slot_BW):
    """The mask of a level: a node sees what the expanded node `slot` sees, and itself.

    Args:
      mask_BWU: bool [B, W', E], of the level above; None if that is the root.
      slot_BW: int32 [B, W], number of the parent among the nodes of that level.
    """
    B, W = slot_BW.shape
    itself = jnp.broadcast_to(jnp.eye(W, dtype=bool), (B, W, W))
    if mask_BWU is None:
        return itself
    seen = jnp.take_along_axis(mask_BWU, slot_BW[:, :, None], axis=1)
    return jnp.concatenate([seen, itself], axis=2)


def _candidates(children, scores, depth, count, frontier_BW, path_BW):
    B, W = frontier_BW.shape
    # Nobody samples here, so that no uniforms are named.
    number = jnp.zeros((B, W, count), jnp.int32)
    family = children.propose(scores, depth, number)
    # Nothing is below a path that is not gone on with.
    log_BWJ = jnp.where(path_BW[:, :, None] > -jnp.inf, family.log_prob, -jnp.inf)
    slot_WJ = jnp.arange(W, dtype=jnp.int32)[:, None]
    return _Candidates(
        tokens=family.tokens.reshape(B, -1),
        log_prob=log_BWJ.reshape(B, -1),
        path=(path_BW[:, :, None] + log_BWJ).reshape(B, -1),
        parents=jnp.repeat(frontier_BW, count, axis=1),
        slots=jnp.broadcast_to(slot_WJ, (B, W, count)).reshape(B, -1),
        source=None if family.source is None else family.source.reshape(B, -1),
    )


def _select(shape: BestFirstShape, root_B, levels: list[_Candidates]) -> TokenTree:
    """The tree of the `nodes` candidates with the likeliest paths."""

    def joined(name):
        return jnp.concatenate([getattr(level, name) for level in levels], axis=1)

    path = joined("path")
    B, seen = path.shape
    nodes = min(shape.nodes, seen)
    _, best_BN = top_k_rows(path, nodes)
    chosen_BN = ascending(best_BN)
    # Node number of every candidate; those that were not chosen are never asked.
    number = jnp.zeros((B, seen), jnp.int32)
    number = number.at[jnp.arange(B)[:, None], chosen_BN].set(jnp.arange(1, nodes + 1))

    def nodes_of(root_B1, x, fill):
        x = jnp.take_along_axis(x, chosen_BN, axis=1)
        x = jnp.concatenate([root_B1, x], axis=1)
        # A tiny vocabulary may not fill the tree.
        return jnp.pad(x, ((0, 0), (0, shape.nodes - nodes)), constant_values=fill)

    parents = joined("parents")
    parent_node = jnp.take_along_axis(number, jnp.maximum(parents, 0), axis=1)
    parent_node = jnp.where(parents < 0, 0, parent_node)
    zero_B1 = jnp.zeros((B, 1), jnp.int32)
    parents_BT = nodes_of(zero_B1, parent_node, 0)
    ancestors = ancestors_of(parents_BT, shape.depth)
    has_source = levels[0].source is not None
    return TokenTree(
        tokens=nodes_of(root_B[:, None], joined("tokens"), 0),
        parents=parents_BT,
        depth=jnp.sum(ancestors, axis=2, dtype=jnp.int32) - 1,
        ancestors=ancestors,
        valid=nodes_of(zero_B1 * 0.0, path, -jnp.inf) > -jnp.inf,
        draft_logprob=nodes_of(zero_B1 * 0.0, joined("log_prob"), -jnp.inf),
        source=nodes_of(zero_B1, joined("source"), 0) if has_source else None,
    )
