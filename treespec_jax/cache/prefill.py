"""One chunk of one slot's prompt, into the cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from treespec_jax.cache.pages import commit
from treespec_jax.models.transformer import Transformer
from treespec_jax.models.views import CacheView, Pages


def run_chunk(
    model: Transformer,
    pages: Pages,
    tokens_1T: jax.Array,
    start: jax.Array,
    count: jax.Array,
    page_table_1P: jax.Array,
) -> Pages:
    """Runs a chunk, a chain-shaped tree, and commits it.

    No logits are needed: the last prompt token is not prefilled but becomes the root of
    the first tree, so that the step is the one place where tokens are chosen.

    Args:
      model: whose cache it is.
      pages: of the model.
      tokens_1T: int32 [1, T], the first `count` of them real.
      start: int32, absolute position of the first.
      count: int32.
      page_table_1P: int32 [1, max_pages], the slot's row.

    Returns:
      The pages with `count` rows written from `start`.
    """
    T = tokens_1T.shape[1]
    lengths = jnp.reshape(start, (1,))
    at_1T = jnp.arange(T)[None]
    _, kv = model(
        tokens_1T,
        start + at_1T,
        jnp.tril(jnp.ones((1, T, T), bool)),
        CacheView(pages, page_table_1P, lengths),
    )
    # The last layer's keys come after every read: its own attention is not computed.
    after = kv[-1][0, 0, 0, 0, 0] < jnp.inf
    counts = jnp.reshape(count, (1,))
    return commit(pages, page_table_1P, lengths, kv, at_1T, counts, after)
