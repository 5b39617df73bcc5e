"""How a call of the TPU kernel is cut up, and what it needs of the core's memory.

Letters as in `operands`.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tree_attention.operands import Operands
from pallas_kernels.tree_attention.sizes import LANES, BlockSizes
from pallas_kernels.tree_attention.spec import AttentionSpec

# Of the 1 MiB of scalar memory.
SMEM_TABLE_BYTES = 512 * 2**10
# Tree rows of one product; more take several.
TREE_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernel's code depends on."""

    sizes: BlockSizes
    scale: float
    soft_cap: float | None
    windowed: bool
    quantized: bool
    prefix: bool
    slots: int
    K: int
    G: int
    H: int  # Width of a row in memory, whole lanes,
    width: int  # and of a row of `q` and `tree_kv`.
    parts: int  # 2: keys and values; 1: a value lies behind its key.
    page: int
    pages_per_block: int
    max_pages: int
    scale_width: int
    tree_rows: int
    U: int  # The same, padding included.
    tree_block: int
    heads: int  # Of one grid step.
    unroll: int
    head_steps: int
    step_rows: int  # T rows of one grid step,
    mask_rows: int  # padding included,
    rows: int  # and its query rows per head, padding included.
    row_steps: int
    page_bytes: int  # Of one number in a page,
    row_bytes: int  # and of one in `q`.

    @property
    def tile(self) -> int:
        return min(self.sizes.rows, self.rows)

    @property
    def in_turn(self) -> bool:
        whole = self.page * self.pages_per_block % LANES == 0
        return self.prefix and whole and self.sizes.in_turn and self.unroll > 1

    @property
    def pads_tree(self) -> bool:
        return self.tree_rows < self.U or self.width < self.H

    @property
    def value_lanes(self) -> slice:
        """Where a value lies in its row, and so an output."""
        first = self.width if self.parts == 1 else 0
        return slice(first, first + self.width)

    @property
    def precision(self):
        return lax.Precision.HIGHEST if self.row_bytes == 4 else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what lies in vector memory, but for the windows of inputs and outputs."""
        shapes = {
            "top": (self.heads, self.rows, LANES),
            "total": (self.heads, self.rows, LANES),
            "acc": (self.heads, self.rows, self.H),
            "rows": (self.heads, self.rows, self.H),
            "seen": (self.tile, self.U),
            "scored": (self.unroll, self.tile, self.block_columns()),
        }
        if self.in_turn:
            shapes["highest"] = (self.unroll, self.tile, LANES)
        if self.pads_tree:
            shapes["tree"] = (self.heads, 2, self.U, self.H)
        ring = (self.sizes.buffers, self.pages_per_block, self.heads)
        if self.prefix:
            shapes["buffer"] = (*ring, self.parts, self.page, self.H)
        if self.quantized:
            shapes["scales"] = (*ring, 2, self.scale_width)
        return shapes

    def scratch(self, operands: Operands) -> list:
        shapes = self.shapes()
        types = dict.fromkeys(("rows", "tree"), operands.queries)
        types |= {"buffer": operands.kv_pages, "scales": operands.kv_scales}
        scratch = [
            pltpu.VMEM(shape, types[name].dtype if name in types else jnp.float32)
            for name, shape in shapes.items()
        ]
        if self.prefix:
            scratch += [
                pltpu.SemaphoreType.DMA((self.sizes.buffers,)),
                pltpu.SMEM((5,), jnp.int32),
            ]
        return scratch

    def vmem_bytes(self) -> int:
        """An estimate from above; two of each window are there."""
        size = {name: math.prod(shape) * 4 for name, shape in self.shapes().items()}
        size["seen"] = self.tile * _round_up(self.U, LANES) * 4
        for name in ("rows", "tree"):
            size[name] = size.get(name, 0) // 4 * self.row_bytes
        if self.prefix:
            size["buffer"] = size["buffer"] // 4 * self.page_bytes
        queries = self.step_rows * _round_up(self.heads * self.G, 16)
        rows = (2 * queries + 2 * self.heads * self.U) * self.H * self.row_bytes
        mask = self.mask_rows * _round_up(self.U, LANES) * 2
        limit = self.rows * LANES * 4 if self.windowed else 0
        return sum(size.values()) + 2 * (rows + mask + limit) + 2**20

    def block_columns(self) -> int:
        """Of the widest block of scores, whole lanes."""
        widest = max(self.tree_block, self.page * self.pages_per_block)
        return _round_up(widest, LANES)


def _round_up(x, to):
    return -(-x // to) * to


def _divisors(n):
    return [d for d in range(n, 0, -1) if n % d == 0]


def cut(operands: Operands, spec: AttentionSpec) -> Static | str:
    """Fits the block sizes to a call; the heads per step follow the memory.

    Returns:
      The static description, or a sentence on why this kernel cannot take the call.
    """
    B, T, _, H, K, G, U = operands.dims
    kv_pages, kv_scales = operands.kv_pages, operands.kv_scales
    prefix, sizes = operands.has_prefix, spec.block_sizes
    page, max_pages = operands.page, operands.max_pages
    width = kv_pages.shape[4] if prefix else H
    reason = operands.unsupported_types((jnp.bfloat16, jnp.float32))
    if reason is not None:
        return reason
    if width % LANES:
        # XLA keeps such arrays transposed, and would copy all pages before every call.
        return (
            f"rows of {width} numbers are not whole lanes: make kv_pages "
            f"{_round_up(H, LANES)} wide, the rest zeros"
        )
    if prefix:
        if page % 16:
            return f"pages of {page} rows are not multiples of 16"
        if operands.is_quantized and kv_scales.shape[3] % LANES:
            return (
                f"scales of {kv_scales.shape[3]} rows are not whole lanes: make "
                f"kv_scales {_round_up(page, LANES)} wide"
            )
        if B * max_pages * 4 > SMEM_TABLE_BYTES:
            return (
                f"a page table of {B} x {max_pages} is more than {SMEM_TABLE_BYTES} "
                "bytes"
            )

    pages_per_block = min(max(1, sizes.block_rows // page), max_pages) if prefix else 0
    tree_block = U_padded = _round_up(U, 16)
    if U_padded > TREE_BLOCK:
        tree_block, U_padded = TREE_BLOCK, _round_up(U, TREE_BLOCK)
    # A step's query heads are whole tiles of `q`, or all.
    whole = [d for d in _divisors(K) if d * G % 8 == 0 or d == K]
    head_counts = [d for d in whole if d <= sizes.heads] or whole[-1:]
    max_rows = sizes.max_rows
    while True:
        row_steps, step_rows = 1, T
        if max_rows < T * G:
            step_rows = max(16, max_rows // G // 16 * 16)
            row_steps = pl.cdiv(T, step_rows)
        rows = step_rows * G
        rows = 8 if rows <= 8 else _round_up(rows, 16)
        if rows > sizes.rows:
            rows = _round_up(rows, sizes.rows)
        for heads in head_counts:
            static = Static(
                sizes=sizes,
                K=K,
                G=G,
                H=width,
                width=H,
                parts=1 if operands.is_joined else 2,
                page=page,
                pages_per_block=pages_per_block,
                max_pages=max_pages,
                slots=B,
                heads=heads,
                unroll=next(d for d in _divisors(heads) if d <= sizes.unroll),
                rows=rows,
                step_rows=step_rows,
                mask_rows=_round_up(step_rows, 16),
                tree_rows=U,
                U=U_padded,
                tree_block=tree_block,
                head_steps=K // heads,
                row_steps=row_steps,
                quantized=operands.is_quantized,
                scale_width=kv_scales.shape[3] if operands.is_quantized else 0,
                prefix=prefix,
                page_bytes=kv_pages.dtype.itemsize if prefix else 0,
                row_bytes=operands.queries.dtype.itemsize,
                scale=spec.scale,
                soft_cap=spec.soft_cap,
                windowed=prefix and spec.window is not None,
            )
            if static.vmem_bytes() <= sizes.vmem_bytes:
                return static
        if max_rows > sizes.rows:
            max_rows //= 2
        elif pages_per_block > 1:
            pages_per_block //= 2
        else:
            return f"one block needs {static.vmem_bytes()} of {sizes.vmem_bytes} bytes"
