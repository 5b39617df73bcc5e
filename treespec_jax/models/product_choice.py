"""Chooses forms of a model's products, by measuring, before it runs."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from treespec_jax.models import memory, product_forms
from treespec_jax.models.linear import linear
from treespec_jax.models.quantized import OFFSET, Quantized

# Bytes of a model whose products are worth some seconds at the first start.
_LARGE = 64 << 20
# Forms of a product with int8 weights on a GPU or TPU, as `linear` has them.
CONVERTED, ROUNDED = "converted", "rounded"
# Rounded rows lose a little; they must win by this factor.
_CLEAR = 0.9
# Row counts to time: of plain steps and of trees. No further one begins after so many
# seconds, compiling included.
_ROWS, _PATIENCE = (1, 16, 64, 8, 32, 4), 1.0
# More weights than a cache holds, as [width, width], read so many times a call.
_WIDTH, _MATRICES, _PASSES, _TIMES = 4096, 8, 8, 5


def prepare(model: nnx.Module, dtype: Any, folder: Path | None = None) -> None:
    """Measures what a large model's products want where it lies, in some seconds.

    On a CPU matrices in int8 become uint8, one by one, where those are quicker. On a
    GPU or TPU their products round the rows of the other side to int8 where that is
    clearly quicker than to convert the weights. One form serves all row counts: with
    several, a tree would round otherwise than plain decoding, and be another model.
    Nothing is done where processes share the model: all must run one program.

    Args:
      model: with weights.
      dtype: of activations.
      folder: as of `product_forms.measure`.
    """
    arrays = jax.tree.leaves(nnx.state(model))
    if not arrays[0].is_fully_addressable:
        return
    if sum(array.nbytes for array in arrays) < _LARGE:
        return
    stored = max(arrays, key=lambda array: array.nbytes).dtype
    device = _device(model)
    if device.platform == "cpu":
        product_forms.measure(stored, folder)
        if stored == jnp.int8 and _quickest(product_forms.INTEGERS, folder) == "uint8":
            add_offset(model)
    elif stored == jnp.int8 and jnp.dtype(dtype) != jnp.float32:
        found = measure_forms(device, dtype, folder)
        if sum(found[ROUNDED].values()) < _CLEAR * sum(found[CONVERTED].values()):
            round_rows(model)


def _quickest(names, folder: Path | None) -> str:
    """By the row counts that all were timed with."""
    tables = {name: product_forms.measure(name, folder) for name in names}
    common = set.intersection(*map(set, tables.values()))
    return min(tables, key=lambda name: sum(tables[name][rows] for rows in common))


def measure_forms(
    device: jax.Device, dtype: Any, folder: Path | None = None
) -> dict[str, dict[int, float]]:
    """Times both forms of a product with int8 weights on a device, in turn, once.

    Args:
      device: a GPU or TPU; on a CPU both are the same.
      dtype: of activations, not float32.
      folder: as of `product_forms.measure`.

    Returns:
      milliseconds of a pass over 128 MiB of weights, by form and row count.
    """
    forms = CONVERTED, ROUNDED
    name = jnp.dtype(dtype).name
    machine = product_forms.machine_key(f"{device.device_kind} {name}")
    return product_forms.recorded(forms, lambda: _timed(device, name), machine, folder)


def round_rows(model: nnx.Module) -> None:
    """Lets products with int8 matrices round the other side on all devices."""
    for variable in _quantized(model):
        matrix = variable.get_value()
        variable.set_value(dataclasses.replace(matrix, rounds_rows=True))


def rounds_rows(model: nnx.Module) -> bool:
    """Whether `round_rows` was called."""
    return any(variable.get_value().rounds_rows for variable in _quantized(model))


def add_offset(model: nnx.Module) -> None:
    """Replaces matrices in int8 by the same with 128 added, in uint8."""
    for variable in _quantized(model):
        matrix = variable.get_value()
        if matrix.values.dtype == jnp.int8:
            variable.set_value(dataclasses.replace(matrix, values=_with_offset(matrix)))


def _device(model: nnx.Module) -> jax.Device:
    """One of those that hold the model."""
    first = jax.tree.leaves(nnx.state(model))[0]
    return min(first.devices(), key=lambda device: device.id)


def _quantized(model: nnx.Module) -> list[nnx.Variable]:
    variables = jax.tree.leaves(
        nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return [x for x in variables if isinstance(x.get_value(), Quantized)]


def _with_offset(matrix: Quantized) -> jax.Array:
    values = matrix.values
    if len(values.devices()) > 1:
        return jax.jit(lambda x: lax.bitcast_convert_type(x, jnp.uint8) ^ OFFSET)(
            values
        )
    array = memory.empty(values.shape, np.dtype(np.uint8))
    np.bitwise_xor(np.asarray(values).view(np.uint8), np.uint8(OFFSET), out=array)
    return jax.device_put(array)


def _timed(device: jax.Device, dtype: str) -> dict[str, dict[int, float]]:
    """Milliseconds by form and row count, both forms of a count timed in turn."""
    began, best = time.perf_counter(), {CONVERTED: {}, ROUNDED: {}}
    rng = np.random.default_rng(0)
    values = rng.integers(-127, 128, (1, _WIDTH, _WIDTH), np.int8)
    # A product of numbers around 1 by such a matrix is around 1.
    scales = np.full((1, _WIDTH), 1 / (73 * math.sqrt(_WIDTH)), np.float32)
    first = Quantized(*jax.device_put((values, scales), device), (_WIDTH, _WIDTH))
    changes = np.arange(_MATRICES, dtype=np.int8)
    weights = [
        dataclasses.replace(first, values=first.values ^ change) for change in changes
    ]
    for rows in _ROWS:
        x = jax.device_put(np.ones((_WIDTH, rows), dtype), device)
        runs = {}
        for form in best:
            some = [
                dataclasses.replace(weight, rounds_rows=form == ROUNDED)
                for weight in weights
            ]
            runs[form] = functools.partial(_passes.lower(some, x).compile(), some, x)
            jax.block_until_ready(runs[form]())
            best[form][rows] = math.inf
        for _ in range(_TIMES):
            for form, run in runs.items():
                start = time.perf_counter()
                jax.block_until_ready(run())
                ms = (time.perf_counter() - start) * 1e3 / _PASSES
                best[form][rows] = min(best[form][rows], ms)
        if time.perf_counter() - began > _PATIENCE:
            break
    return best


@jax.jit
def _passes(weights: list[Quantized], x: jax.Array) -> jax.Array:
    """One matrix after the other, as layers of a model."""

    def once(_, x):
        return functools.reduce(lambda x, weight: linear(weight, x), weights, x)

    return lax.fori_loop(0, _PASSES, once, x)
