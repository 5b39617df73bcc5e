"""Growing a token tree level by level inside a jit, whatever drafts.

A drafter supplies `expand`, which turns a level of nodes into logits, and a strategy
proposes the children of a node (`children`). This module decides where nodes go: one
function per structure of a tree.

* static: the topology is known beforehand;
* best first: all children seen are candidates, the tree is the best of them;
* allotted: levels of fixed sizes, shared out among the parents by the probability of
  their paths before their children are proposed. Where nodes go never depends on what
  they turn out to be, which rules that sample need.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treespec_jax.branches import branch
from treespec_jax.drafting.children import Children, Family, breadth, make
from treespec_jax.drafting.protocol import (
    DraftContext,
    Expand,
    Guesses,
    Level,
    Scores,
)
from treespec_jax.sampling.select import ascending, top_k_rows
from treespec_jax.trees.shapes import (
    AllottedShape,
    BestFirstShape,
    StaticShape,
    TreeShape,
)
from treespec_jax.trees.token_tree import (
    Proposal,
    TokenTree,
    ancestors_of,
    static_tree,
)

# Worth of a node's second child against its first, of its third against its second, …
# when a level of an allotted tree is shared out. Any value is lossless.
DECAY = 0.5


def grow(
    shape: TreeShape,
    context: DraftContext,
    root: Scores,
    expand: Expand,
    tau: float,
) -> TokenTree:
    """Grows a tree of the given shape.

    Logits get the penalties of the policy. Guesses do not: they are estimates of what
    the target takes, penalties included.

    Args:
      shape: a best-first one needs a proposal that keeps no q.
      context: root, sampling settings, randomness and proposal.
      root: the drafter's scores after the root.
      expand: runs one level of nodes through the drafter.
      tau: temperature of the estimated probability.
    """
    if context.penalties is not None and not isinstance(root, Guesses):
        root, expand = _penalised(context.penalties, root, expand)
    growers = {
        StaticShape: _grow_static,
        BestFirstShape: functools.partial(_grow_best_first, context),
        AllottedShape: _grow_allotted,
    }
    with jax.named_scope("grow"):
        children = make(context, tau)
        return growers[type(shape)](shape, context.root, root, expand, children)


def _penalised(penalties, root_logits_VB, expand: Expand):
    """Both under the penalties of the policy, each node by its own path."""
    B = root_logits_VB.shape[1]
    nobody = jnp.zeros((B, 0), jnp.int32)
    nowhere = jnp.zeros((B, 1, 0), bool)
    root_logits_VB = penalties.apply_to_draft(root_logits_VB, nobody, nowhere)

    def expand_and_penalise(level: Level, scratch):
        # All nodes of a path were expanded: the mask marks just these.
        tokens_BE, inner = (nobody, None) if scratch is None else scratch
        logits_VR, inner = expand(level, inner)
        tokens_BU = jnp.concatenate([tokens_BE, level.tokens], axis=1)
        logits_VR = penalties.apply_to_draft(logits_VR, tokens_BU, level.mask)
        return logits_VR, (tokens_BU, inner)

    return root_logits_VB, expand_and_penalise


class _Collected:
    """Collects a tree's sources and what becomes of its `Proposal`, by levels."""

    def __init__(self, children: Children, batch: int):
        self._children = children
        self._log_q, self._remaining = [], [jnp.ones((batch, 1))]
        self._source = [jnp.zeros((batch, 1), jnp.int32)]

    def add(self, family: Family, choose) -> None:
        """`choose` takes the children [B, J] that became nodes out of [B, W, X]."""
        if self._children.keeps_q:
            self._log_q.append(family.log_q)
            self._remaining.append(choose(family.remaining))
        if family.source is not None:
            self._source.append(choose(family.source))

    def source(self) -> jax.Array | None:
        return jnp.concatenate(self._source, axis=1) if self._source[1:] else None

    def proposal(self, nodes, level_sizes, max_children) -> Proposal | None:
        if not self._log_q:
            return None
        return Proposal(
            log_q=jnp.concatenate(self._log_q, axis=2),
            remaining=jnp.concatenate(self._remaining, axis=1),
            nodes=tuple(int(node) for node in nodes),
            level_sizes=tuple(level_sizes),
            max_children=tuple(max_children),
            replacement=self._children.replacement,
        )


