"""A small language model drafts the tree (SpecInfer, Miao et al., 2305.09781).

Its own cache holds committed tokens only. The tokens that a step emitted wait in a
window and go through the model at the start of the next proposal, in the pass that
gives the root's distribution: one pass per level, none to catch up.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from treespec_jax.cache import pages as paging
from treespec_jax.cache.prefill import run_chunk
from treespec_jax.drafting import growth
from treespec_jax.drafting.protocol import DraftContext
from treespec_jax.models.transformer import Transformer
from treespec_jax.models.views import CacheView, Pages
from treespec_jax.trees.shapes import TreeShape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftModelState:
    """The draft model's cache and the tokens it has not seen.

    Attributes:
      pages: of the model.
      lengths: int32 [B], tokens in the cache.
      pending: int32 [B, C + 1], emitted tokens not in the cache; the last is the root.
      pending_count: int32 [B].
    """

    pages: Pages
    lengths: jax.Array
    pending: jax.Array
    pending_count: jax.Array


class DraftModel:
    """See `protocol.Drafter`.

    Its embedding may have fewer or more rows than the target's: models of one
    vocabulary are padded differently, and small ones may lack the latest tokens. It
    never proposes a token that either lacks, and reads one that it lacks as its own
    last row. The text is the target's whatever it proposes.

    Args:
      model: of the target's vocabulary, or of one that begins like it.
      shape: of the trees to grow.
      tau: temperature of the estimate that a child is right.
      vocab_size: V, rows of the target's embedding; None: as many as the model's.
      draws: how the nodes of a tree are drawn, see `acceptance.facts`.
    """

    def __init__(
        self,
        model: Transformer,
        shape: TreeShape,
        tau: float,
        vocab_size: int | None = None,
        draws: str = "shared",
    ):
        self.model = model
        self.vocab_size = vocab_size or model.config.vocab_size
        self.shape = shape
        self.tau = tau
        self.draws = draws
        self.num_nodes = shape.num_nodes
        self.depth = shape.depth

    @property
    def module(self):
        return self.model

    def with_module(self, module):
        return DraftModel(module, self.shape, self.tau, self.vocab_size, self.draws)

    def begin(self, batch, layout):
        dtype = self.model.embedding[...].dtype
        return DraftModelState(
            pages=paging.empty_pages(self.model.config, layout, dtype),
            lengths=jnp.zeros(batch, jnp.int32),
            pending=jnp.zeros((batch, self.depth + 1), jnp.int32),
            pending_count=jnp.zeros(batch, jnp.int32),
        )

    def prefill(self, state, slot, tokens_1T, start, count, page_table_1P):
        tokens_1T = self._known(tokens_1T)
        pages = run_chunk(
            self.model, state.pages, tokens_1T, start, count, page_table_1P
        )
        return dataclasses.replace(state, pages=pages)

    def insert(self, state, slot, root, length):
        return dataclasses.replace(
            state,
            lengths=state.lengths.at[slot].set(length),
            pending=state.pending.at[slot, 0].set(root),
            pending_count=state.pending_count.at[slot].set(1),
        )

    def propose(self, state, context: DraftContext, grow=None):
        """See `protocol.Drafter`; `grow` decides which nodes to expand."""
        grow = grow or functools.partial(growth.grow, draws=self.draws)
        B, window = state.pending.shape
        held = jnp.where(context.active, state.lengths, 0)
        view = CacheView(state.pages, context.page_table, held)
        at_C = jnp.arange(window)
        is_pending_BC = at_C < state.pending_count[:, None]
        pending_at_BC = held[:, None] + at_C
        with jax.named_scope("draft_root"):
            hidden_DR, pending_kv = self.model(
                self._known(state.pending),
                pending_at_BC,
                jnp.broadcast_to(at_C[:, None] >= at_C, (B, window, window)),
                view,
            )
            # Only the root's row needs the head.
            hidden_DBC = hidden_DR.reshape(-1, B, window)
            last_B = jnp.maximum(state.pending_count - 1, 0)
            root_DB1 = jnp.take_along_axis(hidden_DBC, last_B[None, :, None], axis=2)
            logits_VB = self._logits(root_DB1[:, :, 0])

        def expand(tokens_BW, depth, mask_BWU, scratch):
            # The waiting tokens are not in the cache yet: they are the first rows of
            # the tree, so that a step only reads the cache until all its passes are
            # done. (A CPU copies a cache that is written between two reads.)
            W = tokens_BW.shape[1]
            pending = jnp.broadcast_to(is_pending_BC[:, None], (B, W, window))
            at_BE, rows = (pending_at_BC, pending_kv) if scratch is None else scratch
            at_BW = jnp.broadcast_to(context.lengths[:, None] + depth, (B, W))
            at_BU = jnp.concatenate([at_BE, at_BW], axis=1)
            hidden_DR, kv = self.model(
                self._known(tokens_BW),
                at_BU,
                jnp.concatenate([pending, mask_BWU], axis=2),
                view,
                rows,
            )
            rows = tuple(
                jnp.concatenate(pair, axis=3) for pair in zip(rows, kv, strict=True)
            )
            return self._logits(hidden_DR), (at_BU, rows)

        tree = grow(self.shape, context, logits_VB, expand, tau=self.tau)
        pages = paging.commit(
            state.pages,
            context.page_table,
            held,
            pending_kv,
            jnp.broadcast_to(at_C, (B, window)),
            state.pending_count,
            after=jnp.all(tree.tokens >= 0),
        )
        state = dataclasses.replace(
            state,
            pages=pages,
            lengths=held + state.pending_count,
            pending_count=jnp.zeros_like(state.pending_count),
        )
        return tree, state

    def extend(self, state, emitted_BC, features, count_B):
        return dataclasses.replace(state, pending=emitted_BC, pending_count=count_B)

    def _known(self, tokens: jax.Array) -> jax.Array:
        """Token ids with those that the model lacks replaced by its last one."""
        rows = self.model.config.vocab_size
        return jnp.minimum(tokens, rows - 1) if rows < self.vocab_size else tokens

    def _logits(self, hidden_DR: jax.Array) -> jax.Array:
        """float32 [V, R] over the target's tokens, -inf for those the model lacks."""
        logits_VR = self.model.logit_columns(hidden_DR)
        lacking = self.vocab_size - logits_VR.shape[0]
        if lacking == 0:
            return logits_VR
        if lacking < 0:
            return logits_VR[: self.vocab_size]
        return jnp.pad(logits_VR, ((0, lacking), (0, 0)), constant_values=-jnp.inf)
