"""The one product of weights and activations; all knowledge of fast forms lives here.

Activations are feature-major, `[features, rows]`, in the whole program: on a CPU it is
the form in which several rows cost about as much as one; on a TPU or GPU the compiler
is free to lay it out otherwise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def good_rows(rows: int, dtype) -> int:
    """The row count to pad to.

    On a CPU, 5 to 7 rows cost a fifth more than 8, 9 to 15 up to 1.4 times 16, and 17
    to 31 as much as 32; one bf16 row costs ten times two. Accelerators pad by
    themselves.
    """
    if rows == 1 and dtype == jnp.bfloat16:
        return 2
    if 4 < rows < 32:
        return 1 << (rows - 1).bit_length()
    return rows


def linear(weight: jax.Array, x_IR: jax.Array, out_dtype=None) -> jax.Array:
    """`weight · x`, accumulated in float32.

    Args:
      weight: [*out, *in]; the trailing axes whose sizes multiply to I are contracted.
      x_IR: [I, R] activations, feature-major.
      out_dtype: of the result; None: that of `x_IR`.

    Returns:
      [*out, R].
    """
    size, axes = 1, weight.ndim
    while size < x_IR.shape[0]:
        axes -= 1
        size *= weight.shape[axes]
    rows = x_IR.shape[1]
    padded = good_rows(rows, x_IR.dtype)
    # The axes of the result stay apart: one that a mesh cuts could not be found again
    # in a flat one, and the weights would travel at every call.
    y = lax.dot_general(
        weight.reshape(*weight.shape[:axes], size),
        jnp.pad(x_IR, ((0, 0), (0, padded - rows))),
        (((axes,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST if x_IR.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return y[..., :rows].astype(out_dtype or x_IR.dtype)
