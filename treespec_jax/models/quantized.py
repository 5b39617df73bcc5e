"""Matrices of int8 with float32 scales: symmetric, per output channel or per group.

w[o, i] is about values[g, o, i'] · scales[g, o], where the inputs i are cut into G
equal groups g. With one group a scale belongs to an output channel. The group stands
first, so that the matrix of every group is contiguous.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The largest value; -128 stays unused, so that the grid is symmetric.
TOP = 127
# What uint8 values have more than int8 ones: the highest bit is the other one.
OFFSET = 128


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales"),
    meta_fields=("shape", "bitwise", "rounds_rows"),
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix [*out, *in] in int8; stands where an array would.

    Attributes:
      values: int8 [G, *out, I / G], I the product of `in`; or uint8, the same with
        128 added, where products of uint8 and int8 are the quicker ones.
      scales: float32 [G, *out].
      shape: (*out, *in), of the matrix that it stands for.
      bitwise: products with it have the same bits in every program, also after
        something was added to them (see `arithmetic`).
      rounds_rows: products round the other side to int8 on all devices, not on CPUs
        alone (see `product_choice`).
    """

    values: jax.Array
    scales: jax.Array
    shape: tuple[int, ...]
    bitwise: bool = False
    rounds_rows: bool = False

    @property
    def out_rank(self) -> int:
        """How many axes `out` are."""
        return self.scales.ndim - 1

    @property
    def size(self) -> int:
        """Weights that it holds, scales not counted."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of values and scales."""
        return self.size + 4 * math.prod(self.scales.shape)

    @property
    def sharding(self):
        """Of the values; that of the scales follows."""
        return getattr(self.values, "sharding", None)

    def __getitem__(self, index) -> Quantized:
        """The same for a part of `out`, by its first axes, as of an array."""
        if index is ...:
            return self
        index = index if isinstance(index, tuple) else (index,)
        values, scales = (x[:, *index] for x in (self.values, self.scales))
        rank = self.out_rank
        shape = *scales.shape[1:], *self.shape[rank:]
        return dataclasses.replace(self, values=values, scales=scales, shape=shape)


def signed(values: jax.Array) -> jax.Array:
    """`Quantized.values` as int8, in whichever form they are."""
    if values.dtype != jnp.uint8:
        return values
    return lax.bitcast_convert_type(values ^ jnp.uint8(OFFSET), jnp.int8)


def stored_axes(weight, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Logical axes of an array, or of the values of a quantised matrix.

    Those of its scales are the same but the last. Groups are cut where the inputs are
    cut; without groups the inputs themselves are.

    Args:
      weight: with `shape` of as many axes as `axes` names.
      axes: of the matrix.
    """
    if not isinstance(weight, Quantized):
        return tuple(axes)
    rank, whole = weight.out_rank, "group"
    outer, inner = (whole, axes[rank])
    if weight.scales.shape[0] > 1:
        outer, inner = inner, outer
    return (outer, *axes[:rank], inner)


def stored_axes_of_leaves(weight, axes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Logical axes of every array that a weight consists of, see `stored_axes`."""
    stored = stored_axes(weight, axes)
    return [stored, stored[:-1]] if isinstance(weight, Quantized) else [stored]


def abstract(shape: tuple[int, ...], inputs: int, groups: int) -> Quantized:
    """A matrix of `shape`, whose last `inputs` axes are contracted, without values."""
    out = shape[:-inputs]
    width = math.prod(shape[-inputs:]) // groups
    return Quantized(
        jax.ShapeDtypeStruct((groups, *out, width), jnp.int8),
        jax.ShapeDtypeStruct((groups, *out), jnp.float32),
        tuple(shape),
    )


def quantize(matrix: np.ndarray, inputs: int, groups: int) -> Quantized:
    """Rounds a matrix, largest value of every scale to 127; NumPy in and out.

    The product of values and scales, exact in float64, is rounded to the same integers
    and scales again.

    Args:
      matrix: float32 or float64 [*out, *in].
      inputs: how many axes `in` are.
      groups: G.
    """
    out, inner = matrix.shape[:-inputs], matrix.shape[-inputs:]
    wide = matrix.reshape(*out, groups, math.prod(inner) // groups)
    top = np.maximum(wide.max(-1), -wide.min(-1)).astype(np.float64)
    scales = (top / TOP).astype(np.float32)
    # A scale may underflow; its weights are zeros then.
    safe = np.where(scales > 0, scales, np.float32(np.inf))
    steps = wide / safe[..., None].astype(wide.dtype)
    values = np.clip(np.rint(steps, out=steps), -TOP, TOP, out=steps).astype(np.int8)
    return Quantized(
        np.moveaxis(values, -2, 0),
        np.moveaxis(scales, -1, 0),
        matrix.shape,
    )
