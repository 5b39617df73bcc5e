"""Plain decoding beside a drafter: what it learns, and what its tree would bring.

A plain step is short, so that a drafter's small operations are a share of it. Therefore
a dispatch of plain steps is, for a drafter without a model, one step that emitted all
of its tokens: the drafter takes them in once. And before the first step a tree may be
grown that nobody verifies: the tokens that come anyway say how much of it would have
been accepted.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from treespec_jax.drafting.none import NoDrafter
from treespec_jax.drafting.protocol import Committed, Drafter, Successors
from treespec_jax.engine.state import DecodeState, Emission
from treespec_jax.trees.token_tree import TokenTree

# Plain steps between rehearsals, of drafters without and with a model.
EVERY, EVERY_WITH_MODEL = 8, 32


def every(drafter: Drafter) -> int:
    """Plain steps between rehearsals, so that these take next to no time."""
    return EVERY if drafter.module is None else EVERY_WITH_MODEL


def tokens_of_step(
    tree: TokenTree, emitted_BS: jax.Array, count_B: jax.Array
) -> jax.Array:
    """float32 [B]: tokens that a step with this tree would have emitted.

    Where the emitted tokens end within the tree, its own estimates go on.

    Args:
      tree: grown before the tokens.
      emitted_BS: int32, after the roots, in order.
      count_B: int32, how many of them are real.
    """
    last = emitted_BS.shape[1] - 1
    said_BT = jnp.take_along_axis(emitted_BS, jnp.clip(tree.depth - 1, 0, last), axis=1)
    came_BT = (tree.tokens == said_BT) & tree.valid & (tree.depth <= count_B[:, None])
    came_BT |= tree.depth == 0
    accepted_BT = ~jnp.any(tree.ancestors & ~came_BT[:, None], axis=2)
    depth_BT = jnp.where(accepted_BT, tree.depth, 0)
    accepted_B = jnp.max(depth_BT, axis=1)
    deepest_B11 = jnp.argmax(depth_BT, axis=1)[:, None, None]
    # The nodes below the deepest accepted one, by their paths from there.
    above_B1T = jnp.take_along_axis(tree.ancestors, deepest_B11, axis=1)
    below_BT = jnp.take_along_axis(tree.ancestors, deepest_B11, axis=2)[:, :, 0]
    below_BT &= tree.valid & ~accepted_BT
    path_BTT = jnp.where(tree.ancestors & ~above_B1T, tree.draft_logprob[:, None], 0.0)
    rest_BT = jnp.where(below_BT, jnp.exp(jnp.sum(path_BTT, axis=2)), 0.0)
    rest_B = jnp.where(accepted_B == count_B, jnp.sum(rest_BT, axis=1), 0.0)
    return 1.0 + accepted_B + rest_B


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """What the target would have said, too, in the steps so far.

    Attributes:
      steps: int32 [], how many.
      best: int32 [B, S, K], see `protocol.Successors`.
      logits: float32 [B, S, K].
    """

    steps: jax.Array
    best: jax.Array
    logits: jax.Array


class Watching(NoDrafter):
    """Stands in for a drafter in plain steps, and collects what it has to be told.

    Its state is `Seen`, or None if the drafter does not want to know.

    Args:
      drafter: that it fits.
      steps: S, of a dispatch.
    """

    @staticmethod
    def fits(drafter: Drafter) -> bool:
        """Whether a drafter can wait for what it has to be told."""
        return drafter.module is None and not drafter.needs.feature_layers

    def __init__(self, drafter: Drafter, steps: int):
        self.needs = drafter.needs
        self._drafter, self._steps = drafter, steps

    def begin(self, batch: int, vocab: int) -> Seen | None:
        """Before the first step of a dispatch."""
        count = min(self.needs.successors, vocab)
        if not count:
            return None
        shape = batch, self._steps, count
        best, logits = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
        return Seen(jnp.zeros((), jnp.int32), best, logits)

    def ingest(self, state: Seen | None, committed: Committed) -> Seen | None:
        if state is None:
            return None

        def with_step(x_BSK, new_B1K):
            return lax.dynamic_update_slice_in_dim(x_BSK, new_B1K, state.steps, 1)

        found = committed.successors
        return Seen(
            state.steps + 1,
            with_step(state.best, found.best),
            with_step(state.logits, found.logits),
        )

    def finish(
        self,
        before: DecodeState,
        after: DecodeState,
        emission: Emission,
        page_table: jax.Array,
    ) -> DecodeState:
        """The state after a dispatch, its drafter told of all steps.

        Args:
          before: the state that the dispatch began with.
          after: what its steps made of that; its `draft` is `Seen`.
          emission: of S plain steps.
          page_table: int32 [B, max_pages].
        """
        emitted_BS, seen = emission.tokens[:, :, 0].T, after.draft
        count_B = after.lengths - before.lengths
        tokens_BS = jnp.concatenate([before.root[:, None], emitted_BS[:, :-1]], axis=1)
        successors = None
        if seen is not None:
            successors = Successors(
                tokens=tokens_BS,
                real=jnp.arange(tokens_BS.shape[1]) < count_B[:, None],
                best=seen.best,
                logits=seen.logits,
                newest=jnp.maximum(count_B - 1, 0),
            )
        committed = Committed(
            slot=None,
            tokens=tokens_BS,
            following=emitted_BS,
            root=after.root,
            start=before.lengths,
            count=count_B,
            features=(),
            page_table=page_table,
            successors=successors,
        )
        draft = self._drafter.ingest(before.draft, committed)
        return dataclasses.replace(after, draft=draft)
