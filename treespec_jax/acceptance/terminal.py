"""The terminal form for trees without samples: two samples in all.

For a tree that is fixed before the target is looked at, no lossless rule beats "sample
x from p at each node, follow the child that carries it". The walk ends at node n with
the probability of the path to n times that of p(·|n) outside n's children; so the last
node is sampled at once from these, and the token after it from what p leaves there.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from treespec_jax.acceptance import uniform
from treespec_jax.acceptance.protocol import Judgement
from treespec_jax.sampling import draw


@dataclasses.dataclass(frozen=True)
class TerminalRule(uniform.UniformRule):
    """`Judgement.probability` is that of ending at a node; accept[:, 0] samples it."""

    name = "terminal"

    def judge(self, tree, target, uniforms):
        V, B, T = target.logits.shape
        p_BT = target.child_probabilities(tree, target.distributions())
        p_BT = jnp.where(tree.valid, p_BT, 0.0).at[:, 0].set(1.0)
        on_path = jnp.where(tree.ancestors, p_BT[:, None, :], 1.0)
        path_BT = jnp.prod(on_path, axis=2)
        slot_B1 = jnp.arange(B)[:, None]
        below_BT = jnp.where(jnp.arange(T) > 0, p_BT, 0.0)
        inside_BT = jnp.zeros_like(p_BT).at[slot_B1, tree.parents].add(below_BT)
        probability_BT = path_BT * jnp.maximum(1.0 - inside_BT, 0.0)
        node_B = draw.invert(probability_BT.T, uniforms.accept[:, 0])
        distribution_VB = target.of_one(node_B)[:, :, 0]
        child_BT = (tree.parents == node_B[:, None]) & tree.valid
        child_BT &= jnp.arange(T) > 0
        drop_BT = jnp.where(child_BT, tree.tokens, V)
        rest_VB = distribution_VB.at[drop_BT, slot_B1].set(0.0, mode="drop")
        # Rounding may leave a node probability to end where nothing is outside its
        # children.
        some_B = jnp.sum(rest_VB, axis=0) > 0
        return Judgement(
            node_B, jnp.where(some_B, rest_VB, distribution_VB), probability_BT
        )
