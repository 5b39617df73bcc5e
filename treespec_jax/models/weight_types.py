"""The types in which weights are stored, apart from those that computation uses."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from treespec_jax.errors import UserError

if TYPE_CHECKING:
    # Settings are checked before numpy is there.
    import numpy as np

FLOATS = ("float32", "bfloat16", "float16")
# As messages and flags list them.
WEIGHTS = (*FLOATS, "int8", "int8:GROUP")
_INT8 = re.compile(r"int8(?::([1-9]\d*))?")


@dataclasses.dataclass(frozen=True)
class Types:
    """What a model is made of.

    Attributes:
      dtype: of activations, norms and biases.
      weights: of matrices, one of `WEIGHTS`; embedding and head included. "int8" keeps
        one scale per output channel, "int8:128" one per 128 inputs of each, or per the
        next smaller number that divides them.
    """

    dtype: np.dtype
    weights: str

    @property
    def on_file(self) -> dict[str, str]:
        """What a checkpoint of such parameters says of them, to be read again."""
        if self.is_int8:
            return {"dtype": self.dtype.name, "weights": self.weights}
        return {"dtype": self.weights}

    @property
    def is_int8(self) -> bool:
        """Whether matrices are `quantized.Quantized`."""
        return is_int8(self.weights)

    def groups(self, inputs: int) -> int:
        """How many groups of equal size `inputs` are cut into, each with its scale."""
        (size,) = _INT8.fullmatch(self.weights).groups()
        if size is None:
            return 1
        least = -(-inputs // int(size))
        return next(n for n in range(least, inputs + 1) if inputs % n == 0)


def types_of(dtype: Any, weights: str | None = None) -> Types:
    """The types of a model.

    Args:
      dtype: float32, bfloat16 or float16, by name or type.
      weights: one of `WEIGHTS`; None: that of `dtype`.

    Raises:
      UserError: one of them is unknown.
    """
    dtype = check_dtype(dtype)
    return Types(dtype, check_weights(weights or dtype.name))


def is_int8(weights: str) -> bool:
    """Whether the weight type of that name holds integers and scales."""
    return _INT8.fullmatch(weights) is not None


def check_weights(weights: Any) -> str:
    """The name of a weight type.

    Raises:
      UserError: it is none of `WEIGHTS`.
    """
    if not isinstance(weights, str) or not (weights in FLOATS or is_int8(weights)):
        raise UserError(
            f"weights must be one of {', '.join(WEIGHTS)}, such as int8:128, got "
            f"{weights!r}"
        )
    return weights


def check_dtype(dtype: Any) -> np.dtype:
    """The numpy dtype of an activation dtype given by name or type.

    Raises:
      UserError: not one of `FLOATS`.
    """
    import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
    import numpy as np

    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in FLOATS:
        raise UserError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype!r}")
    return found
