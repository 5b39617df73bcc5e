"""From the tensors of a checkpoint to the parameters of the model.

A name table lists, for every tensor of a checkpoint, where in which parameter it goes.
Tables are data: a new family or format adds a table and a source, nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np
from flax import nnx

from treespec_jax.checkpoints.pieces import Piece, TensorSource
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError
from treespec_jax.models import memory
from treespec_jax.models.transformer import Transformer

DTYPES = ("float32", "bfloat16", "float16")

# Wraps the work list, to show progress: `lambda items: tqdm.tqdm(items)`.
Progress = Callable[[Sequence[Any]], Iterable[Any]]

# Checks of large tensors run in blocks of this many elements, which stay in cache.
_BLOCK = 1 << 18
_BROKEN = "holds NaN or infinity; the file is damaged, or training went wrong"


def check_dtype(dtype: Any) -> np.dtype:
    """The numpy dtype of a parameter dtype given by name or type.

    Raises:
      UserError: not one of `DTYPES`.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return found


def abstract_parameters(config: ModelConfig, dtype: np.dtype):
    """The model without values: its graph, and its parameters by dotted path."""
    graph, state = nnx.split(
        nnx.eval_shape(lambda: Transformer(config, dtype=dtype, rngs=nnx.Rngs(0)))
    )
    flat = {dotted(path): leaf for path, leaf in nnx.to_flat_state(state)}
    return graph, state, flat


def dotted(path: Sequence[Any]) -> str:
    """("layers", 0, "mlp") -> "layers.0.mlp"."""
    return ".".join(map(str, path))


def concrete(graph, state, arrays: Mapping[str, jax.Array]) -> Transformer:
    """Puts arrays, by dotted path, into an abstract model."""
    filled = [
        (path, leaf.replace(arrays[dotted(path)]))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def build(
    config: ModelConfig,
    dtype: np.dtype,
    pieces: Sequence[Piece],
    source: TensorSource,
    ignored: Iterable[str] = (),
    progress: Progress = iter,
) -> Transformer:
    """Reads every tensor into its place.

    Holds the parameters once, plus the tensor at hand; the largest parameter comes
    first, so that its spare copy falls into the time when little else is held.

    Args:
      config: shape of the model.
      dtype: of the parameters; tensors are cast on the way.
      pieces: the name table; together they fill every parameter.
      source: of the tensors.
      ignored: names of tensors that may be there and are of no use.
      progress: wraps the list of parameters.

    Raises:
      UserError: a tensor is missing, unread, of the wrong shape, not of a floating
        dtype, or holds NaN or infinity.
    """
    _check_names(pieces, source, set(ignored), config.family)
    graph, state, flat = abstract_parameters(config, dtype)
    parts = defaultdict(list)
    for piece in pieces:
        parts[piece.path].append(piece)
    arrays = {}
    order = sorted(flat, key=lambda path: -flat[path].size)
    for path in progress(order):
        buffer = memory.empty(flat[path].shape, dtype)
        for piece in parts[path]:
            _place(source.read(piece.name), piece, buffer, source.path)
        arrays[path] = jax.device_put(buffer)
        del buffer
    return concrete(graph, state, arrays)


def check_shape(where, name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Raises UserError, with both shapes, unless they are equal."""
    if tuple(found) != tuple(wanted):
        raise UserError(
            f"{where}: tensor {name} has shape {list(found)}, the configuration wants "
            f"{list(wanted)}; configuration and weights do not belong together"
        )


def check_finite(array: np.ndarray, name: str, where, reason: str = _BROKEN) -> None:
    """Raises UserError, with the reason, if an array holds NaN or infinity.

    Looks at the exponent bits, in blocks, because numpy's own test takes a temporary
    of the array's size and is slow in bfloat16.
    """
    info = jnp.finfo(array.dtype)
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    mask = unsigned.type(((1 << info.nexp) - 1) << info.nmant)
    bits = array.reshape(-1).view(unsigned)
    for at in range(0, bits.size, _BLOCK):
        if ((bits[at : at + _BLOCK] & mask) == mask).any():
            raise UserError(f"{where}: tensor {name} {reason}")


def _check_names(pieces, source: TensorSource, ignored: set[str], family: str) -> None:
    shapes = source.shapes()
    for piece in pieces:
        if piece.name not in shapes:
            raise UserError(
                f"{source.path}: tensor {piece.name} is missing, which models of "
                f"family {family} have; the file is incomplete or of another family"
            )
        check_shape(source.path, piece.name, shapes[piece.name], piece.shape)
    unread = sorted(set(shapes) - {piece.name for piece in pieces} - ignored)
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        raise UserError(
            f"{source.path}: tensor {unread[0]}{more} would stay unread; family "
            f"{family}, which the configuration names, has no such tensor"
        )


def _place(tensor: np.ndarray, piece: Piece, buffer: np.ndarray, where) -> None:
    name = tensor.dtype.name
    if name not in DTYPES and name != "float64":
        raise UserError(
            f"{where}: tensor {piece.name} is {name}; quantised weights are not "
            f"supported, give {', '.join(DTYPES)}"
        )
    check_finite(tensor, piece.name, where)
    part = buffer[piece.index]
    if piece.interleaved:
        *lead, rows, width = part.shape
        pairs = tensor.reshape(*lead, rows // 2, 2, width)
        tensor = np.swapaxes(pairs, -3, -2)
    with np.errstate(over="ignore"):
        np.copyto(part, tensor.reshape(part.shape), casting="unsafe")
    if buffer.dtype.name == "float16" and name != "float16":
        reason = "holds values above float16's 65504; choose bfloat16 or float32"
        check_finite(np.ascontiguousarray(part), piece.name, where, reason)
