"""Tree attention whose result has the same bits however the keys are cut up.

Every sum is one of integers, and so has no order: neither the block that a key stands
in, nor whether it is drafted or cached, nor what stands beside it shows in the result.

* Keys and values are int8 with a scale per row, queries integers with a scale per row,
  of as many bits as leave all scores' partial sums below 2^24. Float products are exact
  then, in any order.
* A first pass over the keys finds the largest score and the largest scale of a value
  that a row sees; a maximum has no order either.
* A second pass rounds exp(score - largest) to multiples of 2^-20, and the same times
  the value's scale. The first is summed as it is; the second, in two halves of 10 bits,
  is multiplied with the values exactly, and summed in integers of 55 bits.

The rest is elementwise; what a compiler could join to an addition is rounded before.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tree_attention.operands import Operands
from pallas_kernels.tree_attention.quantized import quantize_rows, rounded
from pallas_kernels.tree_attention.reference import BLOCK_ROWS, MAX_SLICES
from pallas_kernels.tree_attention.spec import AttentionSpec

# float32 has all integers up to here.
_EXACT = 1 << 24
# Weights are multiples of 2^-20, in halves of 10 bits.
_HALF = 10
# 2^x = Σ x^n · _POWERS[n] for 0 <= x < 1: at Chebyshev's nodes, within 1.1e-7.
_POWERS = (0.9999999, 0.69315462, 0.24014077, 0.05586328, 0.00894621, 0.00189511)
# Keys whose sum of half a weight times a value stays within `_EXACT`.
_ROWS = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wide:
    """Integers high · 2^24 + low, 0 <= low < 2^24; equal ones have equal bits.

    Attributes:
      high: int32.
      low: int32, of the same shape.
    """

    high: jax.Array
    low: jax.Array

    def plus(self, low: jax.Array, shifted: jax.Array | int = 0) -> Wide:
        """Adds low + shifted · 2^10, int32, both below 2^30 in magnitude."""
        above = _EXACT >> _HALF
        low = self.low + low + ((shifted & (above - 1)) << _HALF)
        high = self.high + (low >> 24) + (shifted >> (24 - _HALF))
        return Wide(high, low & (_EXACT - 1))

    def as_float(self) -> jax.Array:
        """float32, to its rounding."""
        return self.high.astype(jnp.float32) * _EXACT + self.low.astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
    """Some of the keys of every slot, with their values.

    Attributes:
      rows: int8 [B, K, 2, S, H].
      scales: float32 [B, K, 2, S].
      seen: bool [B, 1, R or 1, S]; rows that are not seen may hold anything.
    """

    rows: jax.Array
    scales: jax.Array
    seen: jax.Array


def tree_attention(operands: Operands, spec: AttentionSpec) -> jax.Array:
    """See `api.tree_attention`; the tree's rows are rounded as those of pages are."""
    B, T, N, H, K, G, U = operands.dims
    R = T * G
    q_BKRH = operands.queries.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4)
    q_BKRH, q_scale_BKR1 = _integers(q_BKRH.reshape(B, K, R, H))
    q_scale_BKR1 = q_scale_BKR1 * spec.scale

    def scores(keys: Keys) -> jax.Array:
        s_BKRS = jnp.einsum(
            "bkrh,bksh->bkrs",
            q_BKRH,
            keys.rows[:, :, 0].astype(jnp.float32),
            precision=lax.Precision.HIGHEST,
        )
        scale_BKRS = q_scale_BKR1 * keys.scales[:, :, 0, None]
        s_BKRS = rounded(s_BKRS * scale_BKRS)
        if spec.soft_cap is not None:
            s_BKRS = rounded(spec.soft_cap * jnp.tanh(s_BKRS / spec.soft_cap))
        return jnp.where(keys.seen, s_BKRS, -jnp.inf)

    def maxima(keys: Keys, found):
        top, scale = found
        scales_BKRS = jnp.where(keys.seen, keys.scales[:, :, 1, None], 0.0)
        return (
            jnp.maximum(top, jnp.max(scores(keys), axis=-1, keepdims=True)),
            jnp.maximum(scale, jnp.max(scales_BKRS, axis=-1, keepdims=True)),
        )

    tree, blocks = _tree_keys(operands, spec), _Blocks(operands, spec)
    shape = (B, K, R, 1)
    found = maxima(tree, (jnp.full(shape, -jnp.inf), jnp.zeros(shape)))
    top, largest = blocks.fold(maxima, found)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    inverse = 1.0 / jnp.where(largest > 0, largest, 1.0)

    def add(keys: Keys, sums):
        p_BKRS = _exp(scores(keys) - top)
        scales_BKRS = keys.scales[:, :, 1, None] * inverse
        weights = _fixed(p_BKRS), _fixed(jnp.where(keys.seen, p_BKRS * scales_BKRS, 0))
        for start in range(0, p_BKRS.shape[-1], _ROWS):
            part = slice(start, start + _ROWS)
            values = keys.rows[:, :, 1, part]
            sums = _add(*(w[..., part] for w in weights), values, sums)
        return sums

    def nothing(*shape):
        return Wide(*(jnp.zeros(shape, jnp.int32) for _ in range(2)))

    sums = add(tree, (nothing(*shape), nothing(B, K, R, H)))
    total, out = (wide.as_float() for wide in blocks.fold(add, sums))
    out = out * (largest / jnp.where(total > 0, total, 1.0))
    out = out.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4)
    return out.reshape(B, T, N, H).astype(operands.queries.dtype)


