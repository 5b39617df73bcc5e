"""Trees that keep q: drawn at random, for rules that weigh a node by its chance.

Siblings are drawn one after the other from q, the drafter's law under the request's own
temperature, top-k, top-p and min-p, and keep that order. Where nodes go may depend on q
and on the levels above, never on what a node turns out to be: none is dropped, moved or
sorted once it is drawn, or no rule would be lossless.

Draws "best_kept" take the likeliest tokens in place of draws, and keep q for a cascade.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from treespec_jax.acceptance import draw, policy
from treespec_jax.acceptance.select import top_k, top_k_rows
from treespec_jax.drafting.protocol import NORMALISED, DraftContext, Expand
from treespec_jax.trees.shapes import DynamicShape, StaticShape, TreeShape
from treespec_jax.trees.token_tree import (
    Proposal,
    TokenTree,
    ancestors_of,
    static_tree,
)

# Worth of a node's second child against its first, of its third against its second, …
# when a level of a dynamic tree is shared out. Any value is lossless.
DECAY = 0.5


def grow(
    shape: TreeShape,
    context: DraftContext,
    root_logits_VB: jax.Array,
    expand: Expand,
    draws: str = "sampled",
) -> TokenTree:
    """Grows a tree of the given shape, with its `Proposal`.

    Args:
      shape: a dynamic one has its nodes spread over its levels (`level_sizes`).
      context: root, settings and (unless "best_kept") uniforms.
      root_logits_VB: float32, the drafter's logits after the root.
      expand: runs one level of nodes through the drafter.
      draws: one of `facts.KEPT`; "with_replacement" for static shapes only.
    """
    with jax.named_scope("grow"):
        if isinstance(shape, StaticShape):
            return _grow_static(shape, context, root_logits_VB, expand, draws)
        return _grow_dynamic(shape, context, root_logits_VB, expand, draws)


def siblings(logits_VR, context: DraftContext, number_BWK, draws):
    """Children of nodes [B, W], in the order in which they were drawn.

    Greedy slots get the likeliest tokens instead, best first: their target is a point
    mass, and every rule then only asks whether a child carries it.

    Args:
      logits_VR: the drafter's, R = B·W.
      context: settings and uniforms.
      number_BWK: nodes by whose uniforms the K children are drawn.
      draws: one of `facts.KEPT`.

    Returns:
      q up to a factor [Vd, B, W] and its sums [B, W]; tokens int32, log q and the share
      of q not drawn before, [B, W, K] each.
    """
    B, W, K = number_BWK.shape
    sampling, slot_B11 = context.sampling, jnp.arange(B)[:, None, None]

    def greedy():
        # Only a cascade will ask for q, and it knows of these.
        tokens_RK, log_RK = _best(logits_VR, K)
        total_R = jnp.ones(B * W, logits_VR.dtype)
        return logits_VR, total_R, tokens_RK, log_RK, jnp.ones_like(log_RK)

    def sampled():
        mass_VR = policy.laws(logits_VR, sampling.opened()).probs()
        total_R = jnp.sum(mass_VR, axis=0)
        if draws == "best_kept":
            tokens_RK, log_RK = _best(jnp.log(mass_VR), K)
            return mass_VR, total_R, tokens_RK, log_RK, jnp.ones_like(log_RK)
        uniforms = context.uniforms[slot_B11, number_BWK].reshape(B * W, K, 2)
        replacement = draws == "with_replacement"
        tokens, shares, left = draw.siblings(mass_VR, uniforms, replacement)
        drawn = tokens, jnp.log(shares), left
        drawn = lax.cond(jnp.any(sampling.greedy), lambda: mixed(drawn), lambda: drawn)
        return mass_VR, total_R, *drawn

    def mixed(drawn):
        tokens_RK, log_RK = _best(logits_VR, K)
        best = tokens_RK, log_RK, jnp.ones_like(log_RK)
        greedy_R1 = jnp.repeat(sampling.greedy, W)[:, None]
        return tuple(
            jnp.where(greedy_R1, a, b) for a, b in zip(best, drawn, strict=True)
        )

    mass, total, *drawn = lax.cond(jnp.all(sampling.greedy), greedy, sampled)
    drawn = (x.reshape(B, W, K) for x in drawn)
    return mass.reshape(-1, B, W), total.reshape(B, W), *drawn


def _best(logits_VR, count):
    """The likeliest tokens [R, count] and an estimate of log q, -inf past them all."""
    seen = min(max(count, NORMALISED), logits_VR.shape[0])
    values_RJ, tokens_RJ = top_k(logits_VR, seen)
    log_RJ = jax.nn.log_softmax(values_RJ, axis=1)
    lacking = (0, 0), (0, max(0, count - seen))
    tokens_RK = jnp.pad(tokens_RJ[:, :count], lacking)
    return tokens_RK, jnp.pad(log_RJ[:, :count], lacking, constant_values=-jnp.inf)


def _grow_static(shape: StaticShape, context, logits_VR, expand, draws):
    topology = shape.topology
    B = context.root.shape[0]
    tokens = [context.root[:, None]]
    log_q = [jnp.zeros((B, 1), jnp.float32)]
    left = [jnp.ones((B, 1), jnp.float32)]
    masses, totals, inner, most = [], [], [], []
    scratch = None
    for depth in range(topology.depth):
        parents = topology.inner(depth)
        if depth > 0:
            rows = np.concatenate(inner[1:] + [parents])
            mask = topology.ancestors[np.ix_(parents, rows)]
            column = parents - topology.level(depth)[0]
            logits_VR, scratch = expand(
                tokens[depth][:, column],
                depth,
                jnp.broadcast_to(mask, (B, *mask.shape)),
                scratch,
            )
        inner.append(parents)
        below = topology.level(depth + 1)
        slot = np.searchsorted(parents, np.asarray(topology.parents)[below])
        rank = topology.ranks[below]
        most.append(int(rank.max()) + 1)
        # A place that no node takes is drawn too, by the uniforms of another node:
        # it comes after all that are kept, and is looked at by nobody.
        number = np.full((len(parents), most[-1]), below[0])
        number[slot, rank] = below
        number = jnp.broadcast_to(jnp.asarray(number), (B, *number.shape))
        own_mass, own_total, *drawn = siblings(logits_VR, context, number, draws)
        masses.append(own_mass)
        totals.append(own_total)
        token_BJ, log_BJ, left_BJ = (x[:, slot, rank] for x in drawn)
        # Nothing is below a place that was left empty.
        column = parents[slot] - topology.level(depth)[0]
        log_BJ = jnp.where(log_q[depth][:, column] > -jnp.inf, log_BJ, -jnp.inf)
        tokens.append(token_BJ)
        log_q.append(log_BJ)
        left.append(left_BJ)
    tokens_BT, log_q_BT, left_BT = (
        jnp.concatenate(x, axis=1) for x in (tokens, log_q, left)
    )
    proposal = None
    if topology.depth:
        proposal = Proposal(
            mass=jnp.concatenate(masses, axis=2),
            total=jnp.concatenate(totals, axis=1),
            left=left_BT,
            nodes=tuple(int(n) for n in np.concatenate(inner)),
            levels=tuple(len(topology.level(d)) for d in range(topology.depth + 1)),
            most=tuple(most),
            replacement=draws == "with_replacement",
        )
    return static_tree(topology, tokens_BT, log_q_BT, proposal)


def level_sizes(shape: DynamicShape) -> tuple[int, ...]:
    """Nodes at depth 0, …, C: falling in even steps, at least one each."""
    weights = np.arange(shape.depth, 0, -1)
    spare = shape.nodes - shape.depth
    ends = np.round(np.cumsum(weights) / weights.sum() * spare).astype(int)
    return (1, *(int(n) + 1 for n in np.diff(ends, prepend=0)))


def allot(chance_BW: jax.Array, budget: int, most: int) -> jax.Array:
    """How many children each node of a level gets, int32 [B, W].

    The next child goes where path chance times DECAY per child already there is most;
    a node without chance gets none. Nodes compete within a level, which no rule minds:
    all of the level is drawn, nothing below it, and the chance that a rule rejects a
    node's whole family does not depend on the family's shape.
    """
    B, W = chance_BW.shape
    worth_BWK = chance_BW[:, :, None] * DECAY ** jnp.arange(most)
    worth_BJ = worth_BWK.reshape(B, W * most)
    values, at_BN = top_k_rows(worth_BJ, min(budget, W * most))
    given = jnp.where(values > 0, 1, 0).astype(jnp.int32)
    return (
        jnp.zeros((B, W), jnp.int32)
        .at[jnp.arange(B)[:, None], at_BN // most]
        .add(given)
    )


def _grow_dynamic(shape: DynamicShape, context, logits_VR, expand, draws):
    """Level by level: every node of a level is expanded and gets its share of the next.

    Children are numbered parent by parent.
    """
    B = context.root.shape[0]
    sizes = level_sizes(shape)
    vocab = logits_VR.shape[0]
    slot_B1 = jnp.arange(B)[:, None]
    first = 0
    tokens = [context.root[:, None]]
    log_q, path = [jnp.zeros((B, 1))], [jnp.ones((B, 1))]
    left, parents = [jnp.ones((B, 1))], [jnp.zeros((B, 1), jnp.int32)]
    masses, totals, most = [], [], []
    mask_BWU = scratch = None
    for depth in range(shape.depth):
        W, below = sizes[depth], sizes[depth + 1]
        if depth > 0:
            own = jnp.broadcast_to(jnp.eye(W, dtype=bool), (B, W, W))
            if mask_BWU is not None:
                # A node sees what its parent, expanded a level above, sees.
                above_BW = parents[depth] - (first - sizes[depth - 1])
                seen = jnp.take_along_axis(mask_BWU, above_BW[:, :, None], axis=1)
                own = jnp.concatenate([seen, own], axis=2)
            mask_BWU = own
            logits_VR, scratch = expand(tokens[depth], depth, mask_BWU, scratch)
        count = min(below, vocab)
        most.append(count)
        # The k-th place of every family is drawn by uniforms of its own.
        number_BW = allot(path[depth], below, count)
        start_BW = jnp.cumsum(number_BW, axis=1) - number_BW
        at_BWK = start_BW[:, :, None] + jnp.arange(count)
        at_BWK = first + W + jnp.minimum(at_BWK, below - 1)
        own_mass, own_total, *drawn = siblings(logits_VR, context, at_BWK, draws)
        masses.append(own_mass)
        totals.append(own_total)
        # Place j of the next level belongs to the family that covers it.
        place_J = jnp.arange(below)
        ends_BW = start_BW + number_BW
        family_BJ = jnp.sum(ends_BW[:, None, :] <= place_J[:, None], axis=2)
        used_BJ = family_BJ < W
        family_BJ = jnp.minimum(family_BJ, W - 1)
        rank_BJ = place_J - jnp.take_along_axis(start_BW, family_BJ, axis=1)
        used_BJ &= rank_BJ < count
        rank_BJ = jnp.clip(rank_BJ, 0, count - 1)
        token_BJ, log_BJ, left_BJ = (x[slot_B1, family_BJ, rank_BJ] for x in drawn)
        log_BJ = jnp.where(used_BJ, log_BJ, -jnp.inf)
        tokens.append(token_BJ)
        log_q.append(log_BJ)
        left.append(left_BJ)
        above_BJ = jnp.take_along_axis(path[depth], family_BJ, axis=1)
        path.append(above_BJ * jnp.exp(log_BJ))
        parents.append((first + family_BJ).astype(jnp.int32))
        first += W
    parents_BT = jnp.concatenate(parents, axis=1)
    ancestors = ancestors_of(parents_BT, shape.depth)
    log_q_BT = jnp.concatenate(log_q, axis=1)
    return TokenTree(
        tokens=jnp.concatenate(tokens, axis=1),
        parents=parents_BT,
        depth=jnp.sum(ancestors, axis=2, dtype=jnp.int32) - 1,
        ancestors=ancestors,
        valid=log_q_BT > -jnp.inf,
        draft_logprob=log_q_BT,
        proposal=Proposal(
            mass=jnp.concatenate(masses, axis=2),
            total=jnp.concatenate(totals, axis=1),
            left=jnp.concatenate(left, axis=1),
            nodes=tuple(range(sum(sizes[:-1]))),
            levels=sizes,
            most=tuple(most),
        ),
    )
