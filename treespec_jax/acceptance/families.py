"""The recursion over the children of a node that the sampling rules on trees share.

A node n is reached with weight a in [0, 1], its distribution P = p(·|n) and the
distribution Q = q(·|n) that its first child was sampled from. A child x is worth min(1,
a P[x] / Q[x]). If it is rejected, what remains to cover is (a P - Q)+, whose sum S
makes the node's weight S / (S + 1 - a), and the next child's distribution is Q without
x. All of it follows from the tree, not from what is decided below the child, so that
whole levels are worked on at once. With a = 1 it is the token rule's recursion
(Sequoia, 2402.12374), otherwise that of traversal verification (2505.12398).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from treespec_jax.acceptance import uniform
from treespec_jax.acceptance.protocol import columns
from treespec_jax.sampling import policy
from treespec_jax.trees.token_tree import Proposal, TokenTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Children:
    """Of some nodes, in the order in which they were sampled: [B, nodes, X] each.

    Attributes:
      number: int32, T where there is none.
      tokens: int32.
      remaining: share of q not sampled before the child; 1 where there is none.
      exists: bool.
    """

    number: jax.Array
    tokens: jax.Array
    remaining: jax.Array
    exists: jax.Array

    def of(self, nodes, count: int) -> Children:
        """The first `count` children of some nodes (static numbers)."""
        return jax.tree.map(lambda x: x[:, nodes, :count], self)

    def of_one(self, node_B: jax.Array, count: int | None = None) -> Children:
        """The first `count` children of one node per slot, [B, 1, count]."""
        node_B11 = node_B[:, None, None]
        return jax.tree.map(
            lambda x: jnp.take_along_axis(x[:, :, :count], node_B11, axis=1), self
        )


def children(tree: TokenTree) -> Children:
    """Of every node of a sampled tree."""
    B, T = tree.tokens.shape
    rank_BT = jnp.sum(uniform.earlier_siblings(tree.parents), axis=2)
    # The root is nobody's child, and nobody asks for an invalid node.
    node_T = jnp.arange(T, dtype=jnp.int32)
    rank_BT = jnp.where(tree.valid & (node_T > 0), rank_BT, T)
    number = jnp.full((B, T, max(tree.proposal.max_children)), T, jnp.int32)
    slot_B1 = jnp.arange(B)[:, None]
    number = number.at[slot_B1, tree.parents, rank_BT].set(
        jnp.broadcast_to(node_T, (B, T)), mode="drop"
    )
    exists = number < T
    safe = jnp.where(exists, number, 0).reshape(B, -1)

    def look_up(x_BT):
        return jnp.take_along_axis(x_BT, safe, axis=1).reshape(number.shape)

    remaining = jnp.where(exists, look_up(tree.proposal.remaining), 1.0)
    return Children(number, look_up(tree.tokens), remaining, exists)


def levels(proposal: Proposal) -> Iterator[tuple[np.ndarray, slice, int]]:
    """Per depth: nodes with children, their columns of q, the most children of one."""
    nodes = np.asarray(proposal.nodes)
    ends = np.cumsum(proposal.level_sizes)
    for depth, count in enumerate(proposal.max_children):
        first, last = np.searchsorted(
            nodes, [ends[depth] - proposal.level_sizes[depth], ends[depth]]
        )
        yield nodes[first:last], slice(int(first), int(last)), count


def drafted(proposal: Proposal, columns: slice, vocab: int) -> jax.Array:
    """q [V, B, nodes] of some columns, 0 past the drafter's vocabulary."""
    return _filled(jnp.exp(proposal.log_q[:, :, columns]), vocab)


def drafted_one(tree: TokenTree, node_B: jax.Array, vocab: int) -> jax.Array:
    """q [V, B, 1] of one node per slot; of a leaf, some other node's."""
    log_q = tree.proposal.log_q
    number = np.zeros(tree.tokens.shape[1], np.int32)
    number[list(tree.proposal.nodes)] = np.arange(len(tree.proposal.nodes))
    column_VB = columns(log_q.reshape(len(log_q), -1), jnp.asarray(number)[node_B])
    return _filled(jnp.exp(column_VB)[:, :, None], vocab)


def _filled(q_VBE, vocab):
    return jnp.pad(q_VBE, ((0, vocab - q_VBE.shape[0]), (0, 0), (0, 0)))


