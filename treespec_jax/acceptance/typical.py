"""Typical acceptance (Medusa, Cai et al. 2401.10774): LOSSY, and labelled so."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from treespec_jax.acceptance import uniform
from treespec_jax.acceptance.protocol import Judgement


@dataclasses.dataclass(frozen=True)
class TypicalRule(uniform.UniformRule):
    """Keeps the longest path of tokens that the target finds likely enough.

    A child x passes where p(x) > min(eps, delta · exp(-H(p))), H the entropy in nats of
    the policy after its parent; ties go to the larger sum of log p. The token after the
    path is a sample of p: Medusa's first token of the next step, the target's own.

    Attributes:
      eps: a token this likely always passes.
      delta: scales the bound where p is flat.
    """

    eps: float = 0.09
    delta: float = 0.3

    name = "typical"

    def judge(self, tree, target, uniforms):
        distributions = target.distributions()
        entropy_BT = distributions.entropy().reshape(tree.tokens.shape)
        bound_BT = jnp.minimum(self.eps, self.delta * jnp.exp(-entropy_BT))
        p_BT = target.child_probabilities(tree, distributions)
        above_BT = jnp.take_along_axis(bound_BT, tree.parents, axis=1)
        right_BT = (p_BT > above_BT) & tree.valid
        accepted_BT = uniform.all_above(tree.ancestors, right_BT)
        log_p_BT = jnp.where(p_BT > 0, jnp.log(jnp.where(p_BT > 0, p_BT, 1.0)), 0)
        path_BT = jnp.sum(jnp.where(tree.ancestors, log_p_BT[:, None, :], 0.0), axis=2)
        depth_BT = jnp.where(accepted_BT, tree.depth, -1)
        longest_BT = depth_BT == jnp.max(depth_BT, axis=1, keepdims=True)
        node_B = jnp.argmax(jnp.where(longest_BT, path_BT, -jnp.inf), axis=1)
        node_B = node_B.astype(jnp.int32)
        distribution_VB = target.of_one(node_B)[:, :, 0]
        return Judgement(node_B, distribution_VB, right_BT.astype(target.logits.dtype))
