"""What a forward pass sees of the cache: read-only pages, tables and lengths."""

from __future__ import annotations

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheView:
    """A paged prefix, read only.

    Attributes:
      pages: per layer [P, K, 2, page, H].
      page_table: int32 [B, max_pages], page of each run of `page` positions.
      lengths: int32 [B], tokens of prefix per slot.
    """

    pages: tuple[jax.Array, ...]
    page_table: jax.Array
    lengths: jax.Array
