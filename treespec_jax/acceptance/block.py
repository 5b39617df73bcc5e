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

    def judge(self, tree, target, uniforms):
        V, B, T = target.logits.shape
        if tree.proposal is None:
            return uniform.alone(target)
        dtype = target.logits.dtype
        laws = target.laws()
        gain_BT = families.log_ratios(tree, laws)
        # The chain ends before its first invalid node.
        valid_BT = jnp.cumprod(tree.valid, axis=1, dtype=jnp.int32) > 0
        log_w = [jnp.zeros(B, dtype)]
        for at in range(1, T):
            # No weight stays none, whatever comes.
            grown_B = jnp.minimum(0.0, log_w[-1] + gain_BT[:, at])
            some_B = valid_BT[:, at] & (log_w[-1] > -jnp.inf)
            log_w.append(jnp.where(some_B, grown_B, -jnp.inf))
        w_BT = jnp.exp(jnp.stack(log_w, axis=1))
        # Of nodes that have a child; the root needs none, it is always accepted.
        chance_BT = w_BT
        if T > 2:
            p = laws.probs().reshape(V, B, T)[:, :, 1:-1]
            q = families.drafted(tree.proposal, slice(1, None), V)
            mass = jnp.sum(jnp.maximum(w_BT[:, 1:-1] * p - q, 0.0), axis=0)
            inner = families.covered(mass, w_BT[:, 1:-1])
            inner = jnp.where(valid_BT[:, 2:], inner, w_BT[:, 1:-1])
            chance_BT = chance_BT.at[:, 1:-1].set(inner)
        passed_BT = (uniforms.accept < chance_BT).at[:, 0].set(True)
        node_B = jnp.max(jnp.where(passed_BT, jnp.arange(T), 0), axis=1)
        law_VB = families.last_law(
            tree,
            target,
            families.children(tree),
            node_B,
            jnp.take_along_axis(w_BT, node_B[:, None], axis=1)[:, 0],
        )
        return Judgement(node_B.astype(jnp.int32), law_VB, chance_BT)
