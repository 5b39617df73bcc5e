"""The one product of weights and activations; all knowledge of fast forms lives here.

Activations are feature-major, `[features, rows]`, in the whole program: on a CPU it is
the form in which several rows cost about as much as one; on a TPU or GPU the compiler
is free to lay it out otherwise.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax


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
    out = weight.shape[:axes]
    rows = x_IR.shape[1]
    w_OI = weight.reshape(math.prod(out), size)
    # One bf16 row is ten times slower than two on a CPU.
    pad = rows == 1 and x_IR.dtype == jnp.bfloat16
    x = jnp.concatenate([x_IR, x_IR], axis=1) if pad else x_IR
    y_OR = lax.dot_general(
        w_OI,
        x,
        (((1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    y_OR = y_OR[:, :rows].astype(out_dtype or x_IR.dtype)
    return y_OR.reshape(*out, rows)
