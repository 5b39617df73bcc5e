"""Growing a token tree level by level inside a jit, whatever drafts.

A drafter supplies `expand`, which turns a level's tokens into logits; this module
decides which children to keep. It proposes by `log q + g` with the noise g that the
target will use at the same position, so that guesses lean towards what the target is
about to choose; the chance that a child is right is estimated as
softmax((log q + g) / tau). Without noise (draws "best") g is 0. Trees that keep q are
grown in `sampled`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from treespec_jax.acceptance import facts, policy
from treespec_jax.acceptance.select import top_k, top_k_rows
from treespec_jax.drafting import sampled
from treespec_jax.drafting.protocol import NORMALISED, DraftContext, Expand
from treespec_jax.trees.shapes import DynamicShape, StaticShape, TreeShape
from treespec_jax.trees.token_tree import TokenTree, ancestors_of, static_tree


def grow(
    shape: TreeShape,
    context: DraftContext,
    root_logits_VB: jax.Array,
    expand: Expand,
    tau: float,
    draws: str = "shared",
) -> TokenTree:
    """Grows a tree of the given shape.

    Args:
      shape: static or dynamic.
      context: root, sampling settings and noise.
      root_logits_VB: float32, the drafter's logits after the root.
      expand: runs one level of nodes through the drafter.
      tau: temperature of the estimated chance.
      draws: how nodes are drawn, see `acceptance.facts`.
    """
    if context.penalties is not None:
        root_logits_VB, expand = _penalised(context.penalties, root_logits_VB, expand)
    if draws in facts.KEPT:
        return sampled.grow(shape, context, root_logits_VB, expand, draws)
    with jax.named_scope("grow"):
        if isinstance(shape, StaticShape):
            return _grow_static(shape, context, root_logits_VB, expand, tau)
        return _grow_dynamic(shape, context, root_logits_VB, expand, tau)


def _penalised(penalties, root_logits_VB, expand: Expand):
    """Both under the penalties of the policy, each node by its own path."""
    B = root_logits_VB.shape[1]
    nobody = jnp.zeros((B, 0), jnp.int32)
    root_logits_VB = penalties.apply(root_logits_VB, nobody, jnp.zeros((B, 1, 0), bool))

    def expand_and_penalise(tokens_BW, depth, mask_BWU, scratch):
        # All nodes of a path were expanded: the mask marks just these.
        tokens_BE, inner = (nobody, None) if scratch is None else scratch
        logits_VR, inner = expand(tokens_BW, depth, mask_BWU, inner)
        tokens_BU = jnp.concatenate([tokens_BE, tokens_BW], axis=1)
        logits_VR = penalties.apply(logits_VR, tokens_BU, mask_BWU)
        return logits_VR, (tokens_BU, inner)

    return root_logits_VB, expand_and_penalise


def best_children(logits_VR, depth, count, context: DraftContext, tau):
    """The `count` best next tokens of nodes at `depth`, best first.

    The chance is normalised over the NORMALISED best tokens, not the vocabulary: at
    the usual tau the rest weighs next to nothing, and a sum over it would cost a good
    part of the drafter's pass.

    Returns:
      tokens int32 [B, W, count] and log chances float32 [B, W, count]; -inf where the
      policy allows, or the vocabulary holds, fewer tokens.
    """
    V, R = logits_VR.shape
    B = context.root.shape[0]
    seen = min(max(count, NORMALISED), V)

    def perturbed():
        if context.noise is None:
            return policy.truncate(logits_VR, context.sampling)
        noise_VB = context.noise[depth]
        return policy.perturbed(logits_VR, noise_VB, context.sampling)

    values, tokens = lax.cond(
        jnp.all(context.sampling.greedy),
        lambda: top_k(logits_VR, seen),
        lambda: top_k(perturbed(), seen),
    )
    logprob = jax.nn.log_softmax(values / tau, axis=-1)
    logprob = jnp.where(values > -jnp.inf, logprob, -jnp.inf)
    # A tiny vocabulary may not hold that many.
    lacking = (0, 0), (0, max(0, count - seen))
    tokens = jnp.pad(tokens[:, :count], lacking)
    logprob = jnp.pad(logprob[:, :count], lacking, constant_values=-jnp.inf)
    shape = B, R // B, count
    return tokens.reshape(shape), logprob.reshape(shape)


def _grow_static(shape: StaticShape, context, logits_VR, expand, tau):
    topology = shape.topology
    B = context.root.shape[0]
    tokens = [context.root[:, None]]
    logprob = [jnp.zeros((B, 1), jnp.float32)]
    scratch, rows = None, np.zeros(0, int)
    for depth in range(topology.depth):
        parents = topology.inner(depth)
        if depth > 0:
            rows = np.concatenate([rows, parents])
            mask = topology.ancestors[np.ix_(parents, rows)]
            column = parents - topology.level(depth)[0]
            logits_VR, scratch = expand(
                tokens[depth][:, column],
                depth,
                jnp.broadcast_to(mask, (B, *mask.shape)),
                scratch,
            )
        below = topology.level(depth + 1)
        slot = np.searchsorted(parents, np.asarray(topology.parents)[below])
        rank = topology.ranks[below]
        drawn_BWJ, chance_BWJ = best_children(
            logits_VR, depth, int(rank.max()) + 1, context, tau
        )
        tokens.append(drawn_BWJ[:, slot, rank])
        logprob.append(chance_BWJ[:, slot, rank])
    return static_tree(
        topology, jnp.concatenate(tokens, axis=1), jnp.concatenate(logprob, axis=1)
    )


@dataclasses.dataclass(frozen=True)
class _Candidates:
    """All children seen at one depth, each [B, n].

    `parents` number candidates over all depths (-1 is the root); `slots` say which
    expanded node of the level above a child came from.
    """

    tokens: jax.Array
    chance: jax.Array
    path: jax.Array
    parents: jax.Array
    slots: jax.Array

    @property
    def count(self) -> int:
        return self.tokens.shape[1]


def _grow_dynamic(shape: DynamicShape, context, logits_VR, expand, tau):
    """Best-first within a beam of `width` expanded nodes per level.

    All children seen are candidates; the tree is the best of them by path chance. A
    path is never likelier than its parent's and is numbered after it, so that the best
    ones always form a tree.
    """
    B = context.root.shape[0]
    vocab = logits_VR.shape[0]
    frontier_BW = jnp.full((B, 1), -1, jnp.int32)
    path_BW = jnp.zeros((B, 1), jnp.float32)
    count = min(shape.root_children, vocab)
    levels = [
        _children(logits_VR, 0, count, frontier_BW, path_BW, context=context, tau=tau)
    ]
    mask_BWU = scratch = None
    for depth in range(1, shape.depth):
        above = levels[-1]
        before = sum(level.count for level in levels[:-1])
        width = min(shape.width, above.count)
        path_BW, at_BW = top_k_rows(above.path, width)
        own = jnp.broadcast_to(jnp.eye(width, dtype=bool), (B, width, width))
        if mask_BWU is not None:
            # A frontier node sees what the expanded node it came from sees.
            slot_BW = jnp.take_along_axis(above.slots, at_BW, axis=1)
            seen = jnp.take_along_axis(mask_BWU, slot_BW[:, :, None], axis=1)
            own = jnp.concatenate([seen, own], axis=2)
        mask_BWU = own
        tokens_BW = jnp.take_along_axis(above.tokens, at_BW, axis=1)
        logits_VR, scratch = expand(tokens_BW, depth, mask_BWU, scratch)
        count = min(shape.children, vocab)
        levels.append(
            _children(
                logits_VR,
                depth,
                count,
                at_BW + before,
                path_BW,
                context=context,
                tau=tau,
            )
        )
    return _select(shape, context, levels)


def _children(logits_VR, depth, count, frontier_BW, path_BW, *, context, tau):
    B, W = frontier_BW.shape
    tokens, chance = best_children(logits_VR, depth, count, context, tau)
    slot_WJ = jnp.arange(W, dtype=jnp.int32)[:, None]
    return _Candidates(
        tokens=tokens.reshape(B, -1),
        chance=chance.reshape(B, -1),
        path=(path_BW[:, :, None] + chance).reshape(B, -1),
        parents=jnp.repeat(frontier_BW, count, axis=1),
        slots=jnp.broadcast_to(slot_WJ, (B, W, count)).reshape(B, -1),
    )


def _select(shape: DynamicShape, context, levels: list[_Candidates]) -> TokenTree:
    """The tree of the `nodes` candidates with the best path chance."""

    def joined(name):
        return jnp.concatenate([getattr(level, name) for level in levels], axis=1)

    path = joined("path")
    B, seen = path.shape
    nodes = min(shape.nodes, seen)
    _, best_BN = top_k_rows(path, nodes)
    kept_BN = jnp.sort(best_BN, axis=1)
    # Node number of every candidate; those that were not kept are never asked.
    number = jnp.zeros((B, seen), jnp.int32)
    number = number.at[jnp.arange(B)[:, None], kept_BN].set(jnp.arange(1, nodes + 1))

    def dressed(root_B1, x, fill):
        x = jnp.concatenate([root_B1, jnp.take_along_axis(x, kept_BN, axis=1)], axis=1)
        # A tiny vocabulary may not fill the tree.
        return jnp.pad(x, ((0, 0), (0, shape.nodes - nodes)), constant_values=fill)

    parents = joined("parents")
    parent_node = jnp.take_along_axis(number, jnp.maximum(parents, 0), axis=1)
    parent_node = jnp.where(parents < 0, 0, parent_node)
    zero_B1 = jnp.zeros((B, 1), jnp.int32)
    parents_BT = dressed(zero_B1, parent_node, 0)
    ancestors = ancestors_of(parents_BT, shape.depth)
    return TokenTree(
        tokens=dressed(context.root[:, None], joined("tokens"), 0),
        parents=parents_BT,
        depth=jnp.sum(ancestors, axis=2, dtype=jnp.int32) - 1,
        ancestors=ancestors,
        valid=dressed(zero_B1 * 0.0, path, -jnp.inf) > -jnp.inf,
        draft_logprob=dressed(zero_B1 * 0.0, joined("chance"), -jnp.inf),
    )
