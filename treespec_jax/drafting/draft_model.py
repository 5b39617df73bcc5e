"""A small language model drafts the tree (SpecInfer, Miao et al., 2305.09781).

Its own cache holds committed tokens only. The tokens that a step emitted wait in a
window and go through the model at the start of the next proposal, in the pass that
gives the root's distribution: one pass per level, none to catch up.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from treespec_jax.cache import pages as paging
from treespec_jax.cache.prefill import run_chunk
from treespec_jax.drafting import growth
from treespec_jax.drafting.protocol import DraftContext
from treespec_jax.models.transformer import Transformer
from treespec_jax.models.views import CacheView
from treespec_jax.trees.shapes import TreeShape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftModelState:
    """The draft model's cache and the tokens it has not seen.

    Attributes:
      pages: per layer [P, K, 2, page, H].
      lengths: int32 [B], tokens in the cache.
      pending: int32 [B, C + 1], emitted tokens not in the cache; the last is the root.
      pending_count: int32 [B].
    """

    pages: tuple[jax.Array, ...]
    lengths: jax.Array
    pending: jax.Array
    pending_count: jax.Array


class DraftModel:
    """See `protocol.Drafter`.

    Args:
      model: of the target's vocabulary.
      shape: of the trees to grow.
      tau: temperature of the estimate that a child is right.
    """

    def __init__(self, model: Transformer, shape: TreeShape, tau: float):
        self.model = model
        self.shape = shape
        self.tau = tau
        self.num_nodes = shape.num_nodes
        self.depth = shape.depth

    @property
    def module(self):
        return self.model

    def with_module(self, module):
        return DraftModel(module, self.shape, self.tau)

    def begin(self, batch, num_pages, page_size):
        dtype = self.model.embedding[...].dtype
        return DraftModelState(
            pages=paging.empty_pages(self.model.config, num_pages, page_size, dtype),
            lengths=jnp.zeros(batch, jnp.int32),
            pending=jnp.zeros((batch, self.depth + 1), jnp.int32),
            pending_count=jnp.zeros(batch, jnp.int32),
        )

    def prefill(self, state, slot, tokens_1T, start, count, page_table_1P):
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

    def propose(self, state, context: DraftContext):
        B, window = state.pending.shape
        held = jnp.where(context.active, state.lengths, 0)
        view = CacheView(state.pages, context.page_table, held)
        chain = jnp.tril(jnp.ones((window, window), bool))
        with jax.named_scope("draft_root"):
            hidden_DR, kv = self.model(
                state.pending,
                held[:, None] + jnp.arange(window),
                jnp.broadcast_to(chain, (B, window, window)),
                view,
            )
            # Only the root's row needs the head.
            hidden_DBW = hidden_DR.reshape(-1, B, window)
            last_B = jnp.maximum(state.pending_count - 1, 0)
            root_DB = jnp.take_along_axis(hidden_DBW, last_B[None, :, None], axis=2)
            logits_BV = self.model.logits(root_DB[:, :, 0])
            pages = paging.commit(
                state.pages,
                context.page_table,
                held,
                kv,
                jnp.broadcast_to(jnp.arange(window), (B, window)),
                state.pending_count,
            )
        lengths = held + state.pending_count
        view = CacheView(pages, context.page_table, lengths)

        def expand(tokens_BW, depth, mask_BWU, scratch):
            positions = context.lengths[:, None] + depth
            hidden_DR, kv = self.model(
                tokens_BW,
                jnp.broadcast_to(positions, tokens_BW.shape),
                mask_BWU,
                view,
                scratch,
            )
            logits = self.model.logits(hidden_DR).reshape(*tokens_BW.shape, -1)
            if scratch is not None:
                kv = tuple(
                    jnp.concatenate(pair, axis=3)
                    for pair in zip(scratch, kv, strict=True)
                )
            return logits, kv

        tree = growth.grow(
            self.shape, context, logits_BV[:, None], expand, tau=self.tau
        )
        state = dataclasses.replace(
            state,
            pages=pages,
            lengths=lengths,
            pending_count=jnp.zeros_like(state.pending_count),
        )
        return tree, state

    def extend(self, state, emitted_BC, features, count_B):
        return dataclasses.replace(state, pending=emitted_BC, pending_count=count_B)
