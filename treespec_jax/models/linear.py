"""The one product of weights and activations; all knowledge of fast forms lives here.

Activations are feature-major, `[features, rows]`, in the whole program: on a CPU it is
the form in which several rows cost about as much as one; on a TPU or GPU the compiler
is free to lay it out otherwise.

| weights | activations | product |
|---|---|---|
| float | any | both in the weights' type, summed in float32 |
| int8 | float32, or any on a CPU | rounded to int8 per row; summed in int32, and so |
| | | the same whatever the rows beside |
| int8 | bfloat16 or float16 elsewhere | weights converted in the product, or as |
| | | above: one form for a whole model, see `product_choice` |
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.tree_attention import rounded
from treespec_jax.branches import on_cpu
from treespec_jax.models import one_row, product_forms
from treespec_jax.models.quantized import TOP, Quantized, abstract, quantize, signed
from treespec_jax.models.weight_types import Types

Weight = jax.Array | Quantized


def linear(weight: Weight, x_IR: jax.Array, out_dtype=None) -> jax.Array:
    """`weight · x`, accumulated in float32, or in int32 where both are int8.

    Args:
      weight: [*out, *in]; the trailing axes whose sizes multiply to I are contracted.
      x_IR: [I, R] activations, feature-major.
      out_dtype: of the result; None: that of `x_IR`.

    Returns:
      [*out, R].
    """
    if isinstance(weight, Quantized):
        y = _quantized(weight, x_IR)
    else:
        size, axes = 1, weight.ndim
        while size < x_IR.shape[0]:
            axes -= 1
            size *= weight.shape[axes]
        # The axes of the result stay apart: one that a mesh cuts could not be found
        # again in a flat one, and the weights would travel at every call.
        flat = weight.reshape(*weight.shape[:axes], size)
        y = _in_blocks(flat, x_IR.astype(weight.dtype), jnp.float32)
    return y.astype(out_dtype or x_IR.dtype)


def rows_of(table: Weight, tokens_R: jax.Array, dtype) -> jax.Array:
    """Rows of an embedding [V, D], feature-major: [D, R] in `dtype`."""
    if not isinstance(table, Quantized):
        if table.dtype == jnp.bfloat16 and dtype == jnp.float32:
            return on_cpu(_by_bits, _converted_rows, table, tokens_R).T
        return table[tokens_R].T.astype(dtype)
    count = len(tokens_R)
    if count == 1:
        # A TPU's compiler makes a slice of a single row, and for its sake copies the
        # whole table into another layout at every step.
        tokens_R = jnp.concatenate([tokens_R, tokens_R])
    rows_GRI = signed(table.values[:, tokens_R]) * table.scales[:, tokens_R][..., None]
    rows_GRI = rounded(rows_GRI) if table.bitwise else rows_GRI
    rows_DR = rows_GRI.transpose(0, 2, 1).reshape(-1, len(tokens_R)).astype(dtype)
    return rows_DR[:, :count]


def _converted_rows(table: jax.Array, tokens_R: jax.Array) -> jax.Array:
    """float32 rows [R, D] of a table [V, D] in bfloat16."""
    return table[tokens_R].astype(jnp.float32)


def _by_bits(table: jax.Array, tokens_R: jax.Array) -> jax.Array:
    """The same on a CPU.

    XLA gathers no bfloat16 there: it converts the table, before a loop of several
    steps. Bits it would copy at that place, but for the barrier.
    """
    table, tokens_R = lax.optimization_barrier((table, tokens_R))
    return one_row.float32_of(lax.bitcast_convert_type(table, jnp.uint16)[tokens_R])


def abstract_weight(shape: tuple[int, ...], types: Types, inputs: int) -> Weight:
    """A weight without values; `inputs` counts the axes of `shape` to contract."""
    if not types.is_int8:
        return jax.ShapeDtypeStruct(shape, np.dtype(types.weights))
    return abstract(shape, inputs, types.groups(math.prod(shape[-inputs:])))


def weight_of(values: jax.Array, types: Types, inputs: int) -> Weight:
    """A weight of such values, as `abstract_weight` describes it."""
    if not types.is_int8:
        return values.astype(types.weights)
    groups = types.groups(math.prod(values.shape[-inputs:]))
    return jax.tree.map(jnp.asarray, quantize(np.asarray(values), inputs, groups))


def _quantized(weight: Quantized, x_IR: jax.Array) -> jax.Array:
    """float32 [*out, R]."""
    if x_IR.dtype == jnp.float32 or weight.rounds_rows:
        return _int8(weight, x_IR)
    return lax.platform_dependent(weight, x_IR, cpu=_int8, default=_converted)


def _int8(weight: Quantized, x_IR: jax.Array) -> jax.Array:
    """With every row of `x` rounded to int8, one scale for each group of its inputs."""
    groups, rank = weight.scales.shape[0], weight.out_rank
    # Else what made `x` is computed, and compiled, once for the maximum and once more
    # for the rounding, and what made that twice in each.
    x_IR = lax.optimization_barrier(x_IR.astype(jnp.float32))
    x_GIR = x_IR.reshape(groups, -1, x_IR.shape[1])
    top_G1R = jnp.max(jnp.abs(x_GIR), axis=1, keepdims=True)
    q_GIR = jnp.round(x_GIR * (TOP / jnp.where(top_G1R > 0, top_G1R, 1.0)))
    y = _in_blocks(weight.values, q_GIR.astype(jnp.int8), jnp.int32)
    scales_R = jnp.expand_dims(top_G1R[:, 0] * (1 / TOP), range(1, 1 + rank))
    y = y.astype(jnp.float32) * weight.scales[..., None]
    if weight.bitwise:
        return functools.reduce(jnp.add, rounded(rounded(y) * scales_R))
    y *= scales_R
    return y[0] if groups == 1 else jnp.sum(y, axis=0)


def _converted(weight: Quantized, x_IR: jax.Array) -> jax.Array:
    """With weights converted to the dtype of `x` as the product reads them."""
    x_GIR = x_IR.reshape(weight.scales.shape[0], -1, x_IR.shape[1])
    values = signed(weight.values).astype(x_IR.dtype)
    y = product_forms.whole(values, x_GIR, jnp.float32)
    return jnp.sum(y * weight.scales[..., None], axis=0)


def _in_blocks(weight: jax.Array, x: jax.Array, sums) -> jax.Array:
    """The product in blocks of as many rows as are quick here, padded with zeros."""
    rows, done = x.shape[-1], 0
    parts = []
    for size in product_forms.blocks(rows, weight.dtype):
        part = x[..., done : done + size]
        short = size - part.shape[-1]
        part = jnp.pad(part, [(0, 0)] * (x.ndim - 1) + [(0, short)])
        parts.append(product_forms.product(weight, part, sums)[..., : size - short])
        done += size
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
