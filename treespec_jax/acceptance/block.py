"""The block rule on chains (Sun et al. 2403.10444): never accepts less than token."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax

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
        distributions = target.distributions()
        gain_BT = families.log_ratios(tree, distributions)
        # The chain ends before its first invalid node.
        valid_BT = jnp.cumprod(tree.valid, axis=1, dtype=jnp.int32) > 0
        log_w = [jnp.zeros(B, dtype)]
        for node in range(1, T):
            # No weight stays none, whatever comes.
            grpassing_B = jnp.minimum(0.0, log_w[-1] + gain_BT[:, node])
            some_B = valid_BT[:, node] & (log_w[-1] > -jnp.inf)
            log_w.append(jnp.where(some_B, grpassing_B, -jnp.inf))
        w_BT = jnp.exp(jnp.stack(log_w, axis=1))
        node_B, probability_BT = _last_passing(tree, target, uniforms, w_BT, valid_BT)
        distribution_VB = families.last_distribution(
            tree,
            target,
            families.children(tree),
            node_B,
            jnp.take_along_axis(w_BT, node_B[:, None], axis=1)[:, 0],
        )
        return Judgement(node_B.astype(jnp.int32), distribution_VB, probability_BT)


def _last_passing(tree, target, uniforms, w_BT, valid_BT):
    """The last node that passes [B], and h of the nodes that were asked, w of others.

    As h_i <= w_i, only a node whose uniform is below w_i is asked, the deepest first.
    """
    V, B, T = target.logits.shape
    node_T = jnp.arange(T)
    open_BT = (uniforms.accept < w_BT).at[:, 0].set(True)
    # The root and a node without a child need no sum.
    plain_BT = (node_T == 0) | ~jnp.pad(valid_BT[:, 1:], ((0, 0), (0, 1)))

    def pick(x_BT, node_B):
        return jnp.take_along_axis(x_BT, node_B[:, None], axis=1)[:, 0]

    def deepest(open_BT):
        return jnp.max(jnp.where(open_BT, node_T, 0), axis=1)

    def ask(carry):
        node_B, done_B, open_BT, probability_BT = carry
        weight_B = pick(w_BT, node_B)
        p_VB = target.of_one(node_B)[:, :, 0]
        q_VB = families.drafted_one(tree, node_B, V)[:, :, 0]
        uncovered_B = jnp.sum(jnp.maximum(weight_B * p_VB - q_VB, 0.0), axis=0)
        passing_B = families.covered(uncovered_B, weight_B)
        asked_BT = (node_T == node_B[:, None]) & ~done_B[:, None]
        probability_BT = jnp.where(asked_BT, passing_B[:, None], probability_BT)
        passed_B = pick(uniforms.accept, node_B) < passing_B
        open_BT &= ~(asked_BT & ~passed_B[:, None])
        node_B = deepest(open_BT)
        done_B |= passed_B | pick(plain_BT, node_B)
        return node_B, done_B, open_BT, probability_BT

    if target.sampling.known.straight:
        # All are asked at once; those below the last that passes were asked in vain.
        nodes = np.asarray(tree.proposal.nodes)
        q_VBE = families.drafted(tree.proposal, slice(None), V)
        w_BE = w_BT[:, nodes]
        uncovered_VBE = jnp.maximum(w_BE * target.of(nodes) - q_VBE, 0.0)
        passing_BE = families.covered(jnp.sum(uncovered_VBE, axis=0), w_BE)
        passing_BT = w_BT.at[:, nodes].set(passing_BE)
        node_B = deepest(open_BT & (plain_BT | (uniforms.accept < passing_BT)))
        asked_BT = open_BT & ~plain_BT & (node_T >= node_B[:, None])
        return node_B, jnp.where(asked_BT, passing_BT, w_BT)

    node_B = deepest(open_BT)
    carry = node_B, pick(plain_BT, node_B), open_BT, w_BT
    node_B, _, _, probability_BT = lax.while_loop(
        lambda carry: ~jnp.all(carry[1]), ask, carry
    )
    return node_B, probability_BT
