"""What the rules share that decide by uniforms and draw their last token."""

from __future__ import annotations

import abc

import jax
import jax.numpy as jnp
from jax import lax

from treespec_jax.acceptance import policy, select, streams
from treespec_jax.acceptance.exact import exact_match
from treespec_jax.acceptance.protocol import Judgement, settle
from treespec_jax.acceptance.streams import Uniforms
from treespec_jax.trees.token_tree import TokenTree


class UniformRule(abc.ABC):
    """See `protocol.Rule`; its randomness is `streams.Uniforms`.

    Rules judge by what the target says at few nodes of few paths, so they are given its
    scores as they are and normalise the columns that they look at.
    """

    @abc.abstractmethod
    def judge(
        self, tree: TokenTree, scores_VBT: jax.Array, uniforms: Uniforms
    ) -> Judgement:
        """Decides without drawing the last token.

        Args:
          tree: as the rule wants it.
          scores_VBT: log p after each node up to a constant, -inf where p is 0; float
            of any width, which is that of the result.
          uniforms: of the step.
        """

    def randomness(self, sampling, root_B, nodes, depth, vocab):
        return streams.of_verdict(sampling.seed, root_B, nodes)

    def decide(self, tree, logits_VR, sampling, randomness, max_depth):
        B, T = tree.tokens.shape

        def greedy():
            choice_BT = select.argmax(logits_VR).reshape(B, T)
            return exact_match(tree, choice_BT, max_depth)

        def sampled():
            scores_VBT = policy.scores(logits_VR, sampling).reshape(-1, B, T)
            judgement = self.judge(tree, scores_VBT, randomness)
            return settle(tree, judgement, randomness, max_depth)

        # For point masses every rule comes to the same; this is the cheap way to it.
        return lax.cond(jnp.all(sampling.greedy), greedy, sampled)


def log_totals(scores_VBT: jax.Array) -> jax.Array:
    """logsumexp [B, T] of every column, in two passes that vectorise."""
    best_BT = jnp.max(scores_VBT, axis=0)
    return best_BT + jnp.log(jnp.sum(jnp.exp(scores_VBT - best_BT), axis=0))


def alone(scores_VBT: jax.Array) -> Judgement:
    """Of a tree that is its root: a sample of p, which is plain decoding."""
    law_VB1 = jnp.exp(scores_VBT - log_totals(scores_VBT))
    node_B = jnp.zeros(scores_VBT.shape[1], jnp.int32)
    return Judgement(node_B, law_VB1[:, :, 0], jnp.ones_like(law_VB1[0]))


def column(x_VBT: jax.Array, node_B: jax.Array) -> jax.Array:
    """Column [V, B] of one node per slot."""
    return jnp.take_along_axis(x_VBT, node_B[None, :, None], axis=2)[:, :, 0]


def child_chances(tree: TokenTree, scores_VBT: jax.Array, total_BT) -> jax.Array:
    """p of every node's token after its parent [B, T]; of the root, 1."""
    slot_B1 = jnp.arange(tree.tokens.shape[0])[:, None]
    own_BT = scores_VBT[tree.tokens, slot_B1, tree.parents]
    above_BT = jnp.take_along_axis(total_BT, tree.parents, axis=1)
    return jnp.exp(own_BT - above_BT).at[:, 0].set(1.0)


def earlier_siblings(parents_BT: jax.Array) -> jax.Array:
    """bool [B, T, T]: row t marks the siblings that were numbered before t."""
    node_T = jnp.arange(parents_BT.shape[1])
    same = parents_BT[:, :, None] == parents_BT[:, None, :]
    return same & (node_T[:, None] > node_T) & (node_T > 0)


def all_above(ancestors_BTT: jax.Array, right_BT: jax.Array) -> jax.Array:
    """bool [B, T]: a node and all its ancestors below the root are right."""
    right_BT = right_BT.at[:, 0].set(True)
    return jnp.all(~ancestors_BTT | right_BT[:, None, :], axis=-1)
