"""A small language model drafts the tree (SpecInfer, Miao et al., 2305.09781).

Its own cache holds committed tokens only. The tokens that a step emitted wait in a
window and go through the model at the start of the next proposal, in the pass that
gives the root's distribution: one pass per level, none to catch up. Those of plain
steps, for which nothing is proposed, gather in a backlog, until one pass takes them in.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from treespec_jax.cache import pages as paging
from treespec_jax.cache.prefill import Chunk, run_chunk
from treespec_jax.drafting import growth
from treespec_jax.drafting.protocol import (
    Committed,
    DraftContext,
    Level,
    Needs,
    NoOptions,
    Sizes,
)
from treespec_jax.models.transformer import Transformer
from treespec_jax.models.views import CacheView, Pages
from treespec_jax.trees.token_tree import TokenTree

# Rows of a pass that takes in what waits.
_ROWS_AT_ONCE = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Backlog:
    """Tokens that the model has not seen, older than those in the window.

    Attributes:
      rows: the tokens, int32 [B, R], and what else waits with them, [B, R, ...].
      count: int32 [B], how many are real.
    """

    rows: tuple[jax.Array, ...]
    count: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftModelState:
    """The draft model's cache and the tokens it has not seen.

    Attributes:
      pages: of the model.
      lengths: int32 [B], tokens in the cache.
      pending: int32 [B, window], emitted tokens not in the cache; the last is the root.
      pending_count: int32 [B].
      backlog: what stands between the cache and `pending`; empty whenever a tree is
        grown. None if every proposal takes in what waits.
    """

    pages: Pages
    lengths: jax.Array
    pending: jax.Array
    pending_count: jax.Array
    backlog: Backlog | None


class DraftModel:
    """See `protocol.Drafter`.

    Its embedding may have fewer or more rows than the target's: models of one
    vocabulary are padded differently, and small ones may lack the latest tokens. It
    never proposes a token that either lacks, and reads one that it lacks as its own
    last row. The text is the target's whatever it proposes.

    Args:
      model: of the target's vocabulary, or of one that begins like it.
      tau: temperature of the estimate that a child is right.
    """

    needs = Needs(in_pages=True, waits=True)
    sources = ("draft model",)
    Options = NoOptions
    # Positions by which its rows trail the tokens that they read.
    lag = 0

    def __init__(self, model: Transformer, tau: float):
        self.module = model
        self.tau = tau

    @classmethod
    def make(cls, model, tau, options):
        return cls(model, tau)

    def with_module(self, module):
        return type(self)(module, self.tau)

    def init(self, sizes: Sizes) -> DraftModelState:
        pending = jnp.zeros((sizes.batch, sizes.window), jnp.int32)
        return DraftModelState(
            pages=paging.empty_pages(self.module.config, sizes.layout),
            lengths=jnp.zeros(sizes.batch, jnp.int32),
            pending=pending,
            pending_count=jnp.zeros(sizes.batch, jnp.int32),
            backlog=empty_backlog((pending,), sizes),
        )

    def ingest(self, state: DraftModelState, committed: Committed) -> DraftModelState:
        if committed.slot is not None:
            return self._ingest_chunk(state, committed)
        emitted_BC, count_B = committed.following, committed.count
        window, width = state.pending.shape[1], emitted_BC.shape[1]
        emitted_BC = jnp.pad(emitted_BC, ((0, 0), (0, window - width)))
        moved_B = count_B > 0
        return dataclasses.replace(
            state,
            pending=jnp.where(moved_B[:, None], emitted_BC, state.pending),
            pending_count=jnp.where(moved_B, count_B, state.pending_count),
        )

    def _ingest_chunk(self, state, committed: Committed) -> DraftModelState:
        """A prompt's chunk goes through the model at once; the root after it waits."""
        slot = committed.slot
        chunk = Chunk(
            self._known(committed.tokens),
            committed.start,
            committed.count,
            committed.page_table,
        )
        pages, _ = run_chunk(self.module, state.pages, chunk)
        length = (committed.start + committed.count)[0]
        return dataclasses.replace(
            state,
            pages=pages,
            lengths=state.lengths.at[slot].set(length),
            pending=state.pending.at[slot, 0].set(committed.root[0]),
            pending_count=state.pending_count.at[slot].set(1),
            backlog=emptied(state.backlog, slot),
        )

    def copy_slot(self, state: DraftModelState, source, destination):
        slots = dataclasses.replace(state, pages=None)
        copied = jax.tree.map(lambda x: x.at[destination].set(x[source]), slots)
        return dataclasses.replace(copied, pages=state.pages)

    def copy_pages(self, state: DraftModelState, copies):
        return dataclasses.replace(state, pages=paging.copy(state.pages, copies))

    def resume(self, state: DraftModelState, committed: Committed):
        # Its rows are in the same pages as the target's; the next chunk sets the rest.
        return state

    def postpone(self, state: DraftModelState, context: DraftContext):
        backlog = state.backlog
        count_B = jnp.where(context.active, state.pending_count, 0)
        column_BR = jnp.arange(backlog.rows[0].shape[1]) - backlog.count[:, None]
        is_new_BR = (column_BR >= 0) & (column_BR < count_B[:, None])
        column_BR = jnp.clip(column_BR, 0, state.pending.shape[1] - 1)

        def joined(old, waiting):
            lead = (*column_BR.shape, *(1,) * (old.ndim - 2))
            new = jnp.take_along_axis(waiting, column_BR.reshape(lead), axis=1)
            return jnp.where(is_new_BR.reshape(lead), new, old)

        rows = tuple(map(joined, backlog.rows, self._waiting(state)))
        return dataclasses.replace(
            state,
            pending_count=state.pending_count - count_B,
            backlog=Backlog(rows, backlog.count + count_B),
        )

    def catch_up(self, state: DraftModelState, page_table, active):
        backlog = state.backlog
        count_B = jnp.where(active, backlog.count, 0)
        # Of a few rows each, since mostly only few wait of the many that may.
        size = math.gcd(_ROWS_AT_ONCE, backlog.rows[0].shape[1])
        passes = (jnp.max(count_B) + size - 1) // size

        def take_in(number: jax.Array, state: DraftModelState) -> DraftModelState:
            first = number * size
            rows = tuple(
                lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in backlog.rows
            )
            taken_B = jnp.clip(count_B - first, 0, size)
            return self._take_in(state, rows, taken_B, page_table)

        with jax.named_scope("catch_up"):
            state = lax.fori_loop(0, passes, take_in, state)
        backlog = Backlog(backlog.rows, backlog.count - count_B)
        return dataclasses.replace(state, backlog=backlog)

    def narrowed(self, state: DraftModelState, width: int, page_table, active):
        rows = self._waiting(state)
        last = rows[0].shape[1] - 1
        if width > last:
            return state
        count_B = jnp.where(active, state.pending_count, 0)
        # All but the root, if they are too many.
        older_B = jnp.where(count_B > width, count_B - 1, 0)
        passes = jnp.any(older_B > 0).astype(jnp.int32)

        def take_in(_, state: DraftModelState) -> DraftModelState:
            return self._take_in(state, rows, older_B, page_table)

        with jax.named_scope("narrow"):
            state = lax.fori_loop(0, passes, take_in, state)
        column_BW = jnp.minimum(older_B[:, None] + jnp.arange(width), last)

        def newest(waiting):
            lead = (*column_BW.shape, *(1,) * (waiting.ndim - 2))
            return jnp.take_along_axis(waiting, column_BW.reshape(lead), axis=1)

        left_B = state.pending_count - older_B
        state = dataclasses.replace(state, pending_count=left_B)
        return self._with_waiting(state, tuple(map(newest, rows)))

    def widened(self, state: DraftModelState, window: int):
        def wide(waiting):
            room = window - waiting.shape[1]
            return jnp.pad(
                waiting, ((0, 0), (0, room), *((0, 0),) * (waiting.ndim - 2))
            )

        return self._with_waiting(state, tuple(map(wide, self._waiting(state))))

    def _take_in(self, state, rows, count_B, page_table) -> DraftModelState:
        """The model's pass over rows that wait.

        Args:
          state: of all slots.
          rows: tokens int32 [B, R], and what else waits with them.
          count_B: int32, how many of them are taken in.
          page_table: int32 [B, max_pages].
        """
        B, R = rows[0].shape
        held_B = jnp.where(count_B > 0, state.lengths, 0)
        column_R = jnp.arange(R)
        forward = self._run(
            rows[0],
            self._above(rows),
            held_B[:, None] + column_R,
            jnp.broadcast_to(column_R[:, None] >= column_R, (B, R, R)),
            CacheView(state.pages, page_table, held_B),
        )
        pages = paging.commit(
            state.pages,
            paging.Destination(page_table, held_B, count_B),
            forward.kv,
            jnp.broadcast_to(column_R, (B, R)),
            after=forward.kv[-1][0, 0, 0, 0, 0] < jnp.inf,
        )
        return dataclasses.replace(state, pages=pages, lengths=state.lengths + count_B)

    def propose(self, state: DraftModelState, shape, context: DraftContext):
        logits_VB, expand, finish = self.begin(state, context)
        tree = growth.grow(shape, context, logits_VB, expand, self.tau)
        return tree, finish(tree)

    def begin(self, state: DraftModelState, context: DraftContext):
        """The pass over the waiting tokens, and what goes on from there.

        Returns:
          float32 logits [V, B] after the roots, `protocol.Expand`, and a function from
          the finished tree to the state after it.
        """
        B, window = state.pending.shape
        held_B = jnp.where(context.active, state.lengths, 0)
        pending_count_B = jnp.where(context.active, state.pending_count, 0)
        view = CacheView(state.pages, context.page_table, held_B)
        column_C = jnp.arange(window)
        is_pending_BC = column_C < pending_count_B[:, None]
        position_BC = held_B[:, None] + column_C
        with jax.named_scope("draft_root"):
            forward = self._run(
                state.pending,
                self._above(self._waiting(state)),
                position_BC,
                jnp.broadcast_to(column_C[:, None] >= column_C, (B, window, window)),
                view,
            )
            # Only the root's row needs the head.
            hidden_DBC = forward.hidden.reshape(-1, B, window)
            last_B = jnp.maximum(pending_count_B - 1, 0)
            root_DB1 = jnp.take_along_axis(hidden_DBC, last_B[None, :, None], axis=2)
            logits_VB = self._logits(root_DB1[:, :, 0], context.vocab)

        def expand(level: Level, scratch):
            # The waiting tokens are not in the cache yet: they are the first rows of
            # the tree, so that a step only reads the cache until all its passes are
            # done. (A CPU copies a cache that is written between two reads.)
            W = level.tokens.shape[1]
            pending = jnp.broadcast_to(is_pending_BC[:, None], (B, W, window))
            position_BE, rows, above_DBE = scratch or (
                position_BC,
                forward.kv,
                root_DB1,
            )
            position_BW = context.lengths[:, None] + level.depth - self.lag
            position_BU = jnp.concatenate(
                [position_BE, jnp.broadcast_to(position_BW, (B, W))], axis=1
            )
            above_DBW = jnp.take_along_axis(above_DBE, level.parents[None], axis=2)
            passed = self._run(
                level.tokens,
                above_DBW.reshape(-1, B * W),
                position_BU,
                jnp.concatenate([pending, level.mask], axis=2),
                view,
                rows,
            )
            rows = tuple(
                jnp.concatenate(pair, axis=3)
                for pair in zip(rows, passed.kv, strict=True)
            )
            outputs_DBW = passed.hidden.reshape(-1, B, W)
            scratch = (
                position_BU,
                rows,
                jnp.concatenate([above_DBE, outputs_DBW], axis=2),
            )
            return self._logits(passed.hidden, context.vocab), scratch

        def finish(tree: TokenTree) -> DraftModelState:
            pages = paging.commit(
                state.pages,
                paging.Destination(context.page_table, held_B, pending_count_B),
                forward.kv,
                jnp.broadcast_to(column_C, (B, window)),
                after=jnp.all(tree.tokens >= 0),
            )
            return dataclasses.replace(
                state,
                pages=pages,
                lengths=state.lengths + pending_count_B,
                pending_count=state.pending_count - pending_count_B,
            )

        return logits_VB, expand, finish

    def _run(self, tokens_BT, above_DR, positions_BU, mask_BTU, view, scratch=None):
        """A pass over rows, of which a language model reads the tokens alone.

        Args:
          tokens_BT: int32.
          above_DR: what the passes made of the rows that they go on from.
          positions_BU: int32.
          mask_BTU: bool.
          view: of the cache.
          scratch: see `Transformer`.
        """
        tokens_BT = self._known(tokens_BT)
        return self.module(tokens_BT, positions_BU, mask_BTU, view, scratch)

    def _waiting(self, state) -> tuple[jax.Array, ...]:
        """What is in the window: tokens [B, window], and what else [B, window, ...]."""
        return (state.pending,)

    def _with_waiting(self, state, rows: tuple[jax.Array, ...]):
        """The state with other rows in the window."""
        return dataclasses.replace(state, pending=rows[0])

    def _above(self, rows: tuple[jax.Array, ...]) -> jax.Array | None:
        """[D, R], what rows that wait go on from."""
        return None

    def _known(self, tokens: jax.Array) -> jax.Array:
        """Token ids with those that the model lacks replaced by its last one."""
        return jnp.minimum(tokens, self.module.config.vocab_size - 1)

    def _logits(self, hidden_DR: jax.Array, vocab: int) -> jax.Array:
        """float32 [V, R] over the target's tokens, -inf for those the model lacks."""
        logits_VR = self.module.logit_columns(hidden_DR)
        lacking = vocab - logits_VR.shape[0]
        if lacking <= 0:
            return logits_VR[:vocab]
        return jnp.pad(logits_VR, ((0, lacking), (0, 0)), constant_values=-jnp.inf)


def empty_backlog(waiting: tuple[jax.Array, ...], sizes: Sizes) -> Backlog | None:
    """None if there is to be none.

    Args:
      waiting: like the rows of the window.
      sizes: of the state.
    """
    if not sizes.backlog:
        return None
    lead = sizes.batch, sizes.backlog
    rows = tuple(jnp.zeros((*lead, *x.shape[2:]), x.dtype) for x in waiting)
    return Backlog(rows, jnp.zeros(sizes.batch, jnp.int32))


def emptied(backlog: Backlog | None, slot: jax.Array) -> Backlog | None:
    """The backlog once a text begins in a slot, of which nothing waits yet."""
    if backlog is None:
        return None
    return Backlog(backlog.rows, backlog.count.at[slot].set(0))
