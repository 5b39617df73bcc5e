"""The block rule on chains (Sun et al. 2403.10444): never accepts less than token."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from treespec_jax.acceptance import families, uniform
from treespec_jax.acceptance.protocol import Judgement


@dataclasses.dataclass(frozen=True)
class BlockRule(uniform.UniformRule):
    """The last node that passes its test counts, whatever failed before it.

    With w_0 = 1 and w_i = min(1, w_{i-1} p(X_i) / q(X_i)), node i < c passes with
    h_i = S_i / (S_i + 1 - w_i), S_i = sum (w_i p(·|X_1..i) - q(·|X_1..i))+, and node c
    with w_c. The last token is a sample of norm((w_k p - q)+), or of p after node c.
    """

    name = "block"

    def judge(self, tree, scores_VBT, uniforms):
        V, B, T = scores_VBT.shape
        if tree.proposal is None:
            return uniform.alone(scores_VBT)
        proposal, slot_B1 = tree.proposal, jnp.arange(B)[:, None]
        total_BT = uniform.log_totals(scores_VBT)
        tokens_BC = tree.tokens[:, 1:]
        above_C = jnp.arange(T - 1)
        log_p = scores_VBT[tokens_BC, slot_B1, above_C] - total_BT[:, :-1]
        log_q = proposal.scores[tokens_BC, slot_B1, above_C] - proposal.log_total
        # The chain ends before its first invalid node.
        valid_BC = jnp.cumprod(tree.valid[:, 1:], axis=1, dtype=jnp.int32) > 0
        # Where both are 0 the token is not to be accepted; where q alone is, it is.
        gain_BC = jnp.where(log_p > -jnp.inf, log_p - log_q, -jnp.inf)
        log_w = [jnp.zeros(B, scores_VBT.dtype)]
        for at in range(T - 1):
            grown_B = jnp.minimum(0.0, log_w[-1] + gain_BC[:, at])
            log_w.append(jnp.where(valid_BC[:, at], grown_B, -jnp.inf))
        w_BT = jnp.exp(jnp.stack(log_w, axis=1))
        # Of nodes that have a child; the root needs none, it is always accepted.
        chance_BT = w_BT
        if T > 2:
            p = jnp.exp(scores_VBT[:, :, 1:-1] - total_BT[:, 1:-1])
            q = families.drafted(proposal, slice(1, None), V)
            mass = jnp.sum(jnp.maximum(w_BT[:, 1:-1] * p - q, 0.0), axis=0)
            inner = families.covered(mass, w_BT[:, 1:-1])
            inner = jnp.where(valid_BC[:, 1:], inner, w_BT[:, 1:-1])
            chance_BT = chance_BT.at[:, 1:-1].set(inner)
        passed_BT = (uniforms.accept < chance_BT).at[:, 0].set(True)
        node_B = jnp.max(jnp.where(passed_BT, jnp.arange(T), 0), axis=1)
        law_VB = families.last_law(
            tree,
            scores_VBT,
            families.children(tree),
            node_B,
            jnp.take_along_axis(w_BT, node_B[:, None], axis=1)[:, 0],
        )
        return Judgement(node_B.astype(jnp.int32), law_VB, chance_BT)
