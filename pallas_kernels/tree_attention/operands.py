"""The arrays of one call.

Letters: B slots, T new tree rows, U = E + T tree rows in all (E of earlier calls
first), N query heads, K key/value heads, G = N / K, H head width, P pages, W width of
a row in a page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Dims(NamedTuple):
    """Sizes of a call, by the letters of this module."""

    B: int
    T: int
    N: int
    H: int
    K: int
    G: int
    U: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """What `tree_attention` reads; a pytree.

    Attributes:
      queries: [B, T, N, H], rotary applied.
      kv_pages: keys and values [P, K, 2, page, W >= H], or joined in one row, the value
        behind its key, [P, K, 1, page, W >= 2 H]; None: there is no prefix. What is
        left of W is zeros. The TPU kernel wants W to be a multiple of 128: memory holds
        whole lanes in any case, but XLA keeps narrower rows transposed, and would copy
        all pages before each call. `page_shape` joins what fits in a row.
      page_table: int32 [B, max_pages]; entries past a slot's length may be read and
        masked, so they must name some page.
      lengths: int32 [B], rows of prefix per slot.
      tree_kv: [B, K, 2, U, H]; the last T of the U rows are this call's own.
      tree_mask: bool [B, T, U], ancestors, self included; the only mask.
      tree_depth: int32 [B, U], read only with a window.
      kv_scales: float32 [P, K, 2, X >= page], with int8 `kv_pages` only: what each row
        is multiplied by (see `quantize_rows`). The TPU kernel wants X to be a multiple
        of 128, for the same reason.
    """

    queries: jax.Array
    kv_pages: jax.Array | None = None
    page_table: jax.Array | None = None
    lengths: jax.Array | None = None
    tree_kv: jax.Array
    tree_mask: jax.Array
    tree_depth: jax.Array | None = None
    kv_scales: jax.Array | None = None

    @property
    def dims(self) -> Dims:
        B, T, N, H = self.queries.shape
        K, U = self.tree_kv.shape[1], self.tree_kv.shape[3]
        return Dims(B, T, N, H, K, N // K, U)

    @property
    def query_rows(self) -> int:
        """T · G, the query rows of one slot and key/value head."""
        return self.dims.T * self.dims.G

    @property
    def has_prefix(self) -> bool:
        return self.kv_pages is not None

    @property
    def is_quantized(self) -> bool:
        return self.kv_scales is not None

    @property
    def is_joined(self) -> bool:
        """Whether a key and its value share a row of a page."""
        return self.has_prefix and self.kv_pages.shape[2] == 1

    @property
    def page(self) -> int:
        """Rows of a page; 0 without a prefix."""
        return self.kv_pages.shape[3] if self.has_prefix else 0

    @property
    def max_pages(self) -> int:
        """Pages of a slot at most; 0 without a prefix."""
        return self.page_table.shape[1] if self.has_prefix else 0

    def prefix_row_bytes(self, width: int) -> int:
        """Bytes of one row of prefix, all heads, keys and values, scales included."""
        if not self.has_prefix:
            return 0
        rows = self.kv_pages.shape[2] * width * self.kv_pages.dtype.itemsize
        scales = 2 * self.kv_scales.dtype.itemsize if self.is_quantized else 0
        return self.dims.K * (rows + scales)

    def unsupported_types(self, dtypes: Sequence) -> str | None:
        """Why a kernel that computes in one of `dtypes` cannot take the arrays.

        Returns:
          A sentence, or None: it can, and pages are of that type too, or int8.
        """
        dtype = self.queries.dtype
        if dtype not in dtypes:
            names = ", ".join(jnp.dtype(x).name for x in dtypes)
            return f"queries are {dtype}, want one of {names}"
        if self.tree_kv.dtype != dtype:
            return f"tree_kv {self.tree_kv.dtype} is not of the type of queries {dtype}"
        if self.has_prefix and self.kv_pages.dtype not in (dtype, jnp.int8):
            return (
                f"kv_pages is {self.kv_pages.dtype}, want {dtype} as queries, or int8"
            )
        return None


def page_shape(
    num_pages: int, kv_heads: int, page: int, head_dim: int, lanes: int = 1
) -> tuple[int, ...]:
    """The shape of `Operands.kv_pages` in rows of whole lanes.

    Keys and values that together fill no more than one row of `lanes` are joined.

    Args:
      num_pages: P.
      kv_heads: K.
      page: rows per page.
      head_dim: H.
      lanes: the width of a row is a multiple of it.
    """
    if 2 * head_dim <= lanes:
        return num_pages, kv_heads, 1, page, lanes
    return num_pages, kv_heads, 2, page, -(-head_dim // lanes) * lanes


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a layer and its cache, for calls that are compiled without data.

    Attributes:
      slots, prefix: texts, and rows of prefix that the page table has room for.
      kv_heads, group, head_dim: K, G and H.
      page: cache rows per page.
      dtype: name.
    """

    slots: int = 8
    prefix: int = 2048
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    page: int = 128
    dtype: str = "bfloat16"

    def operands(self, nodes: int, lanes: int = 1) -> Operands:
        """Abstract operands of a call.

        Args:
          nodes: T.
          lanes: see `page_shape`.
        """
        B, K, H, T = self.slots, self.kv_heads, self.head_dim, nodes
        pages = -(-self.prefix // self.page)
        shape, dtype = jax.ShapeDtypeStruct, jnp.dtype(self.dtype)
        return Operands(
            queries=shape((B, T, K * self.group, H), dtype),
            kv_pages=shape(page_shape(B * pages + 1, K, self.page, H, lanes), dtype),
            page_table=shape((B, pages), jnp.int32),
            lengths=shape((B,), jnp.int32),
            tree_kv=shape((B, K, 2, T, H), dtype),
            tree_mask=shape((B, T, T), jnp.bool_),
        )
