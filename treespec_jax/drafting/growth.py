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

import jax
import jax.numpy as jnp
import numpy as np

from treespec_jax.drafting.best_first import extend_mask, grow_best_first
from treespec_jax.drafting.children import Children, Family, breadth, make
from treespec_jax.drafting.protocol import (
    DraftContext,
    Expand,
    Guesses,
    Level,
    Scores,
)
from treespec_jax.sampling.select import top_k_rows
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
        BestFirstShape: functools.partial(grow_best_first, context),
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
            mask_BWU = extend_mask(mask_BWU, above_BW)
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
