"""The recursion over the children of a node that the sampling rules on trees share.

A node n is reached with weight a in [0, 1], its law P = p(·|n) and the law Q = q(·|n)
that its first child was drawn from. A child x is worth min(1, a P[x] / Q[x]). If it is
rejected, what is left to cover is (a P - Q)+, whose mass S makes the node's weight
S / (S + 1 - a), and the next child's law is Q without x. All of it follows from the
tree, not from what is decided below the child, so that whole levels are worked on at
once. With a = 1 it is the token rule's recursion (Sequoia, 2402.12374), otherwise that
of traversal verification (2505.12398).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from treespec_jax.acceptance import uniform
from treespec_jax.trees.token_tree import Proposal, TokenTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Children:
    """Of some nodes, in the order in which they were drawn: [B, nodes, K] each.

    Attributes:
      number: int32, T where there is none.
      tokens: int32.
      left: mass of q not drawn before the child; 1 where there is none.
      exists: bool.
    """

    number: jax.Array
    tokens: jax.Array
    left: jax.Array
    exists: jax.Array

    def of(self, nodes, count: int) -> Children:
        """The first `count` children of some nodes (static numbers)."""
        return jax.tree.map(lambda x: x[:, nodes, :count], self)

    def of_one(self, node_B: jax.Array) -> Children:
        """Of one node per slot, [B, 1, K]."""
        at = node_B[:, None, None]
        return jax.tree.map(lambda x: jnp.take_along_axis(x, at, axis=1), self)


def children(tree: TokenTree) -> Children:
    """Of every node of a sampled tree."""
    B, T = tree.tokens.shape
    rank_BT = jnp.sum(uniform.earlier_siblings(tree.parents), axis=2)
    # The root is nobody's child, and nobody asks for an invalid node.
    node_T = jnp.arange(T, dtype=jnp.int32)
    rank_BT = jnp.where(tree.valid & (node_T > 0), rank_BT, T)
    number = jnp.full((B, T, max(tree.proposal.most)), T, jnp.int32)
    slot_B1 = jnp.arange(B)[:, None]
    number = number.at[slot_B1, tree.parents, rank_BT].set(
        jnp.broadcast_to(node_T, (B, T)), mode="drop"
    )
    exists = number < T
    at = jnp.where(exists, number, 0).reshape(B, -1)

    def look_up(x_BT):
        return jnp.take_along_axis(x_BT, at, axis=1).reshape(number.shape)

    left = jnp.where(exists, look_up(tree.proposal.left), 1.0)
    return Children(number, look_up(tree.tokens), left, exists)


def levels(proposal: Proposal) -> Iterator[tuple[np.ndarray, slice, int]]:
    """Per depth: nodes that may have children, their columns of q, the most of it."""
    nodes = np.asarray(proposal.nodes)
    ends = np.cumsum(proposal.levels)
    for depth, most in enumerate(proposal.most):
        first, last = np.searchsorted(
            nodes, [ends[depth] - proposal.levels[depth], ends[depth]]
        )
        yield nodes[first:last], slice(int(first), int(last)), most


def drafted(proposal: Proposal, columns: slice, vocab: int) -> jax.Array:
    """q [V, B, nodes] of some columns, 0 past the drafter's vocabulary."""
    scores = proposal.scores[:, :, columns]
    q = jnp.exp(scores - proposal.log_total[:, columns])
    return jnp.pad(q, ((0, vocab - q.shape[0]), (0, 0), (0, 0)))


def targeted(scores_VBT: jax.Array, nodes: np.ndarray) -> jax.Array:
    """p [V, B, nodes] of some nodes."""
    if len(nodes) == nodes[-1] - nodes[0] + 1:
        own = scores_VBT[:, :, int(nodes[0]) : int(nodes[-1]) + 1]
    else:
        own = scores_VBT[:, :, nodes]
    return jnp.exp(own - uniform.log_totals(own))


def recur(
    p_VBE: jax.Array,
    q_VBE: jax.Array,
    weight_BE: jax.Array,
    own: Children,
    replacement: bool,
    finish: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights of the children, and the node's own once all of them are rejected.

    Args:
      p_VBE: of the nodes, normalised.
      q_VBE: of the nodes, normalised.
      weight_BE: a.
      own: their children.
      replacement: children were drawn independently.
      finish: whether the last two results are wanted.

    Returns:
      weights [B, E, K], 0 where there is no child; the node's weight [B, E]; the law of
      the token after it, [V, B, E].
    """
    at_V = jnp.arange(p_VBE.shape[0], dtype=jnp.int32)[:, None, None]
    count = own.tokens.shape[2]
    weights = []
    for turn in range(count):
        token, left, exists = (
            x[:, :, turn] for x in (own.tokens, own.left, own.exists)
        )
        p_BE = jnp.take_along_axis(p_VBE, token[None], axis=0)[0]
        q_BE = jnp.take_along_axis(q_VBE, token[None], axis=0)[0] / left
        # A greedy slot's child may have a q that rounds to 0: worth 1 if p is not 0.
        worth = jnp.minimum(1.0, weight_BE * p_BE / jnp.where(q_BE > 0, q_BE, 1.0))
        worth = jnp.where(q_BE > 0, worth, 1.0)
        alive = exists & (p_BE > 0) & (weight_BE > 0)
        weights.append(jnp.where(alive, worth, 0.0))
        if turn == count - 1 and not finish:
            break
        uncovered = jnp.maximum(weight_BE * p_VBE - q_VBE / left, 0.0)
        mass_BE = jnp.sum(uncovered, axis=0)
        some = exists & (mass_BE > 0)
        p_VBE = jnp.where(some, uncovered / jnp.where(some, mass_BE, 1.0), p_VBE)
        weight_BE = jnp.where(exists, covered(mass_BE, weight_BE), weight_BE)
        if not replacement:
            q_VBE = jnp.where((at_V == token) & exists, 0.0, q_VBE)
    return jnp.stack(weights, axis=2), weight_BE, p_VBE


def covered(mass: jax.Array, weight: jax.Array) -> jax.Array:
    """S / (S + 1 - a), and 1 for 0 / 0."""
    whole = mass + (1.0 - weight)
    return jnp.where(whole > 0, mass / jnp.where(whole > 0, whole, 1.0), 1.0)


def last_law(
    tree: TokenTree,
    scores_VBT: jax.Array,
    family: Children,
    node_B: jax.Array,
    weight_B: jax.Array,
) -> jax.Array:
    """Law [V, B] of the token after a node whose children were all rejected."""
    proposal = tree.proposal
    own = uniform.column(scores_VBT, node_B)[:, :, None]
    p_VB1 = jnp.exp(own - uniform.log_totals(own))
    place = np.zeros(tree.tokens.shape[1], np.int32)
    place[list(proposal.nodes)] = np.arange(len(proposal.nodes))
    # A leaf has no children, so that it makes no difference whose q it gets.
    at_B = jnp.asarray(place)[node_B]
    scores_VB = uniform.column(proposal.scores, at_B)
    total_B1 = jnp.take_along_axis(proposal.log_total, at_B[:, None], axis=1)
    q_VB = jnp.exp(scores_VB - total_B1[:, 0])
    q_VB = jnp.pad(q_VB, ((0, p_VB1.shape[0] - q_VB.shape[0]), (0, 0)))
    _, _, law_VB1 = recur(
        p_VB1,
        q_VB[:, :, None],
        weight_B[:, None],
        family.of_one(node_B),
        proposal.replacement,
    )
    return law_VB1[:, :, 0]
