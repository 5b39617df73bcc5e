"""The token rule: each drafted token is tested by itself.

Chains: Leviathan et al. 2211.17192, Chen et al. 2302.01318. Trees: SpecInfer 2305.09781
(siblings sampled with replacement), Sequoia 2402.12374 (without).
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp

from treespec_jax.acceptance import families, uniform
from treespec_jax.acceptance.protocol import UNSEEN, Judgement
from treespec_jax.branches import branch


@dataclasses.dataclass(frozen=True)
class TokenRule(uniform.UniformRule):
    """Siblings are tested in the order in which they were sampled.

    A child x is accepted with min(1, P[x] / Q[x]); if it is not, P becomes
    norm((P - Q)+) and Q loses x. The last token is a sample of P.
    """

    name = "token"

    def judge(self, tree, target, uniforms):
        if tree.proposal is None:
            return uniform.alone(target)
        if max(tree.proposal.max_children) == 1:
            return _chain(tree, target, uniforms)
        return _walk(tree, target, uniforms)


def _chain(tree, target, uniforms):
    """All tests at once: they take one entry of each column."""
    family = families.children(tree)
    probability_BT = jnp.exp(
        jnp.minimum(0.0, families.log_ratios(tree, target.distributions()))
    )
    passed_BT = (uniforms.accept < probability_BT) & tree.valid
    accepted_BT = uniform.all_above(tree.ancestors, passed_BT)
    node_B = jnp.argmax(jnp.where(accepted_BT, tree.depth, -1), axis=1)
    node_B = node_B.astype(jnp.int32)
    whole_B = jnp.ones(node_B.shape, probability_BT.dtype)
    distribution_VB = families.last_distribution(tree, target, family, node_B, whole_B)
    return Judgement(node_B, distribution_VB, probability_BT)


def _walk(tree, target, uniforms):
    """Level by level, looking at nothing but the node where the walk is."""
    V, B, T = target.logits.shape
    dtype = target.logits.dtype
    family = families.children(tree)
    slot_B1 = jnp.arange(B)[:, None]
    proposal = tree.proposal

    def visit(count, state):
        node_B, walking_B, distribution_VB, probability_BT = state
        children = family.of_one(node_B, count)
        weights, _, rest_VB1 = families.recur(
            target.of_one(node_B),
            families.drafted_one(tree, node_B, V),
            jnp.ones((B, 1), dtype),
            children,
            replacement=proposal.replacement,
            finish="both",
        )
        weights_BX, number_BX = weights[:, 0], children.number[:, 0]
        accept_BX = uniforms.accept[slot_B1, jnp.minimum(number_BX, T - 1)]
        passed_BX = accept_BX < weights_BX
        first_B1 = jnp.argmax(passed_BX, axis=1)[:, None]
        next_B = jnp.take_along_axis(number_BX, first_B1, axis=1)[:, 0]
        goes_on_B = jnp.any(passed_BX, axis=1)
        asked_BX = jnp.where(walking_B[:, None], number_BX, T)
        return (
            jnp.where(walking_B & goes_on_B, next_B, node_B),
            walking_B & goes_on_B,
            jnp.where(walking_B & ~goes_on_B, rest_VB1[:, :, 0], distribution_VB),
            probability_BT.at[slot_B1, asked_BX].set(weights_BX, mode="drop"),
        )

    def end(state):
        node_B, walking_B, distribution_VB, probability_BT = state
        leaf_VB = target.of_one(node_B)[:, :, 0]
        distribution_VB = jnp.where(walking_B, leaf_VB, distribution_VB)
        return node_B, jnp.zeros_like(walking_B), distribution_VB, probability_BT

    state = (
        jnp.zeros(B, jnp.int32),
        jnp.ones(B, bool),
        jnp.zeros((V, B), dtype),
        jnp.full((B, T), UNSEEN, dtype),
    )
    for work in [
        *(functools.partial(visit, count) for count in proposal.max_children),
        end,
    ]:
        # Where nobody walks any more, it changes nothing.
        straight = target.sampling.known.straight
        walking = True if straight else jnp.any(state[1])
        state = branch(
            walking, functools.partial(work, state), functools.partial(tuple, state)
        )
    node_B, _, distribution_VB, probability_BT = state
    return Judgement(node_B, distribution_VB, probability_BT)
