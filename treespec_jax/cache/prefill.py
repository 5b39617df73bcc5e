"""One chunk of one slot's prompt, into the cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from treespec_jax.cache.pages import Destination, commit
from treespec_jax.models.transformer import Forward, Transformer
from treespec_jax.models.views import CacheView, Pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """A run of a prompt's tokens.

    Attributes:
      tokens: int32 [1, T], the first `count` of them real.
      start: int32 [1], absolute position of the first.
      count: int32 [1], may be 0.
      page_table: int32 [1, max_pages], the slot's row.
      top: K, likeliest tokens to tell beside the log p of the prompt's (`engine.step`);
        None: neither. Another number is another program.
    """

    tokens: jax.Array
    start: jax.Array
    count: jax.Array
    page_table: jax.Array
    top: int | None = dataclasses.field(default=None, metadata=dict(static=True))


def run_chunk(
    model: Transformer, pages: Pages, chunk: Chunk, feature_layers: tuple[int, ...] = ()
) -> tuple[Pages, Forward]:
    """Runs a chunk, a chain-shaped tree, and commits it.

    No logits are needed: the last prompt token is not prefilled but becomes the root of
    the first tree, so that the step is the one place where tokens are chosen.

    Args:
      model: whose cache it is.
      pages: of the model.
      chunk: where its tokens go.
      feature_layers: see `Transformer`.

    Returns:
      The pages with `count` rows written from `start`, and the pass.
    """
    T = chunk.tokens.shape[1]
    row_1T = jnp.arange(T)[None]
    forward = model(
        chunk.tokens,
        chunk.start[:, None] + row_1T,
        jnp.tril(jnp.ones((1, T, T), bool)),
        CacheView(pages, chunk.page_table, chunk.start),
        feature_layers=feature_layers,
    )
    # The last layer's keys come after every read: its own attention is not computed.
    after = forward.kv[-1][0, 0, 0, 0, 0] < jnp.inf
    destination = Destination(chunk.page_table, chunk.start, chunk.count)
    return commit(pages, destination, forward.kv, row_1T, after), forward
