"""The token rule: each drafted token is tested by itself.

Chains: Leviathan et al. 2211.17192, Chen et al. 2302.01318. Trees: SpecInfer 2305.09781
(siblings drawn with replacement), Sequoia 2402.12374 (without).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from treespec_jax.acceptance import families, uniform
from treespec_jax.acceptance.protocol import Judgement


@dataclasses.dataclass(frozen=True)
class TokenRule(uniform.UniformRule):
    """Siblings are tested in the order in which they were drawn.

    A child x is accepted with min(1, P[x] / Q[x]); if it is not, P becomes
    norm((P - Q)+) and Q loses x. The last token is a sample of P.
    """

    name = "token"

    def judge(self, tree, scores_VBT, uniforms):
        V, B, T = scores_VBT.shape
        if tree.proposal is None:
            return uniform.alone(scores_VBT)
        family = families.children(tree)
        chance_BT = jnp.zeros((B, T), scores_VBT.dtype)
        slot = jnp.arange(B)[:, None, None]
        for nodes, columns, most in families.levels(tree.proposal):
            own = family.of(nodes, most)
            weights, _, _ = families.recur(
                families.targeted(scores_VBT, nodes),
                families.drafted(tree.proposal, columns, V),
                jnp.ones((B, len(nodes)), scores_VBT.dtype),
                own,
                tree.proposal.replacement,
                finish=False,
            )
            chance_BT = chance_BT.at[slot, own.number].set(weights, mode="drop")
        passed_BT = uniforms.accept < chance_BT
        earlier = uniform.earlier_siblings(tree.parents)
        beaten_BT = jnp.any(earlier & passed_BT[:, None, :], axis=2)
        accepted_BT = uniform.all_above(tree.ancestors, passed_BT & ~beaten_BT)
        node_B = jnp.argmax(jnp.where(accepted_BT, tree.depth, -1), axis=1)
        law_VB = families.last_law(
            tree, scores_VBT, family, node_B, jnp.ones(B, scores_VBT.dtype)
        )
        return Judgement(node_B.astype(jnp.int32), law_VB, chance_BT)
