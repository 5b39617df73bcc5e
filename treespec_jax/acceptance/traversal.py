"""The traversal rule (Weng et al. 2505.12398): block verification for trees.

On a chain it is the block rule. Nodes are visited children first, siblings in the order
in which they were sampled; the first that accepts ends the walk, the root always does.
A node's weight when its turn comes follows from the tree alone (`families`), so that
the walk is a search for the first of the accepting nodes in that order.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from treespec_jax.acceptance import families, uniform
from treespec_jax.acceptance.protocol import Judgement
from treespec_jax.trees.token_tree import TokenTree


@dataclasses.dataclass(frozen=True)
class TraversalRule(uniform.UniformRule):
    """A node accepts with the weight that its rejected children left it."""

    name = "traversal"

    def judge(self, tree, target, uniforms):
        V, B, T = target.logits.shape
        if tree.proposal is None:
            return uniform.alone(target)
        family = families.children(tree)
        # Weights on arrival, and once all children are rejected.
        arrival_BT = jnp.zeros((B, T), target.logits.dtype).at[:, 0].set(1.0)
        probability_BT = arrival_BT
        slot = jnp.arange(B)[:, None, None]
        for nodes, columns, count in families.levels(tree.proposal):
            children = family.of(nodes, count)
            weights, rest, _ = families.recur(
                target.of(nodes),
                families.drafted(tree.proposal, columns, V),
                arrival_BT[:, nodes],
                children,
                replacement=tree.proposal.replacement,
                finish="weight",
            )
            arrival_BT = arrival_BT.at[slot, children.number].set(weights, mode="drop")
            probability_BT = probability_BT.at[slot, children.number].set(
                weights, mode="drop"
            )
            probability_BT = probability_BT.at[:, nodes].set(rest)
        accepted_BT = (uniforms.accept < probability_BT).at[:, 0].set(True)
        turn_BT = jnp.where(accepted_BT, visiting_order(tree), T)
        node_B = jnp.argmin(turn_BT, axis=1)
        weight_B = jnp.take_along_axis(arrival_BT, node_B[:, None], axis=1)[:, 0]
        distribution_VB = families.last_distribution(
            tree, target, family, node_B, weight_B
        )
        return Judgement(node_B.astype(jnp.int32), distribution_VB, probability_BT)


def visiting_order(tree: TokenTree) -> jax.Array:
    """int32 [B, T], place of every node in post-order, siblings by their number."""
    size_BT = jnp.sum(tree.ancestors, axis=1, dtype=jnp.int32)
    earlier = uniform.earlier_siblings(tree.parents)
    before_BT = jnp.sum(jnp.where(earlier, size_BT[:, None, :], 0), axis=2)
    passed_BT = jnp.sum(jnp.where(tree.ancestors, before_BT[:, None, :], 0), axis=2)
    return passed_BT + size_BT - 1
