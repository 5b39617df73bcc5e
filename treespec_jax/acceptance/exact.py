"""Exact match under common random numbers: the default, lossless rule.

The token that plain decoding would emit at every node is already known (`choose`); the
tree is followed as long as it holds that token. What is emitted never depends on the
tree, so any drafter and any shape give the text of plain decoding at the same seed.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from treespec_jax.acceptance.protocol import Verdict, columns, path_to
from treespec_jax.branches import branch
from treespec_jax.sampling import policy, select
from treespec_jax.trees.token_tree import TokenTree


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """See `protocol.Rule`; it decides by the noise shared with the drafter."""

    name = "exact"

    def decide(self, tree, logits_VR, sampling, randomness, max_depth):
        B, T = tree.tokens.shape
        noise = randomness.noise()

        def greedy():
            choice_BT = select.argmax(logits_VR).reshape(B, T)
            return exact_match(tree, choice_BT, max_depth)

        def sampled():
            def choose(depth, node_B):
                column_VB = columns(logits_VR, node_B)
                return policy.choose(column_VB, noise.after(depth), sampling)

            return walk(tree, choose, max_depth)

        def sampled_at_once():
            noise_VBT = noise.of_nodes(tree.depth, max_depth)
            choice_R = policy.choose(logits_VR, noise_VBT, sampling)
            return exact_match(tree, choice_R.reshape(B, T), max_depth)

        straight = sampling.known.straight
        return branch(
            sampling.all_greedy, greedy, sampled_at_once if straight else sampled
        )


def walk(tree: TokenTree, choose, max_depth: int) -> Verdict:
    """`exact_match` that asks for the choices of the accepted nodes only.

    Noise and truncation of a column cost more than reading it, and most nodes of a
    tree are not accepted.

    Args:
      tree: siblings must carry different tokens.
      choose: from a depth and a node of it per slot [B] to the tokens [B] after them.
      max_depth: C, the static depth of the tree.
    """
    B, T = tree.tokens.shape
    below_T = jnp.arange(T) > 0

    def visit(state):
        depth, node_B, _, verdict = state
        walking_B = verdict.count == depth
        choice_B = choose(depth, node_B)
        child_BT = (tree.parents == node_B[:, None]) & below_T & tree.valid
        child_BT &= tree.tokens == choice_B[:, None]
        found_B = walking_B & jnp.any(child_BT, axis=1)
        next_B = jnp.argmax(child_BT, axis=1).astype(jnp.int32)
        verdict = Verdict(
            path=verdict.path.at[:, depth + 1].set(
                jnp.where(found_B, next_B, 0), mode="drop"
            ),
            count=verdict.count + found_B,
            emitted=verdict.emitted.at[:, depth].set(choice_B),
        )
        node_B = jnp.where(found_B, next_B, node_B)
        return depth + 1, node_B, jnp.any(found_B), verdict

    nothing = jnp.zeros((B, max_depth + 1), jnp.int32)
    start = Verdict(nothing, jnp.zeros(B, jnp.int32), nothing)
    state = jnp.int32(0), jnp.zeros(B, jnp.int32), jnp.bool_(True), start
    # A tree that is its root, which is plain decoding, needs no loop.
    state = visit(state)
    if max_depth > 0:
        state = lax.while_loop(lambda state: state[2], visit, state)
    return state[3]


def exact_match(tree: TokenTree, choice_BT: jax.Array, max_depth: int) -> Verdict:
    """Follows children that carry exactly the token chosen at their parent.

    Args:
      tree: siblings must carry different tokens.
      choice_BT: int32, the policy's token after each node.
      max_depth: C, the static depth of the tree.
    """
    wanted_BT = jnp.take_along_axis(choice_BT, tree.parents, axis=1)
    right_BT = (tree.tokens == wanted_BT) & tree.valid
    right_BT = right_BT.at[:, 0].set(True)
    accepted_BT = jnp.all(~tree.ancestors | right_BT[:, None, :], axis=-1)
    leaf_B = jnp.argmax(jnp.where(accepted_BT, tree.depth, -1), axis=1)
    path_BC, count_B = path_to(tree, leaf_B, max_depth)
    return Verdict(path_BC, count_B, jnp.take_along_axis(choice_BT, path_BC, axis=1))