def _grow_static(shape: StaticShape, root_B, scores, expand, children):
    topology = shape.topology
    B = root_B.shape[0]
    tokens = [root_B[:, None]]
    log_prob = [jnp.zeros((B, 1), jnp.float32)]
    collected = _Collected(children, B)
    inner, max_children, scratch = [], [], None
    for depth in range(topology.depth):
        parents = topology.inner(depth)
        column = parents - topology.level(depth)[0]
        if depth > 0:
            rows = np.concatenate([*inner[1:], parents])
            mask = topology.ancestors[np.ix_(parents, rows)]
            # Nodes with children are expanded in order, the root first.
            expanded = np.concatenate(inner)
            above = np.searchsorted(expanded, np.asarray(topology.parents)[parents])
            level = Level(
                tokens[depth][:, column],
                jnp.broadcast_to(above.astype(np.int32), (B, len(above))),
                depth,
                jnp.broadcast_to(mask, (B, *mask.shape)),
            )
            scores, scratch = expand(level, scratch)
        inner.append(parents)
        below = topology.level(depth + 1)
        slot = np.searchsorted(parents, np.asarray(topology.parents)[below])
        rank = topology.ranks[below]
        max_children.append(int(rank.max()) + 1)
        # A child that no node takes is proposed too, by the uniforms of another node:
        # it comes after all that are taken, and is looked at by nobody.
        number = np.full((len(parents), max_children[-1]), below[0])
        number[slot, rank] = below
        number = jnp.broadcast_to(jnp.asarray(number), (B, *number.shape))
        family = children.propose(scores, depth, number)

        def choose(x_BWX, slot=slot, rank=rank):
            return x_BWX[:, slot, rank]

        collected.add(family, choose)
        # Nothing is below a node that does not exist.
        exists_BJ = log_prob[depth][:, column][:, slot] > -jnp.inf
        log_BJ = jnp.where(exists_BJ, choose(family.log_prob), -jnp.inf)
        tokens.append(choose(family.tokens))
        log_prob.append(log_BJ)
    sizes = [len(topology.level(d)) for d in range(topology.depth + 1)]
    nodes = np.concatenate(inner) if inner else ()
    return static_tree(
        topology,
        jnp.concatenate(tokens, axis=1),
        jnp.concatenate(log_prob, axis=1),
        source=collected.source(),
        proposal=collected.proposal(nodes, sizes, max_children),
    )


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


