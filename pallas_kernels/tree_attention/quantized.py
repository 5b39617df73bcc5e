"""Int8 rows for pages: one scale per row and head, keys and values apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def quantize_rows(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds rows [..., H] to int8 with one scale each, symmetric, largest to 127.

    Returns:
      int8 [..., H] and float32 [...]: a row is about its int8 times its scale. A row
      of zeros has the scale 0.
    """
    wide = rows.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1) / 127
    safe = jnp.where(scales > 0, scales, 1.0)
    return jnp.round(wide / safe[..., None]).astype(jnp.int8), scales


def dequantize_rows(rows: jax.Array, scales: jax.Array, dtype) -> jax.Array:
    """Rows [..., H] that `quantize_rows` rounded, as their readers see them."""
    return (rows.astype(jnp.float32) * scales[..., None]).astype(dtype)


def rescale(x: jax.Array, scales: jax.Array | None) -> jax.Array:
    """Applies the scales of int8 rows to what a product makes of them.

    A key's scale multiplies its scores, after their product; a value's multiplies its
    weights, before theirs: the rows themselves stay as they are.

    Args:
      x: scores or weights [..., R, S], float32.
      scales: [..., 1, S]; None: the rows are not int8.
    """
    return x if scales is None else x * scales


def rounded(x: jax.Array) -> jax.Array:
    """Rounds float32 to 23 significant bits, one less than it has.

    What comes out is no product to a compiler, which so cannot join it to an addition;
    and it cannot tell the rounding from one that matters, and leave it out.
    """
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=22)
