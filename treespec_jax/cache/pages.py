"""The paged cache on the device: per layer [P, K, 2, page, W], rows of W >= H numbers.

`commit` is the only writer in the program. Page 0 belongs to nobody: rows that must
not be kept are written there, so that every write is unconditional and in place.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from pallas_kernels.tree_attention import quantize_rows
from treespec_jax.config import ModelConfig
from treespec_jax.models.views import Pages
from treespec_jax.sharding import Placement

TRASH_PAGE = 0
# Up to here rows are written one by one, in place; beyond, one scatter per layer.
MAX_ROW_WRITES = 64


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """What the caches of target and drafter have in common.

    Attributes:
      num_pages: the trash page included.
      page_size: rows per page.
      lanes: the width of a row is padded to a multiple of it.
      int8: keep rows rounded, with their scales.
      place: on which devices; a model whose heads cannot be cut so is held by each.
    """

    num_pages: int
    page_size: int
    lanes: int = 1
    int8: bool = False
    place: Placement = Placement()


def empty_pages(config: ModelConfig, layout: CacheLayout, dtype) -> Pages:
    """Zeroed pages, one array per layer, for rows of `dtype` of the model `config`."""
    width = -(-config.head_dim // layout.lanes) * layout.lanes
    heads = config.num_kv_heads
    shape = (layout.num_pages, heads, 2, layout.page_size, width)

    def layer():
        if not layout.int8:
            return jnp.zeros(shape, dtype)
        # Scales lie along the lanes too.
        rows = -(-layout.page_size // layout.lanes) * layout.lanes
        return jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:3], rows), jnp.float32)

    layers = tuple(layer() for _ in range(config.num_layers))
    return Pages(layers, layout.place.of_heads(heads))


def commit(
    pages: Pages,
    page_table: jax.Array,
    lengths: jax.Array,
    kv: tuple[jax.Array, ...],
    path_BC: jax.Array,
    count_B: jax.Array,
    after: jax.Array,
) -> Pages:
    """Writes the first `count` rows of `path` after each slot's prefix.

    Args:
      pages: donated or carried, updated in place; on a mesh by each device its own.
      page_table: int32 [B, max_pages].
      lengths: int32 [B], rows of prefix before the write.
      kv: per layer [B, K, 2, T, H], a forward's own rows.
      path_BC: int32 [B, C], which of the T rows to write, in order.
      count_B: int32 [B], how many of them; the rest go to the trash page.
      after: bool [], always true, but known only once every read of these pages is
        done. Without such a dependency XLA may order the write first, and then copies
        the whole cache for the reads.

    Returns:
      The pages with the rows written.
    """
    write, place = _write, pages.place
    if place.mesh is not None:
        heads, whole = place.heads_spec, PartitionSpec()
        specs = heads, whole, whole, heads, whole, whole, whole
        write = jax.shard_map(
            _write, mesh=place.mesh, in_specs=specs, out_specs=heads, check_vma=False
        )
    with jax.named_scope("commit"):
        layers = write(pages.layers, page_table, lengths, kv, path_BC, count_B, after)
    return dataclasses.replace(pages, layers=layers)


def _write(layers, page_table, lengths, kv, path_BC, count_B, after):
    """`commit` of the heads that one device holds."""
    B, C = path_BC.shape
    quantised = isinstance(layers[0], tuple)
    _, K, _, page, _ = jax.tree.leaves(layers)[0].shape
    many = B * C > MAX_ROW_WRITES
    offset_C = jnp.arange(C)
    at_BC = lengths[:, None] + offset_C
    # Nothing here is negative: XLA need not be told what to do if it were.
    slot_BC = jnp.minimum(lax.div(at_BC, page), page_table.shape[1] - 1)
    ids_BC = page_table.at[jnp.arange(B)[:, None], slot_BC].get(
        mode="promise_in_bounds", wrap_negative_indices=False
    )
    kept_BC = (offset_C < count_B[:, None]) & after
    ids_BC = jnp.where(kept_BC, ids_BC, TRASH_PAGE)
    row_BC = lax.rem(at_BC, page)

    def place(pages, rows_BK2T):
        """Writes rows [B, K, 2, T, H], or what there is one of per row [B, K, 2, T]."""
        rows_BK2T = rows_BK2T.astype(pages.dtype)
        wide = rows_BK2T.shape[4:]
        if many and not quantised:
            part = tuple(map(slice, wide))
            rows_BTK2 = jnp.moveaxis(rows_BK2T, 3, 1)
            rows_BCK2 = rows_BTK2[jnp.arange(B)[:, None], path_BC]
            return pages.at[ids_BC, :, :, row_BC, *part].set(rows_BCK2)

        def write_row(pages, source):
            slot, node, page_id, row = source
            zeros = (0,) * len(wide)
            new = lax.dynamic_slice(
                rows_BK2T,
                (slot, 0, 0, node, *zeros),
                (1, K, 2, 1, *wide),
                allow_negative_indices=False,
            )
            at = page_id, 0, 0, row, *zeros
            return lax.dynamic_update_slice(
                pages, new, at, allow_negative_indices=False
            )

        if many:
            # On a TPU, XLA copies the whole of an int8 array to scatter into it.
            def body(i, pages):
                return write_row(pages, [x[i] for x in sources])

            return lax.fori_loop(0, B * C, body, pages)
        return functools.reduce(write_row, zip(*sources, strict=True), pages)

    # Slot, node, page and row of every write, the same for all layers.
    slots = [i // C for i in range(B * C)]
    sources = [x.reshape(-1) for x in (path_BC, ids_BC, row_BC)]
    if many:
        sources = [jnp.asarray(slots), *sources]
    else:
        sources = [slots, *map(jnp.unstack, sources)]

    def write(layer_pages, layer_kv):
        if not quantised:
            return place(layer_pages, layer_kv)
        return tuple(map(place, layer_pages, quantize_rows(layer_kv)))

    return tuple(write(p, k) for p, k in zip(layers, kv, strict=True))
