"""Products with one narrow row, as sums that compile to vector instructions.

XLA's library for CPUs takes int8 and bfloat16 matrices of two rows or more, and with
few it reads them at a third of what memory gives. Here the columns of a weight are
added up, some vectors of them side by side; what is left to sum is as wide as those.

int8: two products are added in 16 bits, as 2 · 127 · 127 is below 2^15, and all others
in 32. So every sum is exact, and the same as that of any other form.

bfloat16: summed in float32, as in any other form, but in an order of its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from treespec_jax.models.quantized import signed

LANES = 32
# Fewer columns go the way of several rows. XLA puts what rounded the row, if it is so
# short, into the loop over the rows of the weight, which then rounds it for each.
_FEWEST_COLUMNS = 512
# Columns of one loop: its body is as long as it has terms, and must be compiled.
_COLUMNS = 64 * LANES
# The same of bfloat16. XLA takes a loop of more terms apart, and what it converts the
# weight to would be written and read again.
_FLOAT_LANES = 64
_FLOAT_COLUMNS = 12 * _FLOAT_LANES


def takes(weight: jax.Array, x: jax.Array) -> bool:
    """Whether a product is to be taken so; arguments as of `product`."""
    if weight.dtype == jnp.bfloat16:
        return True
    is_integer = weight.dtype in (jnp.int8, jnp.uint8)
    is_long = x.size >= _FEWEST_COLUMNS
    return is_integer and is_long and weight.shape[-1] % LANES == 0


# Traced once for all layers.
@jax.jit
def product(weight: jax.Array, x: jax.Array) -> jax.Array:
    """int32 or float32 [*out, 1] of [*out, I] and [I, 1], or of G of each.

    Args:
      weight: int8; or uint8, the same with 128 added; or bfloat16.
      x: int8, or bfloat16 with a weight of bfloat16.
    """
    wide = jnp.float32 if weight.dtype == jnp.bfloat16 else jnp.int16
    # A conversion of the weight alone is the same in every step of a dispatch: XLA
    # moves it in front of the loop over steps, which then reads twice the bytes. With
    # the barrier the weight depends on the row. Nor is the row converted again for
    # every row of the weight.
    weight, x_GI = lax.optimization_barrier((weight, x[..., 0].astype(wide)))
    x_GI = x_GI.reshape(*x.shape[:-2], *(1,) * (weight.ndim - x.ndim + 1), -1)
    if weight.dtype == jnp.bfloat16:
        return _float_sum(weight, x_GI)
    size, total = weight.shape[-1], 0
    for start in range(0, size, _COLUMNS):
        part = slice(start, min(start + _COLUMNS, size))
        total += _sum(weight[..., part], x_GI[..., part])
    return total[..., None]


def _sum(weight: jax.Array, x: jax.Array) -> jax.Array:
    """int32 [*out] of int8 or uint8 [*out, I] and int16 that broadcasts to it."""
    terms = [
        signed(weight[..., first : first + LANES]).astype(jnp.int16)
        * x[..., first : first + LANES]
        for first in range(0, weight.shape[-1], LANES)
    ]
    pairs = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
    lanes = sum(pair.astype(jnp.int32) for pair in pairs)
    return jnp.sum(lanes, axis=-1, dtype=jnp.int32)


def _float_sum(weight: jax.Array, x: jax.Array) -> jax.Array:
    """float32 [*out, 1] of bfloat16 [*out, I] and float32 that broadcasts to it."""
    size = weight.shape[-1]
    if size > _FLOAT_COLUMNS or size % _FLOAT_LANES:
        return jnp.sum(weight.astype(jnp.float32) * x, axis=-1, keepdims=True)
    bits = lax.bitcast_convert_type(weight, jnp.uint16)
    parts = [slice(i, i + _FLOAT_LANES) for i in range(0, size, _FLOAT_LANES)]
    # By bits: XLA would convert the weight before it is cut.
    lanes = sum(float32_of(bits[..., part]) * x[..., part] for part in parts)
    # A product, as a sum would take the loop apart again.
    return lax.dot_general(
        lanes,
        jnp.ones((_FLOAT_LANES, 1), jnp.float32),
        (((lanes.ndim - 1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )


def float32_of(bits: jax.Array) -> jax.Array:
    """Numbers of bfloat16, given as uint16, in float32."""
    return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
