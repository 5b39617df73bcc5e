"""What decides a step: three choices that know nothing of each other.

1. The *policy* is the distribution that the user wants samples of; `policy.laws`
   works it out after the nodes of a tree that a rule looks at.
2. The *rule* says which nodes of the tree are kept, and what token comes after them.
   Under a lossless rule the emitted tokens have the policy's law, whatever it is.
3. *Randomness* comes from `streams`, or for the exact rule from the noise shared with
   the drafter (`noise.Noise`). It is an input of a rule, never made inside one,
   so that a test can enumerate it.

A rule is a small frozen dataclass, hashable, static under jit; `facts` says of each
rule which trees it is lossless for, without jax. Its work is batched, fixed in shape
and stays on the device. Distributions are columns, [V, B, nodes].
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from treespec_jax.acceptance import draw
from treespec_jax.acceptance.policy import Sampling
from treespec_jax.acceptance.streams import Uniforms
from treespec_jax.trees.token_tree import TokenTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a rule decided, per slot.

    Attributes:
      path: int32 [B, C + 1], nodes from the root down; entries past `count` are 0.
      count: int32 [B], accepted nodes below the root.
      emitted: int32 [B, C + 1], `count` accepted tokens, then the bonus; what stands
        behind that means nothing.
    """

    path: jax.Array
    count: jax.Array
    emitted: jax.Array


UNSEEN = -1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Judgement:
    """A sampling rule's decision before the last token is drawn.

    Attributes:
      node: int32 [B], the last accepted node.
      mass: [V, B], the law of the token after it, up to a factor.
      chance: [B, T], what each node's own uniform was compared with (accepted if
        below). Given the tree it depends on no uniform, so that a test can feed
        uniforms to either side of it and know how likely that is; UNSEEN for a node
        that was not asked.
    """

    node: jax.Array
    mass: jax.Array
    chance: jax.Array


class Rule(Protocol):
    """Decides which nodes are kept.

    Attributes:
      name: key of `facts.FACTS`.
    """

    name: str

    def randomness(
        self, sampling: Sampling, root_B: jax.Array, nodes: int, depth: int, vocab: int
    ) -> Any:
        """What `decide` needs, for roots at absolute positions `root_B`."""

    def decide(
        self,
        tree: TokenTree,
        logits_VR: jax.Array,
        sampling: Sampling,
        randomness: Any,
        max_depth: int,
    ) -> Verdict:
        """Judges a tree.

        Args:
          tree: drawn as the rule wants it (`facts`).
          logits_VR: float32, the target's, R = B·T columns, B major.
          sampling: the policy's settings per slot.
          randomness: of `randomness`.
          max_depth: C, the static depth of the tree.
        """


def columns(x_VR: jax.Array, node_B: jax.Array) -> jax.Array:
    """Column [V, B] of one node per slot of x, R = B·T columns, B major."""
    B = node_B.shape[0]
    column_B = node_B + x_VR.shape[1] // B * jnp.arange(B, dtype=jnp.int32)
    # Behind the barrier nothing reads the long rows of x twice.
    return lax.optimization_barrier(jnp.take(x_VR, column_B, axis=1, mode="clip"))


def path_to(
    tree: TokenTree, leaf_B: jax.Array, max_depth: int
) -> tuple[jax.Array, jax.Array]:
    """Nodes from the root to `leaf` [B, C + 1], padded with 0, and its depth [B]."""
    leaf_B1 = leaf_B[:, None]
    count_B = jnp.take_along_axis(tree.depth, leaf_B1, axis=1)[:, 0]
    on_path_BT = jnp.take_along_axis(tree.ancestors, leaf_B1[:, :, None], axis=1)[:, 0]
    at_depth_BCT = tree.depth[:, None, :] == jnp.arange(max_depth + 1)[:, None]
    node_T = jnp.arange(tree.tokens.shape[1])
    path_BC = jnp.sum(jnp.where(at_depth_BCT & on_path_BT[:, None], node_T, 0), axis=2)
    return path_BC.astype(jnp.int32), count_B.astype(jnp.int32)


def settle(
    tree: TokenTree, judgement: Judgement, uniforms: Uniforms, max_depth: int
) -> Verdict:
    """Draws the last token and writes the verdict down."""
    path_BC, count_B = path_to(tree, judgement.node, max_depth)
    bonus_B = draw.one(judgement.mass, uniforms.last)
    below_BC = jnp.take_along_axis(tree.tokens, jnp.roll(path_BC, -1, axis=1), axis=1)
    at_C = jnp.arange(max_depth + 1)
    emitted_BC = jnp.where(at_C < count_B[:, None], below_BC, bonus_B[:, None])
    return Verdict(path_BC, count_B, emitted_BC.astype(jnp.int32))
