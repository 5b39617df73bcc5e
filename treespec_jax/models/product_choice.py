"""Chooses forms of a model's products, by measuring, before it runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from treespec_jax.models import memory, product_forms
from treespec_jax.models.quantized import OFFSET, Quantized

# Bytes of a model whose products are worth a second at the first start.
_LARGE = 64 << 20


def prepare(model: nnx.Module, folder: Path | None = None) -> None:
    """Measures what a model's products want, if it is large and lies on a CPU.

    Matrices in int8 become uint8, one by one, where those are quicker. Nothing is done
    where processes share the model: all must run one program.

    Args:
      model: with weights.
      folder: as of `product_forms.measure`.
    """
    arrays = jax.tree.leaves(nnx.state(model))
    on_cpu = {device.platform for device in arrays[0].devices()} == {"cpu"}
    if not on_cpu or not arrays[0].is_fully_addressable:
        return
    if sum(array.nbytes for array in arrays) < _LARGE:
        return
    dtype = max(arrays, key=lambda array: array.nbytes).dtype
    product_forms.measure(dtype, folder)
    if dtype == jnp.int8:
        signed, unsigned = (
            sum(product_forms.measure(name, folder).values())
            for name in product_forms.INTEGERS
        )
        if unsigned < signed:
            add_offset(model)


def add_offset(model: nnx.Module) -> None:
    """Replaces matrices in int8 by the same with 128 added, in uint8."""
    for variable in jax.tree.leaves(
        nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        matrix = variable.get_value()
        if isinstance(matrix, Quantized) and matrix.values.dtype == jnp.int8:
            variable.set_value(dataclasses.replace(matrix, values=_with_offset(matrix)))


def _with_offset(matrix: Quantized) -> jax.Array:
    values = matrix.values
    if len(values.devices()) > 1:
        return jax.jit(lambda x: lax.bitcast_convert_type(x, jnp.uint8) ^ OFFSET)(
            values
        )
    array = memory.empty(values.shape, np.dtype(np.uint8))
    np.bitwise_xor(np.asarray(values).view(np.uint8), np.uint8(OFFSET), out=array)
    return jax.device_put(array)
