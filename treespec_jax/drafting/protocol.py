"""What the engine asks of a drafter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import nnx

from treespec_jax.acceptance.penalties import Penalties
from treespec_jax.acceptance.policy import Sampling
from treespec_jax.cache.pages import CacheLayout
from treespec_jax.trees.shapes import TreeShape
from treespec_jax.trees.token_tree import TokenTree

# expand(tokens [B, W], depth, mask [B, W, E + W], scratch) -> logits [V, B·W], scratch;
# E counts the nodes expanded before, whose rows are in the scratch.
Expand = Callable[[jax.Array, int, jax.Array, Any], tuple[jax.Array, Any]]
# Best tokens of a node over which its children's chances are normalised.
NORMALISED = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftContext:
    """What a drafter may look at when it proposes.

    Attributes:
      active: bool [B]; what an idle slot proposes is thrown away.
      root: int32 [B], the newest emitted token.
      lengths: int32 [B], tokens before the root; the root's absolute position.
      page_table: int32 [B, max_pages], shared with the target.
      sampling: the requests' settings.
      noise: float32 [C, V, B], the noise the target will use after depth 0..C-1; None
        unless the drafter draws "shared".
      uniforms: float32 [B, T, 2] in [0, 1) of the proposals' own stream, for the draw
        of each node; None unless the drafter samples.
      penalties: of the policy; None if no request has any.
    """

    active: jax.Array
    root: jax.Array
    lengths: jax.Array
    page_table: jax.Array
    sampling: Sampling
    noise: jax.Array | None
    uniforms: jax.Array | None = None
    penalties: Penalties | None = None


class Drafter(Protocol):
    """Pure functions over a state of the drafter's own; every shape is static.

    Attributes:
      num_nodes: T, the root included.
      depth: C, levels below the root.
      shape: of the trees that it grows.
      draws: how it draws their nodes (`acceptance.facts`); None for a root alone.
      module: the NNX module whose parameters the drafter uses, or None.
    """

    num_nodes: int
    depth: int
    shape: TreeShape
    draws: str | None
    module: nnx.Module | None

    def with_module(self, module: nnx.Module | None) -> Drafter:
        """The same drafter over other parameters (those bound inside a jit)."""

    def begin(self, batch: int, layout: CacheLayout) -> Any:
        """An empty state for `batch` slots."""

    def prefill(self, state, slot, tokens_1T, start, count, page_table_1P) -> Any:
        """Takes in `count` prompt tokens of one slot at positions from `start`."""

    def insert(self, state, slot, root, length) -> Any:
        """The slot's prompt is in: `length` tokens, then `root` as newest."""

    def propose(self, state, context: DraftContext) -> tuple[TokenTree, Any]:
        """A tree below the root."""

    def extend(self, state, emitted_BC, features, count_B) -> Any:
        """Takes in the first `count` tokens that the last step emitted.

        Args:
          state: the drafter's.
          emitted_BC: int32 [B, C + 1].
          features: the target's hidden rows on the accepted path, [B, C + 1, D].
          count_B: int32 [B]; 0 for an idle slot.
        """
