"""What a forward pass sees of the cache: read-only pages, tables and lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax

from treespec_jax.sharding import Placement


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages(Sequence):
    """The pages of one model.

    Attributes:
      layers: per layer [P, K, 2, page, W >= H], or joined [P, K, 1, page, W >= 2 H]
        (see `Operands.kv_pages`), or a pair of such pages in int8 and their float32
        scales [P, K, 2, X >= page].
      placement: where they lie.
    """

    layers: tuple[jax.Array | tuple[jax.Array, jax.Array], ...]
    placement: Placement = dataclasses.field(
        default=Placement(), metadata={"static": True}
    )

    def __getitem__(self, layer):
        return self.layers[layer]

    def __iter__(self) -> Iterator:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheView:
    """A paged prefix, read only.

    Attributes:
      pages: of the model.
      page_table: int32 [B, max_pages], page of each run of `page` positions.
      lengths: int32 [B], tokens of prefix per slot.
    """

    pages: Pages
    page_table: jax.Array
    lengths: jax.Array
