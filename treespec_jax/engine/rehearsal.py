"""Plain decoding beside a drafter: what it learns, and what its tree would bring.

A plain step is short, so that a drafter's small operations are a share of it, and the
pass of a drafter's model even more so. Therefore a dispatch of plain steps is, for a
drafter, one step that emitted all of its tokens: it takes them in once, and they wait
for its model together with those of more such dispatches. And before the
first step a tree may be grown that nobody verifies, in a variant of the program: the
tokens that come anyway say how much of it would have been accepted
(`engine.expectation`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from treespec_jax.drafting.none import NoDrafter
from treespec_jax.drafting.protocol import Committed, Drafter, Successors
from treespec_jax.engine.state import DecodeState, Emission
from treespec_jax.models.transformer import Transformer
from treespec_jax.speculation import Speculation

# Rows of a model's pass over what waits, up to which a few more cost next to nothing.
FEW_ROWS = 8
# Tokens that wait for a drafter's model behind those: one pass for so many plain steps,
# and none if the text ends before.
BACKLOG = 64


def window(speculation: Speculation, steps: int) -> int:
    """Tokens that a drafter is told of at once, but for prompts.

    Args:
      speculation: with its shapes.
      steps: S, of a dispatch.
    """
    least = speculation.depth + 1
    plain = any(shape.depth == 0 for shape in speculation.shapes)
    return max(least, steps) if plain and steps <= max(least, FEW_ROWS) else least


def backlog(speculation: Speculation, steps: int) -> int:
    """Tokens that can wait for a drafter's model besides; 0 if none do.

    Args:
      speculation: with its shapes.
      steps: S, of a dispatch.
    """
    plain = any(shape.depth == 0 for shape in speculation.shapes)
    patient = speculation.drafter.needs.waits and plain
    return BACKLOG if patient and Watching.fits(speculation, steps) else 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """What the target would have said, too, in the steps so far.

    Attributes:
      steps: int32 [], how many.
      best: int32 [B, S, K], see `protocol.Successors`; None if nobody asks.
      logits: float32 [B, S, K], likewise.
      features: per layer of `Needs.feature_layers` [B, S, D].
    """

    steps: jax.Array
    best: jax.Array | None
    logits: jax.Array | None
    features: tuple[jax.Array, ...]


class Watching(NoDrafter):
    """Stands in for a drafter in plain steps, and collects what it has to be told.

    Its state is `Seen`.

    Args:
      drafter: that it stands in for.
      steps: S, of a dispatch.
    """

    @staticmethod
    def fits(speculation: Speculation, steps: int) -> bool:
        """Whether the drafter can wait for what it has to be told."""
        modelless = speculation.drafter.module is None
        return modelless or steps <= window(speculation, steps)

    def __init__(self, drafter: Drafter, steps: int):
        self.needs = drafter.needs
        self._drafter, self._steps = drafter, steps

    def begin(self, batch: int, target: Transformer) -> Seen:
        """Before the first step of a dispatch."""
        lead = batch, self._steps
        count = min(self.needs.successors, target.config.vocab_size)
        width, dtype = target.config.embed_dim, target.types.dtype
        return Seen(
            steps=jnp.zeros((), jnp.int32),
            best=jnp.zeros((*lead, count), jnp.int32) if count else None,
            logits=jnp.zeros((*lead, count), jnp.float32) if count else None,
            features=tuple(
                jnp.zeros((*lead, width), dtype) for _ in self.needs.feature_layers
            ),
        )

    def ingest(self, state: Seen, committed: Committed) -> Seen:
        found = committed.successors
        new = dataclasses.replace(
            state,
            best=None if found is None else found.best,
            logits=None if found is None else found.logits,
            features=committed.features,
        )
        seen = jax.tree.map(
            lambda x_BSX, new_B1X: lax.dynamic_update_slice_in_dim(
                x_BSX, new_B1X.astype(x_BSX.dtype), state.steps, 1
            ),
            dataclasses.replace(state, steps=None),
            dataclasses.replace(new, steps=None),
        )
        return dataclasses.replace(seen, steps=state.steps + 1)

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
        if seen.best is not None:
            successors = Successors(
                tokens=tokens_BS,
                real=jnp.arange(tokens_BS.shape[1]) < count_B[:, None],
                best=seen.best,
                logits=seen.logits,
                newest=jnp.maximum(count_B - 1, 0),
                path=jnp.broadcast_to(
                    jnp.arange(emitted_BS.shape[1]), emitted_BS.shape
                ),
            )
        committed = Committed(
            slot=None,
            tokens=tokens_BS,
            following=emitted_BS,
            root=after.root,
            start=before.lengths,
            count=count_B,
            features=seen.features,
            page_table=page_table,
            successors=successors,
        )
        draft = self._drafter.ingest(before.draft, committed)
        return dataclasses.replace(after, draft=draft)
