"""Exact match under common random numbers: the default, lossless rule.

The token that plain decoding would emit at every node is already known (`choose`); the
tree is followed as long as it holds that token. What is emitted never depends on the
tree, so any drafter and any shape give the text of plain decoding at the same seed.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from treespec_jax.acceptance import policy
from treespec_jax.acceptance.protocol import Verdict, path_to
from treespec_jax.trees.token_tree import TokenTree


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """See `protocol.Rule`; its randomness is the noise [V, B, C + 1] of the policy."""

    name = "exact"

    def randomness(self, sampling, root_B, nodes, depth, vocab):
        return policy.step_noise(sampling, root_B + 1, depth + 1, vocab)

    def decide(self, tree, logits_VR, sampling, randomness, max_depth):
        choice_BT = policy.choose(logits_VR, tree.depth, randomness, sampling)
        return exact_match(tree, choice_BT, max_depth)


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
