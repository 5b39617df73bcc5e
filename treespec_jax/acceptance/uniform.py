"""What the rules share that decide by uniforms and draw their last token."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from treespec_jax.acceptance.exact import exact_match
from treespec_jax.acceptance.protocol import Judgement, columns, finalize
from treespec_jax.branches import branch
from treespec_jax.sampling import policy, select
from treespec_jax.sampling.policy import Sampling
from treespec_jax.sampling.streams import Uniforms
from treespec_jax.trees.token_tree import TokenTree


class UniformRule(abc.ABC):
    """See `protocol.Rule`; it decides by `streams.Uniforms`.

    Rules judge by what the policy says at few nodes, so they are given a `Target` and
    work out what they look at.
    """

    @abc.abstractmethod
    def judge(self, tree: TokenTree, target: Target, uniforms: Uniforms) -> Judgement:
        """Decides without drawing the last token.

        Args:
          tree: as the rule wants it.
          target: the policy after every node; its float width is that of the result.
          uniforms: of the step.
        """

    def decide(self, tree, logits_VR, sampling, randomness, max_depth):
        B, T = tree.tokens.shape
        uniforms = randomness.verdict()

        def greedy():
            choice_BT = select.argmax(logits_VR).reshape(B, T)
            return exact_match(tree, choice_BT, max_depth)

        def sampled():
            target = Target(logits_VR.reshape(-1, B, T), sampling)
            judgement = self.judge(tree, target, uniforms)
            return finalize(tree, judgement, uniforms, max_depth)

        # For point masses every rule comes to the same; this is the cheap way to it.
        return branch(sampling.all_greedy, greedy, sampled)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Target:
    """p after the nodes of a tree.

    Attributes:
      logits: [V, B, T], of the target.
      sampling: settings per slot.
    """

    logits: jax.Array
    sampling: Sampling

    def distributions(self) -> policy.Distributions:
        """Of all nodes, R = B·T columns."""
        return policy.distributions(
            self.logits.reshape(self.logits.shape[0], -1), self.sampling
        )

    def of(self, nodes: np.ndarray) -> jax.Array:
        """p [V, B, nodes] of some nodes (static numbers, ascending)."""
        if len(nodes) == nodes[-1] - nodes[0] + 1:
            chosen = self.logits[:, :, int(nodes[0]) : int(nodes[-1]) + 1]
        else:
            chosen = self.logits[:, :, nodes]
        # A strided slice is read once, not in every pass over it.
        return self._probabilities(lax.optimization_barrier(chosen))

    def of_one(self, node_B: jax.Array) -> jax.Array:
        """p [V, B, 1] of one node per slot."""
        V, B, T = self.logits.shape
        column_VB = columns(self.logits.reshape(V, B * T), node_B)
        return self._probabilities(column_VB[:, :, None])

    def child_probabilities(
        self, tree: TokenTree, distributions: policy.Distributions
    ) -> jax.Array:
        """p of every node's token after its parent [B, T]; of the root, 1."""
        B, T = tree.tokens.shape
        above_BT = tree.parents + T * jnp.arange(B)[:, None]
        p_R = distributions.of(tree.tokens.ravel(), above_BT.ravel())
        return p_R.reshape(B, T).at[:, 0].set(1.0)

    def _probabilities(self, logits_VBN):
        flat_VR = logits_VBN.reshape(logits_VBN.shape[0], -1)
        p_VR = policy.distributions(flat_VR, self.sampling).probabilities()
        return p_VR.reshape(logits_VBN.shape)


def alone(target: Target) -> Judgement:
    """Of a tree that is its root: a sample of p, which is plain decoding."""
    node_B = jnp.zeros(target.logits.shape[1], jnp.int32)
    distribution_VB1 = target.of_one(node_B)
    return Judgement(
        node_B, distribution_VB1[:, :, 0], jnp.ones_like(distribution_VB1[0])
    )


def earlier_siblings(parents_BT: jax.Array) -> jax.Array:
    """bool [B, T, T]: row t marks the siblings that were numbered before t."""
    node_T = jnp.arange(parents_BT.shape[1])
    same = parents_BT[:, :, None] == parents_BT[:, None, :]
    return same & (node_T[:, None] > node_T) & (node_T > 0)


def all_above(ancestors_BTT: jax.Array, right_BT: jax.Array) -> jax.Array:
    """bool [B, T]: a node and all its ancestors below the root are right."""
    right_BT = right_BT.at[:, 0].set(True)
    return jnp.all(~ancestors_BTT | right_BT[:, None, :], axis=-1)