def recur(
    p_VBE: jax.Array,
    q_VBE: jax.Array,
    weight_BE: jax.Array,
    family: Children,
    *,
    replacement: bool,
    finish: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights of the children, and the node's own once all of them are rejected.

    Args:
      p_VBE: of the nodes, normalised.
      q_VBE: of the nodes, normalised.
      weight_BE: a.
      family: their children.
      replacement: children were sampled independently.
      finish: what is wanted beside the children's weights: the node's "weight", or
        "both" that and the distribution.

    Returns:
      weights [B, E, X], 0 where there is no child; the node's weight [B, E]; the
      distribution of the token after it up to a factor, [V, B, E].
    """
    token_V11 = jnp.arange(p_VBE.shape[0], dtype=jnp.int32)[:, None, None]
    count = family.tokens.shape[2]
    weights, sampled = [], jnp.zeros((), bool)
    # P is kept as numbers over their sum, which saves a pass over it per child.
    numbers_VBE, sum_BE = p_VBE, jnp.ones((), p_VBE.dtype)
    for turn in range(count):
        token, remaining, exists = (
            x[:, :, turn] for x in (family.tokens, family.remaining, family.exists)
        )
        p_BE = jnp.take_along_axis(numbers_VBE, token[None], axis=0)[0] / sum_BE
        q_BE = jnp.take_along_axis(q_VBE, token[None], axis=0)[0] / remaining
        # A greedy slot's child may have no q at all: worth 1 if p is not 0.
        worth = jnp.minimum(1.0, weight_BE * p_BE / jnp.where(q_BE > 0, q_BE, 1.0))
        worth = jnp.where(q_BE > 0, worth, 1.0)
        alive = exists & (p_BE > 0) & (weight_BE > 0)
        weights.append(jnp.where(alive, worth, 0.0))
        share_BE = weight_BE / sum_BE
        rest_q = q_VBE * (1.0 / remaining)
        if not replacement:
            rest_q = jnp.where(sampled, 0.0, rest_q)
        uncovered = jnp.maximum(share_BE * numbers_VBE - rest_q, 0.0)
        uncovered_BE = jnp.sum(uncovered, axis=0)
        some = exists & (uncovered_BE > 0)
        weight_BE = jnp.where(exists, covered(uncovered_BE, weight_BE), weight_BE)
        if turn < count - 1 or finish == "both":
            numbers_VBE = jnp.where(some, uncovered, numbers_VBE)
            sum_BE = jnp.where(some, uncovered_BE, sum_BE)
        sampled |= (token_V11 == token) & exists
    return jnp.stack(weights, axis=2), weight_BE, numbers_VBE


def log_ratios(tree: TokenTree, distributions: policy.Distributions) -> jax.Array:
    """log p(x) / q(x) of every token of a chain [B, T]; of the root, 0.

    -inf where p is 0. A greedy slot's token may have no q: +inf unless p is 0 too.
    """
    B, T = tree.tokens.shape
    slot_B1 = jnp.arange(B)[:, None]
    tokens_BC, above_C = tree.tokens[:, 1:], jnp.arange(T - 1)
    columns_BC = above_C + T * slot_B1
    p_R = distributions.of(tokens_BC.ravel(), columns_BC.ravel())
    p_BC = p_R.reshape(B, T - 1)
    log_q_BC = tree.proposal.log_q[tokens_BC, slot_B1, above_C]
    log_BC = jnp.where(p_BC > 0, jnp.log(p_BC) - log_q_BC, -jnp.inf)
    return jnp.pad(log_BC, ((0, 0), (1, 0)))


def covered(uncovered: jax.Array, weight: jax.Array) -> jax.Array:
    """S / (S + 1 - a), and 1 for 0 / 0."""
    whole = uncovered + (1.0 - weight)
    return jnp.where(whole > 0, uncovered / jnp.where(whole > 0, whole, 1.0), 1.0)


def last_distribution(
    tree: TokenTree,
    target: uniform.Target,
    family: Children,
    node_B: jax.Array,
    weight_B: jax.Array,
) -> jax.Array:
    """[V, B], of the token after a node whose children were all rejected."""
    _, _, weights_VB1 = recur(
        target.of_one(node_B),
        drafted_one(tree, node_B, target.logits.shape[0]),
        weight_B[:, None],
        family.of_one(node_B),
        replacement=tree.proposal.replacement,
        finish="both",
    )
    return weights_VB1[:, :, 0]