def _grow_best_first(
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
    levels = [first_level.likeliest(shape.level)]
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
        slot_BW = jnp.take_along_axis(above.slots, chosen_BW, axis=1)
        mask_BWU = _extend_mask(mask_BWU, slot_BW)
        level = Level(
            jnp.take_along_axis(above.tokens, chosen_BW, axis=1),
            slot_BW + (0 if depth == 1 else before),
            depth,
            mask_BWU,
        )
        before, expanded = expanded, expanded + width

        def go_on(level=level, scratch=scratch, frontier=(chosen_BW + first, path_BW)):
            scores, scratch = expand(level, scratch)
            count = min(shape.children, breadth(scores))
            below = _candidates(children, scores, level.depth, count, *frontier)
            return below.likeliest(shape.level), scratch

        if context.sampling.known.straight:
            # All levels run, where a conditional would cost more than they do.
            going_on = None
        below, scratch = _level_if(going_on, go_on)
        levels.append(below)
    return _select(shape, root_B, levels)


def _level_if(going_on, go_on: Callable[[], tuple[_Candidates, Any]]):
    """`go_on()`, or a level without a candidate, in no time, where nobody goes on.

    Args:
      going_on: bool []; None: somebody does.
      go_on: returns the candidates of a level and the scratch after it.
    """
    if going_on is None:
        return go_on()

    def stop():
        shapes = jax.eval_shape(go_on)
        empty, scratch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        never = jnp.full_like(empty.path, -jnp.inf)
        return dataclasses.replace(empty, path=never, log_prob=never), scratch

    return branch(going_on, go_on, stop)


def _extend_mask(mask_BWU, slot_BW):
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


def _grow_allotted(shape: AllottedShape, root_B, scores, expand, children):
    """Every node of a level is expanded and gets its share of the next level.

    Children are numbered parent by parent.
    """
    B = root_B.shape[0]
    sizes = shape.level_sizes
    slot_B1 = jnp.arange(B)[:, None]
    tokens = [root_B[:, None]]
    log_prob, path = [jnp.zeros((B, 1))], [jnp.ones((B, 1))]
    parents = [jnp.zeros((B, 1), jnp.int32)]
    collected = _Collected(children, B)
    max_children, mask_BWU, scratch, first = [], None, None, 0
    for depth in range(shape.depth):
        width, below = sizes[depth], sizes[depth + 1]
        if depth > 0:
            # All nodes are expanded, in order: their numbers are their parents'.
            above_BW = parents[depth] - (first - sizes[depth - 1])
            mask_BWU = _extend_mask(mask_BWU, above_BW)
            level = Level(tokens[depth], parents[depth], depth, mask_BWU)
            scores, scratch = expand(level, scratch)
        count = min(below, breadth(scores))
        max_children.append(count)
        share = _share_out(path[depth], below, count)
        # The k-th child of every family is sampled by uniforms of its own.
        number_BWX = share.start[:, :, None] + jnp.arange(count)
        number_BWX = first + width + jnp.minimum(number_BWX, below - 1)
        family = children.propose(scores, depth, number_BWX)

        def choose(x_BWX, share=share):
            return x_BWX[slot_B1, share.family, share.rank]

        collected.add(family, choose)
        log_BJ = jnp.where(share.used, choose(family.log_prob), -jnp.inf)
        tokens.append(choose(family.tokens))
        log_prob.append(log_BJ)
        above_BJ = jnp.take_along_axis(path[depth], share.family, axis=1)
        path.append(above_BJ * jnp.exp(log_BJ))
        parents.append((first + share.family).astype(jnp.int32))
        first += width
    parents_BT = jnp.concatenate(parents, axis=1)
    ancestors = ancestors_of(parents_BT, shape.depth)
    log_prob_BT = jnp.concatenate(log_prob, axis=1)
    return TokenTree(
        tokens=jnp.concatenate(tokens, axis=1),
        parents=parents_BT,
        depth=jnp.sum(ancestors, axis=2, dtype=jnp.int32) - 1,
        ancestors=ancestors,
        valid=log_prob_BT > -jnp.inf,
        draft_logprob=log_prob_BT,
        source=collected.source(),
        proposal=collected.proposal(range(sum(sizes[:-1])), sizes, max_children),
    )


@dataclasses.dataclass(frozen=True)
class _Share:
    """Who gets the J nodes of a level: int32 each, but for `used`.

    Attributes:
      start: [B, W], the first node of each parent's family.
      family: [B, J], number of a node's parent in the level above.
      rank: [B, J], which of its children it is.
      used: bool [B, J], whether it exists.
    """

    start: jax.Array
    family: jax.Array
    rank: jax.Array
    used: jax.Array


def _share_out(path_BW: jax.Array, budget: int, max_children: int) -> _Share:
    """Shares a level of `budget` nodes out among its parents."""
    W = path_BW.shape[1]
    number_BW = allot(path_BW, budget, max_children)
    start_BW = jnp.cumsum(number_BW, axis=1) - number_BW
    # Node j of the level belongs to the family that covers it.
    node_J = jnp.arange(budget)
    ends_BW = start_BW + number_BW
    family_BJ = jnp.sum(ends_BW[:, None, :] <= node_J[:, None], axis=2)
    used_BJ = family_BJ < W
    family_BJ = jnp.minimum(family_BJ, W - 1)
    rank_BJ = node_J - jnp.take_along_axis(start_BW, family_BJ, axis=1)
    used_BJ &= rank_BJ < max_children
    return _Share(start_BW, family_BJ, jnp.clip(rank_BJ, 0, max_children - 1), used_BJ)


def allot(path_BW: jax.Array, budget: int, max_children: int) -> jax.Array:
    """How many children each node of a level gets, int32 [B, W].

    The next child goes where the path's probability times DECAY per child already
    there is largest; a node without probability gets none. Nodes compete within a
    level, which no rule minds: all of the level is proposed, nothing below it, and the
    probability that a rule rejects a node's whole family does not depend on the
    family's shape.
    """
    B, W = path_BW.shape
    worth_BWX = path_BW[:, :, None] * DECAY ** jnp.arange(max_children)
    worth_BJ = worth_BWX.reshape(B, W * max_children)
    values, best_BN = top_k_rows(worth_BJ, min(budget, W * max_children))
    given = jnp.where(values > 0, 1, 0).astype(jnp.int32)
    return (
        jnp.zeros((B, W), jnp.int32)
        .at[jnp.arange(B)[:, None], best_BN // max_children]
        .add(given)
    )
