"""Exact match under common random numbers: the default, lossless rule.

The token that plain decoding would emit at every node is already known (`choose`); the
tree is followed as long as it holds that token. What is emitted never depends on the
tree, so any drafter and any shape give the text of plain decoding at the same seed.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from treespec_jax.trees.token_tree import TokenTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a rule decided, per slot.

    Attributes:
      path: int32 [B, C + 1], nodes from the root down; entries past `count` are 0.
      count: int32 [B], accepted nodes below the root.
      emitted: int32 [B, C + 1], `count` accepted tokens, then the bonus.
    """

    path: jax.Array
    count: jax.Array
    emitted: jax.Array


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
    leaf_B1 = jnp.argmax(jnp.where(accepted_BT, tree.depth, -1), axis=1)[:, None]
    count_B = jnp.take_along_axis(tree.depth, leaf_B1, axis=1)[:, 0]
    on_path_BT = jnp.take_along_axis(tree.ancestors, leaf_B1[:, :, None], axis=1)[:, 0]
    at_depth_BCT = tree.depth[:, None, :] == jnp.arange(max_depth + 1)[:, None]
    node_T = jnp.arange(tree.tokens.shape[1])
    path_BC = jnp.sum(jnp.where(at_depth_BCT & on_path_BT[:, None], node_T, 0), axis=2)
    path_BC = path_BC.astype(jnp.int32)
    emitted_BC = jnp.take_along_axis(choice_BT, path_BC, axis=1)
    return Verdict(path_BC, count_B.astype(jnp.int32), emitted_BC)
