"""The paged cache on the device: per layer [P, K, 2, page, W], rows of W >= H numbers.

Where rows are padded to whole lanes and have room for both, a key and its value share
one: [P, K, 1, page, W], see `pallas_kernels.tree_attention.page_shape`.

`commit` is the only writer of rows in the program; `copy` copies whole pages. Page 0
belongs to nobody: rows that must not be kept are written there, so that every write is
unconditional and in place.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from pallas_kernels.tree_attention import page_shape, quantize_rows
from treespec_jax.branches import on_gpu
from treespec_jax.cache.allocator import TRASH_PAGE
from treespec_jax.config import ModelConfig
from treespec_jax.models.views import Pages
from treespec_jax.sharding import Placement

# Up to here rows are written one by one, in place; beyond, one scatter per layer.
MAX_ROW_WRITES = 64


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """What the caches of target and drafter have in common.

    Attributes:
      num_pages: the trash page included.
      page_size: rows per page.
      dtype: of the rows; "int8" keeps them rounded, with their scales.
      lanes: the width of a row is padded to a multiple of it.
      placement: on which devices; each holds a model whose heads cannot be cut so.
    """

    num_pages: int
    page_size: int
    dtype: str = "float32"
    lanes: int = 1
    placement: Placement = Placement()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Copies:
    """Pages or slots to copy over others, one after the other.

    No page is the source of one copy and the destination of another.

    Attributes:
      sources: int32 [N], the first `count` of them real.
      destinations: int32 [N].
      count: int32 [].
    """

    sources: jax.Array
    destinations: jax.Array
    count: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Destination:
    """Where rows are written: after each slot's prefix.

    Attributes:
      page_table: int32 [B, max_pages].
      lengths: int32 [B], rows of prefix before the write.
      counts: int32 [B], rows to write.
    """

    page_table: jax.Array
    lengths: jax.Array
    counts: jax.Array


def empty_pages(config: ModelConfig, layout: CacheLayout) -> Pages:
    """Zeroed pages, one array per layer, for rows of the model `config`."""
    heads, page = config.num_kv_heads, layout.page_size
    shape = page_shape(layout.num_pages, heads, page, config.head_dim, layout.lanes)

    def layer():
        if layout.dtype != "int8":
            return jnp.zeros(shape, layout.dtype)
        # Scales lie along the lanes too.
        rows = -(-layout.page_size // layout.lanes) * layout.lanes
        scales = jnp.zeros((*shape[:2], 2, rows), jnp.float32)
        return jnp.zeros(shape, jnp.int8), scales

    layers = tuple(layer() for _ in range(config.num_layers))
    return Pages(layers, layout.placement.of_heads(heads))


def copy(pages: Any, copies: Copies) -> Any:
    """Copies pages over others, in place.

    Args:
      pages: any pytree of arrays [P, ...], donated or carried.
      copies: which.
    """

    def copy_one(i, pages):
        source, destination = copies.sources[i], copies.destinations[i]

        def move(x):
            page = lax.dynamic_index_in_dim(x, source, keepdims=True)
            return lax.dynamic_update_index_in_dim(x, page, destination, 0)

        return jax.tree.map(move, pages)

    with jax.named_scope("copy_pages"):
        return lax.fori_loop(0, copies.count, copy_one, pages)


def commit(
    pages: Pages,
    destination: Destination,
    kv: tuple[jax.Array, ...],
    path_BC: jax.Array,
    after: jax.Array,
) -> Pages:
    """Writes the first `counts` rows of `path` after each slot's prefix.

    Args:
      pages: donated or carried, updated in place; on a mesh by each device its own.
      destination: of the rows; those past `counts` go to the trash page.
      kv: per layer [B, K, 2, T, H], a forward's own rows.
      path_BC: int32 [B, C], which of the T rows to write, in order.
      after: bool [], always true, but known only once every read of these pages is
        done. Without such a dependency XLA may order the write first, and then copies
        the whole cache for the reads.

    Returns:
      The pages with the rows written.
    """
    write, placement = _write, pages.placement
    if placement.mesh is not None:
        heads, whole = placement.heads_spec, PartitionSpec()
        specs = heads, whole, heads, whole, whole
        write = jax.shard_map(
            _write,
            mesh=placement.mesh,
            in_specs=specs,
            out_specs=heads,
            check_vma=False,
        )
    with jax.named_scope("commit"):
        layers = write(pages.layers, destination, kv, path_BC, after)
    return dataclasses.replace(pages, layers=layers)


def _write(layers, destination: Destination, kv, path_BC, after):
    """`commit` of the heads that one device holds."""
    B, C = path_BC.shape
    lengths, page_table = destination.lengths, destination.page_table
    page = jax.tree.leaves(layers)[0].shape[3]
    offset_C = jnp.arange(C)
    position_BC = lengths[:, None] + offset_C
    # Nothing here is negative: XLA need not be told what to do if it were.
    slot_BC = jnp.minimum(lax.div(position_BC, page), page_table.shape[1] - 1)
    ids_BC = page_table.at[jnp.arange(B)[:, None], slot_BC].get(
        mode="promise_in_bounds", wrap_negative_indices=False
    )
    wanted_BC = (offset_C < destination.counts[:, None]) & after
    ids_BC = jnp.where(wanted_BC, ids_BC, TRASH_PAGE)
    corners = path_BC, ids_BC, lax.rem(position_BC, page)
    many = B * C > MAX_ROW_WRITES

    def write(pages, kv_BK2TH):
        if not isinstance(pages, tuple):
            rows = _joined(kv_BK2TH, pages)
            return _put(pages, rows, corners, many, scatter=True)
        # On a TPU, XLA copies the whole of an int8 array to scatter into it.
        values, scales = quantize_rows(kv_BK2TH)
        parts = zip(pages, (_joined(values, pages[0]), scales), strict=True)
        return tuple(_put(*part, corners, many, scatter=False) for part in parts)

    return tuple(map(write, layers, kv))


def _joined(kv_BK2TH: jax.Array, pages: jax.Array) -> jax.Array:
    """[B, K, 1, T, 2 H] where pages hold a value behind its key, else as given."""
    if pages.shape[2] == 2:
        return kv_BK2TH
    return jnp.concatenate([kv_BK2TH[:, :, :1], kv_BK2TH[:, :, 1:]], axis=-1)


# Traced once for all layers.
@functools.partial(jax.jit, static_argnames=("many", "scatter"))
def _put(pages, rows_BK2T, corners, many: bool, scatter: bool):
    """Writes rows [B, K, 2, T, H], or what there is one of per row [B, K, 2, T].

    Args:
      pages: of one layer.
      rows_BK2T: of the same layer; as many as pages have of each, 2 or 1 joined.
      corners: int32 [B, C] each: which of the T rows, its page, and its row there.
      many: too many rows to write each by an operation of its own.
      scatter: many rows are written by a scatter, not in a loop.
    """
    rows_BK2T = rows_BK2T.astype(pages.dtype)
    arguments = pages, rows_BK2T, corners
    if many and scatter:
        return _scatter(*arguments)
    # On a GPU every write is a kernel, and a loop waits for the host.
    one_by_one = functools.partial(_put_rows, loop=many)
    return on_gpu(_scatter, one_by_one, *arguments)


def _scatter(pages, rows_BK2T, corners):
    """`_put` as one operation."""
    path_BC, ids_BC, row_BC = corners
    part = tuple(map(slice, rows_BK2T.shape[4:]))
    rows_BTK2 = jnp.moveaxis(rows_BK2T, 3, 1)
    rows_BCK2 = rows_BTK2[jnp.arange(len(path_BC))[:, None], path_BC]
    return pages.at[ids_BC, :, :, row_BC, *part].set(rows_BCK2)


def _put_rows(pages, rows_BK2T, corners, loop: bool):
    """`_put` as one operation per row, in place."""
    path_BC, ids_BC, row_BC = corners
    B, C = path_BC.shape
    (K, both), wide = rows_BK2T.shape[1:3], rows_BK2T.shape[4:]

    def write_row(pages, source):
        slot, node, page_id, row = source
        zeros = (0,) * len(wide)
        new = lax.dynamic_slice(
            rows_BK2T,
            (slot, 0, 0, node, *zeros),
            (1, K, both, 1, *wide),
            allow_negative_indices=False,
        )
        corner = page_id, 0, 0, row, *zeros
        return lax.dynamic_update_slice(
            pages, new, corner, allow_negative_indices=False
        )

    slots = [i // C for i in range(B * C)]
    sources = [x.reshape(-1) for x in (path_BC, ids_BC, row_BC)]
    if loop:
        sources = [jnp.asarray(slots), *sources]

        def body(i, pages):
            return write_row(pages, [x[i] for x in sources])

        return lax.fori_loop(0, B * C, body, pages)
    sources = [slots, *map(jnp.unstack, sources)]
    return functools.reduce(write_row, zip(*sources, strict=True), pages)
