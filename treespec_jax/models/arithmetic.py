"""How a model computes what is not a product: by the compiler's sums, or bit for bit.

A compiler sums floats in an order that goes with the shapes of a program, and joins a
product and the addition after it (which then rounds once, not twice) where both happen
to lie in one loop. So a row's last bits depend on how many rows stand beside it. Two
rules make them the same in every program:

* what is summed is an integer, and integer sums have no order;
* a product is `rounded` before anything is added to it.

All else of a pass is one IEEE operation, or one function, per element.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pallas_kernels.tree_attention import rounded
from treespec_jax.models.quantized import Quantized

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
# Bits of a float32: exponent, and the exponent of 2^127 over that of 2^-127.
_EXPONENT, _TWICE_BIAS = 0x7F800000, 254 << 23


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The compiler's.

    Attributes:
      attention: implementation of `tree_attention`; None: by platform.
    """

    attention: str | None = None

    def rounded(self, x: jax.Array) -> jax.Array:
        """A product that something may be added to."""
        return x

    def inverse_rms(self, x: jax.Array, eps: float) -> jax.Array:
        """1 / sqrt(mean(x²) + eps) over the axis before the last, which stays."""
        return lax.rsqrt(jnp.mean(x * x, axis=-2, keepdims=True) + eps)

    def activate(self, name: str, x: jax.Array) -> jax.Array:
        """An activation function by its name in configurations."""
        return _ACTIVATIONS[name](x)


@dataclasses.dataclass(frozen=True)
class BitwiseArithmetic(Arithmetic):
    """The same for a row of float32 in every program; see the module."""

    attention: str | None = "bitwise"

    def rounded(self, x: jax.Array) -> jax.Array:
        return rounded(x)

    def inverse_rms(self, x: jax.Array, eps: float) -> jax.Array:
        """In fixed point, relative to the power of two below the row's largest."""
        size = x.shape[-2]
        top = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
        bits = lax.bitcast_convert_type(top, jnp.int32) & _EXPONENT
        unit = lax.bitcast_convert_type(bits, jnp.float32)
        inverse = lax.bitcast_convert_type(_TWICE_BIAS - bits, jnp.float32)
        # A square is below 4: their sum stays below 2^31.
        grid = 2.0 ** (28 - math.ceil(math.log2(size)))
        small = x * inverse
        squares = jnp.round(small * small * grid).astype(jnp.int32)
        total = jnp.sum(squares, axis=-2, keepdims=True, dtype=jnp.int32)
        mean = total.astype(jnp.float32) * (1 / (grid * size)) * unit * unit
        return lax.rsqrt(rounded(mean) + eps)

    def activate(self, name: str, x: jax.Array) -> jax.Array:
        if name == "gelu_tanh":
            cube = rounded(0.044715 * rounded(rounded(x * x) * x))
            inner = rounded(math.sqrt(2 / math.pi) * (x + cube))
            return rounded(0.5 * x) * (1 + jnp.tanh(inner))
        return super().activate(name, x)


def bitwise(model: nnx.Module) -> nnx.Module:
    """The same model, its parameters shared, in `BitwiseArithmetic`.

    Args:
      model: with int8 matrices and float32 activations.
    """
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, state)
    for _, node in nnx.iter_graph(copy):
        if isinstance(node, nnx.Module) and hasattr(node, "arithmetic"):
            node.arithmetic = BitwiseArithmetic()
        elif isinstance(node, nnx.Param) and isinstance(node.get_value(), Quantized):
            node.set_value(dataclasses.replace(node.get_value(), bitwise=True))
    return copy
