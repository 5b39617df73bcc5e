"""One decoder layer drafts from the target's own hidden rows (EAGLE; `models.eagle`).

Row i of its cache pairs the target's features at position i with the token after it, so
that the row of the newest token is at the position before that token's. Rows of
accepted tokens hold true features; those of a tree's nodes, which hold the layer's own
outputs instead, are never kept. The rows that a step completed wait in a window and go
through the layer at the start of the next proposal, as a draft model's tokens do.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from treespec_jax.cache import pages as paging
from treespec_jax.drafting.draft_model import (
    DraftModel,
    DraftModelState,
    emptied,
    empty_backlog,
)
from treespec_jax.drafting.protocol import Committed, Needs, Sizes
from treespec_jax.models.drafter_config import EagleOptions
from treespec_jax.models.eagle import EagleModel, spread
from treespec_jax.models.views import CacheView


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EagleState(DraftModelState):
    """The layer's cache, and rows that it has not seen.

    Attributes:
      hidden: [B, window, D], the fused features of the rows that wait; `pending` holds
        the token after each.
    """

    hidden: jax.Array


class Eagle(DraftModel):
    """See `protocol.Drafter`.

    Args:
      model: the layer, with an embedding and a head.
      tau: temperature of the estimate that a child is right.
    """

    sources = ("eagle",)
    # They say how a checkpoint is to be read, which is done by now.
    Options = EagleOptions
    lag = 1

    def __init__(self, model: EagleModel, tau: float):
        super().__init__(model, tau)
        self.needs = Needs(
            feature_layers=model.config.feature_layers,
            in_pages=True,
            next_tokens=self.lag,
            waits=True,
        )

    def init(self, sizes: Sizes) -> EagleState:
        layer = self.module.config.layer
        window = sizes.batch, sizes.window
        none_B = jnp.zeros(sizes.batch, jnp.int32)
        dtype = self.module.types.dtype
        pending = jnp.zeros(window, jnp.int32)
        hidden = jnp.zeros((*window, layer.embed_dim), dtype)
        return EagleState(
            pages=paging.empty_pages(layer, sizes.layout),
            lengths=none_B,
            pending=pending,
            pending_count=none_B,
            backlog=empty_backlog((pending, hidden), sizes),
            hidden=hidden,
        )

    def ingest(self, state: EagleState, committed: Committed) -> EagleState:
        hidden_BCD = self._fused(committed)
        if committed.slot is not None:
            return self._ingest_rows(state, committed, hidden_BCD)
        state = super().ingest(state, committed)
        window = state.hidden.shape[1]
        lacking = (0, 0), (0, window - hidden_BCD.shape[1]), (0, 0)
        moved_B11 = (committed.count > 0)[:, None, None]
        hidden = jnp.where(moved_B11, jnp.pad(hidden_BCD, lacking), state.hidden)
        return dataclasses.replace(state, hidden=hidden)

    def _fused(self, committed: Committed) -> jax.Array:
        """[n, C, D] of the committed rows."""
        n, C = committed.tokens.shape
        columns = tuple(x.reshape(n * C, -1).T for x in committed.features)
        return self.module.fuse(columns).T.reshape(n, C, -1)

    def _ingest_rows(self, state, committed: Committed, hidden_1TD) -> EagleState:
        """A prompt's rows go through the layer at once.

        The last one waits too: the next proposal reads its output. A prompt of one
        token leaves no row; its token waits with a row of zeros, which is never kept.
        """
        slot, tokens_1T = committed.slot, committed.following
        T = tokens_1T.shape[1]
        row_1T = jnp.arange(T)[None]
        forward = self._run(
            tokens_1T,
            hidden_1TD[0].T,
            committed.start[:, None] + row_1T,
            jnp.tril(jnp.ones((1, T, T), bool)),
            CacheView(state.pages, committed.page_table, committed.start),
        )
        written = paging.Destination(
            committed.page_table, committed.start, committed.count
        )
        after = forward.kv[-1][0, 0, 0, 0, 0] < jnp.inf
        pages = paging.commit(state.pages, written, forward.kv, row_1T, after)
        length = (committed.start + committed.count)[0]
        last = jnp.maximum(committed.count[0] - 1, 0)
        last_D = jnp.where(committed.count[0] > 0, hidden_1TD[0, last], 0)
        waits = jnp.minimum(length, 1)
        return dataclasses.replace(
            state,
            pages=pages,
            lengths=state.lengths.at[slot].set(length - waits),
            pending=state.pending.at[slot, 0].set(committed.root[0]),
            pending_count=state.pending_count.at[slot].set(waits),
            backlog=emptied(state.backlog, slot),
            hidden=state.hidden.at[slot, 0].set(last_D),
        )

    def _waiting(self, state: EagleState):
        return state.pending, state.hidden

    def _with_waiting(self, state: EagleState, rows):
        pending, hidden = rows
        return dataclasses.replace(state, pending=pending, hidden=hidden)

    def _above(self, rows) -> jax.Array:
        hidden_BRD = rows[1]
        return hidden_BRD.reshape(-1, hidden_BRD.shape[2]).T

    def _run(self, tokens_BT, above_DR, positions_BU, mask_BTU, view, scratch=None):
        # A row without features may stand before the text's beginning.
        positions_BU = jnp.maximum(positions_BU, 0)
        return self.module(tokens_BT, above_DR, positions_BU, mask_BTU, view, scratch)

    def _logits(self, hidden_DR: jax.Array, vocab: int) -> jax.Array:
        """float32 [V, R] over the target's tokens, -inf for those it does not know."""
        logits_VR = self.module.logit_columns(hidden_DR)
        if self.module.token_ids is None:
            return logits_VR
        return spread(logits_VR, self.module.token_ids[...], vocab)
