"""Products of uint8 and int8 matrices as one operation.

`lax.dot_general` converts both to int32 first. XLA's library for CPUs multiplies them
as they are, with instructions that exist for this pair of types only (AVX-512 VNNI).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir

from treespec_jax.models.quantized import OFFSET

_product = Primitive("uint8_int8_product")


def product(weight: jax.Array, x: jax.Array) -> jax.Array:
    """int32 [*out, R] of uint8 [*out, I] and int8 [I, R], or of G of each."""
    return _product.bind(weight, x)


def signed_product(weight: jax.Array, x: jax.Array) -> jax.Array:
    """`product` with weights that had `OFFSET` added: of what they were before."""
    sums_1R = jnp.sum(x.astype(jnp.int32), axis=-2, keepdims=True)
    sums = sums_1R.reshape(
        *x.shape[:-2], *(1,) * (weight.ndim - x.ndim + 1), x.shape[-1]
    )
    return product(weight, x) - OFFSET * sums


@_product.def_abstract_eval
def _shape(weight, x):
    return jax.core.ShapedArray((*weight.shape[:-1], x.shape[-1]), jnp.int32)


def _lower(context, weight, x):
    (out,), (of_weight, of_x) = context.avals_out, context.avals_in
    batch = list(range(of_x.ndim - 2))
    numbers = stablehlo.DotDimensionNumbers.get(
        lhs_batching_dimensions=batch,
        rhs_batching_dimensions=batch,
        lhs_contracting_dimensions=[of_weight.ndim - 1],
        rhs_contracting_dimensions=[of_x.ndim - 2],
    )
    kind = ir.RankedTensorType.get(out.shape, ir.IntegerType.get_signless(32))
    return [stablehlo.dot_general(kind, weight, x, numbers)]


mlir.register_lowering(_product, _lower)
