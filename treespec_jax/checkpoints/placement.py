"""From the tensors of a checkpoint to the parameters of the model.

A name table lists, for every tensor of a checkpoint, where in which parameter it goes.
Tables are data: a new family or format adds a table and a source, nothing else.

Values go in blocks of a few MiB from the file into the array that stays, cast and
checked on the way; with a mesh, of every tensor only what this process's devices hold
is read. So memory peaks at the parameters plus a block, whatever the sizes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from treespec_jax.checkpoints import int8_scales
from treespec_jax.checkpoints.pieces import Piece, Tensors, TensorSource
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError
from treespec_jax.models import memory
from treespec_jax.models.drafter_config import EagleConfig, HeadConfig, MedusaConfig
from treespec_jax.models.eagle import EagleModel
from treespec_jax.models.medusa import MedusaHeads
from treespec_jax.models.quantized import Quantized, quantize, stored_axes
from treespec_jax.models.transformer import Transformer
from treespec_jax.models.weight_types import (
    FLOATS,
    Types,
    check_dtype,
    is_int8,
    types_of,
)
from treespec_jax.sharding import Rules, sharding_of

# What is built of which configuration.
_MODULES = {
    ModelConfig: Transformer,
    EagleConfig: EagleModel,
    MedusaConfig: MedusaHeads,
}

# Part of an array: start and stop along every axis.
Box = tuple[tuple[int, int], ...]

# Bytes of a tensor that are in memory beside the parameters, in float32.
_PART = 4 << 20

# Checks of large tensors run in blocks of this many elements, which stay in cache.
_BLOCK = 1 << 18
_BROKEN = "holds NaN or infinity; the file is damaged, or training went wrong"


@dataclasses.dataclass(frozen=True)
class Item:
    """A parameter to read: its dotted path, and its bytes in the model."""

    path: str
    nbytes: int


# Wraps the work list, to show progress: `lambda items: tqdm.tqdm(items)`.
Progress = Callable[[Sequence[Item]], Iterable[Item]]


def abstract_parameters(config: ModelConfig | HeadConfig, types: Types):
    """The model without values: its graph, and its parameters by dotted path."""
    module = _MODULES[type(config)]
    made = module(config, dtype=types.dtype, weights=types.weights, rngs=None)
    graph, state = nnx.split(made)
    return graph, state, _by_path(state)


def parameters_of(model: nnx.Module) -> dict[str, Any]:
    """The parameters of a model by dotted path, "layers.0.mlp.down" for example."""
    return _by_path(nnx.state(model, nnx.Param))


def _by_path(state) -> dict[str, Any]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def concrete(graph, state, arrays: Mapping[str, jax.Array]) -> nnx.Module:
    """Puts arrays, by dotted path, into an abstract model."""
    paths = [path for path, _ in nnx.to_flat_state(state)]
    leaves = [leaf.replace(arrays[name]) for name, leaf in _by_path(state).items()]
    filled = nnx.from_flat_state(zip(paths, leaves, strict=True))
    return nnx.merge(graph, filled)


class About(Protocol):
    """What is known of a checkpoint before its weights are read.

    Attributes:
      config: of what is built.
      kind: names what has such tensors, in messages.
    """

    config: ModelConfig | HeadConfig
    kind: str

    def open(self) -> Tensors:
        """The tensors, unread, and where they go."""


class Parameters:
    """The parameters of a checkpoint, each read when it is asked for.

    Args:
      about: the checkpoint, as `describe` gave it.
      dtype: float32, bfloat16 or float16, of norms, biases and activations; None: as
        stored.
      given: parameters that are not read but come from elsewhere, by dotted path.
      weights: type of the matrices, see `models.weight_types`, to which they are cast
        or rounded on the way; None: that of `dtype`, but int8 where so stored.

    Attributes:
      types: of the parameters.
      items: what there is to read, in the order of the model.
      count: of the numbers in them.
      source: of the tensors.
      scales: factors of channels that are folded in before rounding to int8, or None.

    Raises:
      UserError: a tensor is missing, unread, of the wrong shape or of a dtype that is
        not floating. Nothing has been read by then.
    """

    def __init__(
        self,
        about: About,
        dtype: Any = None,
        given: Mapping[str, jax.Array] | None = None,
        weights: str | None = None,
    ):
        self._given = dict(given or {})
        if dtype is not None:
            check_dtype(dtype)
        tensors = about.open()
        self.source = tensors.source
        stored = getattr(self.source, "weights", None)
        self.types = types_of(dtype or self.source.dtype, weights or stored)
        self.scales: int8_scales.Int8Scales | None = None
        self._offset = float(getattr(about.config, "unit_offset_norms", False))
        # What was rounded already has had them.
        rounds = self.types.is_int8 and not (stored and is_int8(stored))
        if rounds and isinstance(about.config, ModelConfig):
            self.scales = int8_scales.read(about.path, about.config)
        abstract = abstract_parameters(about.config, self.types)
        self._graph, self._state, self._flat = abstract
        pieces = tensors.pieces
        flat = [item for item in self._flat.items() if item[0] not in self._given]
        if pieces is None:
            pieces = [Piece(path, leaf.shape, path) for path, leaf in flat]
        _check_tensors(pieces, self.source, set(tensors.ignored), about.kind)
        self._pieces = defaultdict(list)
        for piece in pieces:
            self._pieces[piece.path].append(piece)
        self.items = [Item(path, nbytes(leaf)) for path, leaf in flat]
        self.count = sum(leaf.size for _, leaf in flat)

    def read(self, path: str, box: Box | None = None) -> np.ndarray | Quantized:
        """A parameter, or the part of it in `box`.

        Args:
          path: dotted.
          box: None: all of it. Of a matrix in int8 the inputs are whole.

        Raises:
          UserError: a tensor that it comes from is damaged, holds NaN or infinity, or
            values that float16 cannot hold.
        """
        leaf = self._flat[path].get_value()
        box = box or tuple((0, size) for size in leaf.shape)
        if isinstance(leaf, Quantized):
            return self._read_int8(path, leaf, box)
        return self._read(path, box, leaf.dtype)

    def _read(self, path: str, box: Box, dtype: np.dtype) -> np.ndarray:
        buffer = memory.empty(tuple(stop - start for start, stop in box), dtype)
        for piece in self._pieces[path]:
            _fill(buffer, box, self._flat[path].shape, piece, self.source)
        if self.scales is not None:
            self.scales.apply(path, buffer, box, self._offset)
        return buffer

    def _read_int8(self, path: str, leaf: Quantized, box: Box) -> Quantized:
        rank, groups = leaf.out_rank, leaf.scales.shape[0]
        out = tuple(stop - start for start, stop in box[:rank])
        shape = (groups, *out, leaf.values.shape[-1])
        values = memory.empty(shape, np.dtype(np.int8))
        scales = memory.empty(shape[:-1], np.dtype(np.float32))
        # What was int8 comes as float64, in which it is rounded to itself.
        wide = {self.source.dtypes()[piece.name] for piece in self._pieces[path]}
        dtype = np.dtype("float64" if "float64" in wide else "float32")
        inner = box[rank:]
        for part in _parts(box[:rank], math.prod(leaf.shape[rank:])):
            block = self._read(path, (*part, *inner), dtype)
            done = quantize(block, len(inner), groups)
            where = (slice(None), *_within(part, box[:rank]))
            values[where], scales[where] = done.values, done.scales
        return Quantized(values, scales, (*out, *leaf.shape[rank:]))

    def build(
        self,
        progress: Progress = iter,
        mesh: jax.sharding.Mesh | None = None,
        rules: Rules | None = None,
    ) -> nnx.Module:
        """Reads every parameter onto its device, or onto the devices of a mesh.

        Raises:
          UserError: as `read`; a rule names no axis of the mesh.
        """
        rules = rules or Rules()
        # All are known before the first is read.
        shardings = {
            path: mesh and _sharding(leaf, mesh, rules)
            for path, leaf in self._flat.items()
            if path not in self._given
        }
        arrays = {
            item.path: self._put(item.path, shardings[item.path])
            for item in progress(self.items)
        }
        return concrete(self._graph, self._state, arrays | self._given)

    def _put(self, path: str, sharding: NamedSharding | None) -> jax.Array | Quantized:
        if sharding is None:
            return jax.device_put(self.read(path))
        leaf = self._flat[path].get_value()
        if isinstance(leaf, Quantized):
            return self._put_int8(path, leaf, sharding)
        shards = []
        for box, holders in _boxes(sharding, leaf.shape).items():
            buffer = self.read(path, box)
            shards += [jax.device_put(buffer, device) for device in holders]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)

    def _put_int8(self, path: str, leaf: Quantized, sharding) -> Quantized:
        """A scale needs all inputs: they are read whole, and cut after rounding."""
        rank = leaf.out_rank
        inner = tuple((0, size) for size in leaf.shape[rank:])
        shards: tuple[list, list] = [], []
        for box, holders in _boxes(sharding, leaf.values.shape).items():
            part = self.read(path, (*box[1:-1], *inner))
            first, last = slice(*box[0]), slice(*box[-1])
            cut = part.values[first, ..., last], part.scales[first]
            for device in holders:
                for array, into in zip(cut, shards, strict=True):
                    into.append(jax.device_put(np.ascontiguousarray(array), device))
        of_scales = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-1]))
        values, scales = (
            jax.make_array_from_single_device_arrays(abstract.shape, where, arrays)
            for abstract, where, arrays in zip(
                (leaf.values, leaf.scales), (sharding, of_scales), shards, strict=True
            )
        )
        return Quantized(values, scales, leaf.shape)


def nbytes(leaf: nnx.Variable) -> int:
    """Bytes of a parameter, which may be abstract."""
    arrays = jax.tree.leaves(leaf.get_value())
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def _sharding(leaf: nnx.Variable, mesh: jax.sharding.Mesh, rules: Rules):
    """Of a parameter, or of the values of one in int8."""
    value = leaf.get_value()
    axes = stored_axes(value, leaf.get_metadata("logical_axes"))
    shape = value.values.shape if isinstance(value, Quantized) else value.shape
    return sharding_of(axes, shape, mesh, rules)


def _boxes(sharding: NamedSharding, shape) -> dict[Box, list[jax.Device]]:
    """The parts of an array of `shape` that devices of this process hold."""
    devices = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        spans = (part.indices(size) for part, size in zip(index, shape, strict=True))
        devices[tuple((start, stop) for start, stop, _ in spans)].append(device)
    return devices


def _parts(box: Box, width: int) -> Iterator[Box]:
    """Cuts a box of rows, each of `width` elements, into blocks that are rounded."""
    sizes = [stop - start for start, stop in box]
    # Rounding makes four arrays of a block's size beside it.
    count = _PART // 4 // 4
    axis = 0
    while axis < len(box) - 1 and math.prod(sizes[axis + 1 :]) * width > count:
        axis += 1
    run = max(1, count // (width * math.prod(sizes[axis + 1 :])))
    for lead in itertools.product(*(range(*span) for span in box[:axis])):
        ahead = tuple((i, i + 1) for i in lead)
        for first in range(*box[axis], run):
            stop = min(first + run, box[axis][1])
            yield (*ahead, (first, stop), *box[axis + 1 :])


def _check_finite(array: np.ndarray, name: str, where, reason: str = _BROKEN) -> None:
    """Raises UserError, with the reason, if an array holds NaN or infinity.

    Looks at the exponent bits, in blocks, because numpy's own test takes a temporary
    of the array's size and is slow in bfloat16.
    """
    info = jnp.finfo(array.dtype)
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    mask = unsigned.type(((1 << info.nexp) - 1) << info.nmant)
    bits = array.reshape(-1).view(unsigned)
    for start in range(0, bits.size, _BLOCK):
        if ((bits[start : start + _BLOCK] & mask) == mask).any():
            raise UserError(f"{where}: tensor {name} {reason}")


def _check_tensors(
    pieces: Iterable[Piece], source: TensorSource, ignored: set[str], kind: str
) -> None:
    shapes, dtypes = source.shapes(), source.dtypes()
    for piece in pieces:
        if piece.name not in shapes:
            raise UserError(
                f"{source.path}: tensor {piece.name} is missing, which models of "
                f"{kind} have; the file is incomplete or of another family"
            )
        found, wanted = list(shapes[piece.name]), list(piece.shape)
        if found != wanted:
            raise UserError(
                f"{source.path}: tensor {piece.name} has shape {found}, the "
                f"configuration wants {wanted}; configuration and weights do not "
                "belong together"
            )
        dtype = dtypes[piece.name]
        if dtype not in (*FLOATS, "float64"):
            raise UserError(
                f"{source.path}: tensor {piece.name} is {dtype}; quantised weights are "
                f"not supported, give {', '.join(FLOATS)}"
            )
    unread = sorted(set(shapes) - {piece.name for piece in pieces} - ignored)
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        raise UserError(
            f"{source.path}: tensor {unread[0]}{more} would stay unread; {kind}, "
            "which the configuration names, has no such tensor"
        )


def _fill(
    buffer: np.ndarray, box: Box, shape: Sequence[int], piece: Piece, source: Any
) -> None:
    """Reads what `piece` holds of the part `box` of its parameter into `buffer`."""
    overlap = _overlap(box, shape, piece.index)
    if overlap is None:
        return
    local, sizes, wanted = overlap
    view = buffer[local]
    for block in _blocks(wanted, sizes, piece.interleaved):
        _copy(view[_within(block, wanted)], block, sizes, piece, source)


def _copy(
    into: np.ndarray, block: Box, sizes: Sequence[int], piece: Piece, source: Any
) -> None:
    """Reads `block` of the tensor, seen as an array of `sizes`."""
    whole = len(sizes) - 2 if piece.interleaved else None
    region, read = _region(piece.shape, sizes, block, whole)
    tensor = source.read(piece.name, region)
    _check_finite(tensor, piece.name, source.path)
    tensor = tensor.reshape([stop - start for start, stop in read])
    if piece.interleaved:
        *lead, rows, width = tensor.shape
        pairs = tensor.reshape(*lead, rows // 2, 2, width)
        tensor = np.swapaxes(pairs, -3, -2).reshape(tensor.shape)
    if piece.unit_offset:
        # In float32: next to 1 a narrower type would cut most of w off.
        tensor = tensor.astype(np.float32) - np.float32(1)
    with np.errstate(over="ignore"):
        np.copyto(into, tensor[_within(block, read)], casting="unsafe")
    if into.dtype.name == "float16" and tensor.dtype.name != "float16":
        reason = "holds values above float16's 65504; choose bfloat16 or float32"
        _check_finite(np.ascontiguousarray(into), piece.name, source.path, reason)


def _within(inner: Box, outer: Box) -> tuple[slice, ...]:
    """Where `inner` lies in an array of `outer`."""
    return tuple(
        slice(start - first, stop - first)
        for (start, stop), (first, _) in zip(inner, outer, strict=True)
    )


def _overlap(
    box: Box, shape: Sequence[int], index: tuple[Any, ...]
) -> tuple[tuple[Any, ...], list[int], Box] | None:
    """What the part `index` of a parameter has in common with its part `box`.

    Returns:
      Where that lies in an array of the box alone; the sizes of the part that `index`
      names; and where it lies in that. None if they have nothing in common.
    """
    entries = (*index, *[slice(None)] * (len(shape) - len(index)))
    local: list[Any] = []
    sizes: list[int] = []
    wanted: list[tuple[int, int]] = []
    for entry, size, (start, stop) in zip(entries, shape, box, strict=True):
        if isinstance(entry, int):
            if not start <= entry < stop:
                return None
            local.append(entry - start)
            continue
        first, last, _ = entry.indices(size)
        low, high = max(first, start), min(last, stop)
        if low >= high:
            return None
        local.append(slice(low - start, high - start))
        sizes.append(last - first)
        wanted.append((low - first, high - first))
    return tuple(local), sizes, tuple(wanted)


def _blocks(box: Box, sizes: Sequence[int], interleaved: bool) -> Iterator[Box]:
    """Cuts a box into runs along its first axis of more than one element.

    The axis of rotary pairs, the last but one, stays whole.
    """
    last = len(box) - (3 if interleaved else 1)
    axis = next((i for i, (a, b) in enumerate(box[:last]) if b - a > 1), max(last, 0))
    (start, stop), rest = box[axis], math.prod(sizes[axis + 1 :])
    run = max(1, _PART // (4 * rest))
    for first in range(start, stop, run):
        yield *box[:axis], (first, min(first + run, stop)), *box[axis + 1 :]


def _region(
    shape: Sequence[int], sizes: Sequence[int], block: Box, whole: int | None
) -> tuple[tuple[slice, ...], Box]:
    """What to read of a tensor of `shape` for a block of it, seen as `sizes`.

    Every axis of the tensor is one or several of `sizes`. Of several the first one
    that is not 1 bounds what is read; the others, and `whole`, are read whole.

    Returns:
      A slice for every axis of the tensor, and the part of `sizes` that they cover.
    """
    region: list[slice] = []
    read: list[tuple[int, int]] = []
    axis = 0
    for size in shape:
        first, count = axis, 1
        while count < size or (axis < len(sizes) and sizes[axis] == 1):
            count *= sizes[axis]
            axis += 1
        assert count == size, (shape, sizes)
        bound = next((i for i in range(first, axis) if sizes[i] > 1), None)
        if bound is None or bound == whole:
            region.append(slice(0, size))
            read += [(0, n) for n in sizes[first:axis]]
            continue
        inner = math.prod(sizes[bound + 1 : axis])
        start, stop = block[bound]
        region.append(slice(start * inner, stop * inner))
        read += [block[i] if i == bound else (0, sizes[i]) for i in range(first, axis)]
    return tuple(region), tuple(read)