def _add(p_BKRS, weights_BKRS, values_BKSH, sums):
    """Sums with those of at most `_ROWS` keys, whose weights are in fixed point."""
    total, out = sums
    halves = weights_BKRS >> _HALF, weights_BKRS & ((1 << _HALF) - 1)
    halves_BKRS = jnp.concatenate(halves, axis=2).astype(jnp.float32)
    products = jnp.einsum(
        "bkrs,bksh->bkrh",
        halves_BKRS,
        values_BKSH.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
    high, low = jnp.split(products.astype(jnp.int32), 2, axis=2)
    count = jnp.sum(p_BKRS, axis=-1, keepdims=True, dtype=jnp.int32)
    return total.plus(count), out.plus(low, high)


def _integers(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows [..., H] as whole numbers, of float32, and their scales [..., 1]."""
    most = (_EXACT - 1) // (127 * rows.shape[-1])
    wide = rows.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / most
    return jnp.round(wide / jnp.where(scales > 0, scales, 1.0)), scales


def _exp(x: jax.Array) -> jax.Array:
    """e^x of x <= 0, float32 within 3e-7: a compiler's own may go with the shape."""
    x = jnp.maximum(rounded(x * math.log2(math.e)), -126.0)
    whole = jnp.floor(x)
    fraction, power = x - whole, _POWERS[-1]
    for factor in _POWERS[-2::-1]:
        power = rounded(power * fraction) + factor
    bits = (whole.astype(jnp.int32) + 127) << 23
    return power * lax.bitcast_convert_type(bits, jnp.float32)


def _fixed(weights: jax.Array) -> jax.Array:
    """Numbers up to 1 as int32 multiples of 2^-20."""
    return jnp.round(weights * (1 << 2 * _HALF)).astype(jnp.int32)


def _of_queries(mask_BTS: jax.Array, operands: Operands) -> jax.Array:
    """[B, T, S] -> [B, 1, R, S]: the G queries of a node share its mask."""
    return jnp.repeat(mask_BTS, operands.dims.G, axis=1)[:, None]


def _tree_keys(operands: Operands, spec: AttentionSpec) -> Keys:
    allowed, depth_BU = operands.tree_mask, operands.tree_depth
    if spec.window is not None:
        depth_BT = depth_BU[:, -operands.dims.T :]
        allowed &= depth_BT[:, :, None] - depth_BU[:, None, :] < spec.window
    return Keys(*quantize_rows(operands.tree_kv), _of_queries(allowed, operands))


class _Blocks:
    """The prefix in blocks of whole pages, up to the longest slot's."""

    def __init__(self, operands: Operands, spec: AttentionSpec):
        self._operands, self._window = operands, spec.window
        if not operands.has_prefix:
            return
        self._pages = min(max(1, BLOCK_ROWS // operands.page), operands.max_pages)
        short = -operands.max_pages % self._pages
        self._table = jnp.pad(operands.page_table, ((0, 0), (0, short)))

    def fold(self, add, carry):
        """`carry` after `add(keys, carry)` of every block."""
        operands, lengths = self._operands, self._operands.lengths
        if not operands.has_prefix:
            return carry
        block, first, end_B = self._pages * operands.page, 0, lengths
        if self._window is not None:
            # From the oldest row that the least deep node of any slot still sees.
            depth_BT = operands.tree_depth[:, -operands.dims.T :]
            oldest_B = lengths + jnp.min(depth_BT, axis=1) - self._window + 1
            end_B = jnp.where(oldest_B < lengths, lengths, 0)
            oldest_B = jnp.where(end_B > 0, oldest_B, jnp.iinfo(jnp.int32).max)
            first = jnp.maximum(jnp.min(oldest_B), 0) // block
        blocks = (jnp.max(end_B) + block - 1) // block
        return lax.fori_loop(first, blocks, lambda i, c: add(self._keys(i), c), carry)

    def _keys(self, i) -> Keys:
        operands, count = self._operands, self._pages
        B, T, _, H, K, _, _ = operands.dims
        rows = count * operands.page
        ids_BJ = lax.dynamic_slice_in_dim(self._table, i * count, count, axis=1)
        position_S = i * rows + jnp.arange(rows)
        seen = (position_S[None] < operands.lengths[:, None])[:, None, None]
        if self._window is not None:
            depth_BT = operands.tree_depth[:, -T:]
            position_BT = operands.lengths[:, None] + depth_BT
            near = position_BT[:, :, None] - position_S < self._window
            seen = seen & _of_queries(near, operands)
        pages = _read(operands.kv_pages, ids_BJ)
        parts = [pages[..., :H]]
        if operands.is_joined:
            parts.append(pages[..., H : 2 * H])
        pages = jnp.concatenate(parts, axis=3)
        scales = _read(operands.kv_scales, ids_BJ)[..., : operands.page]
        scales = scales.transpose(0, 2, 3, 1, 4).reshape(B, K, 2, rows)
        pages = pages.transpose(0, 2, 3, 1, 4, 5).reshape(B, K, 2, rows, H)
        return Keys(pages, scales, seen)


def _read(pages: jax.Array, ids_BJ: jax.Array) -> jax.Array:
    """Pages [B, J, ...] of such numbers; one by one each is a memcpy on a CPU."""
    B, J = ids_BJ.shape
    if B * J > MAX_SLICES:
        return pages[ids_BJ]
    found = [
        lax.dynamic_index_in_dim(pages, ids_BJ[b, j], keepdims=False)
        for b in range(B)
        for j in range(J)
    ]
    return jnp.stack(found).reshape(B, J, *pages.shape[1:])
