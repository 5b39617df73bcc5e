"""What decides a step: three choices that know nothing of each other.

1. The *policy* is the distribution that the user wants samples of (`sampling.policy`).
2. The *rule* says which nodes of the tree are kept, and what token comes after them.
   Under a lossless rule the emitted tokens have the policy's distribution, whatever
   that is.
3. *Randomness* is asked of a provider (`sampling.randomness`), the drafter's too. It is
   an input of a rule, never made inside one, so that a test can enumerate it.

A rule is a small frozen dataclass, hashable, static under jit; `compatibility` says of
each rule which trees it is lossless for, without jax. Its work is batched, fixed in
shape and stays on the device. Distributions are columns, [V, B, nodes].

One that keeps nothing but the target's own token after the root:

  @dataclasses.dataclass(frozen=True)
  class Nothing:
      name = "nothing"

      def decide(self, tree, logits_VR, sampling, randomness, max_depth):
          root_B = jnp.zeros(tree.tokens.shape[0], jnp.int32) noise_VB =
          randomness.noise().after(jnp.int32(0)) token_B =
          policy.choose(columns(logits_VR, root_B), noise_VB, sampling) path_BC, count_B
          = path_to(tree, root_B, max_depth) return Verdict(path_BC, count_B,
          jnp.zeros_like(path_BC).at[:, 0].set(token_B))
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from treespec_jax.sampling import draw
from treespec_jax.sampling.policy import Sampling
from treespec_jax.sampling.randomness import Randomness
from treespec_jax.sampling.streams import Uniforms
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
      weights: [V, B], the distribution of the token after it, up to a factor.
      probability: [B, T], what each node's own uniform was compared with (accepted if
        below). Given the tree it depends on no uniform, so that a test can feed
        uniforms to either side of it and know how likely that is; UNSEEN for a node
        that was not asked.
    """

    node: jax.Array
    weights: jax.Array
    probability: jax.Array


class Rule(Protocol):
    """Decides which nodes are kept.

    Attributes:
      name: key of `compatibility.RULES`.
    """

    name: str

    def decide(
        self,
        tree: TokenTree,
        logits_VR: jax.Array,
        sampling: Sampling,
        randomness: Randomness,
        max_depth: int,
    ) -> Verdict:
        """Judges a tree.

        Args:
          tree: proposed as the rule wants it (`compatibility`).
          logits_VR: float32, the target's, R = B·T columns, B major.
          sampling: the policy's settings per slot.
          randomness: of the step; to be asked outside of conditionals.
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
    right_depth_BCT = tree.depth[:, None, :] == jnp.arange(max_depth + 1)[:, None]
    node_T = jnp.arange(tree.tokens.shape[1])
    path_BC = jnp.sum(
        jnp.where(right_depth_BCT & on_path_BT[:, None], node_T, 0), axis=2
    )
    return path_BC.astype(jnp.int32), count_B.astype(jnp.int32)


def finalize(
    tree: TokenTree, judgement: Judgement, uniforms: Uniforms, max_depth: int
) -> Verdict:
    """Samples the last token of a judgement."""
    path_BC, count_B = path_to(tree, judgement.node, max_depth)
    bonus_B = draw.one(judgement.weights, uniforms.last)
    below_BC = jnp.take_along_axis(tree.tokens, jnp.roll(path_BC, -1, axis=1), axis=1)
    column_C = jnp.arange(max_depth + 1)
    emitted_BC = jnp.where(column_C < count_B[:, None], below_BC, bonus_B[:, None])
    return Verdict(path_BC, count_B, emitted_BC.astype(jnp.int32))
