"""GGUF files, as llama.cpp writes them: metadata and tensors; free of jax.

The gguf package reads the header and dequantises. Tensors are not read through its map
of the file: the pages of a map count as memory, and add up to a copy of the model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from treespec_jax.checkpoints.files import check_pointer, first_line
from treespec_jax.errors import UserError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_AGAIN = "copy or download it again"

# Of a text.
_LENGTH = struct.Struct("<Q")
# Values that are dequantised at once: temporaries stay in the processor's cache.
_CHUNK = 1 << 16


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file.

    Attributes:
      shape: as numpy has it, the last axis contiguous.
      kind: its type, as ggml calls it: "F32", "Q4_K".
      offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: str
    offset: int


@dataclasses.dataclass(frozen=True, eq=False)
class Header:
    """What a GGUF file says before its tensors' values; one object per file.

    Attributes:
      path: of the file.
      metadata: values by key; arrays are lists.
      tensors: by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do; False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """The header of a GGUF file; read once as long as the file stays the same.

    Raises:
      UserError: no GGUF file, of another version or byte order, or damaged; one part of
        several; a tensor of a type that the gguf package does not know.
    """
    try:
        status = path.stat()
        return _read_header(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


# A target and a drafter.
@functools.lru_cache(maxsize=2)
def _read_header(path: Path, size: int, modified: int) -> Header:
    _check_start(path)
    try:
        reader = _reader()(path)
        metadata = {name: _contents(field) for name, field in reader.fields.items()}
        tensors = {
            tensor.name: StoredTensor(
                tuple(int(size) for size in reversed(tensor.shape)),
                tensor.tensor_type.name,
                tensor.data_offset,
            )
            for tensor in reader.tensors
        }
    except Exception as error:  # the package raises many kinds
        reason = first_line(error)
        if "GGMLQuantizationType" in reason:
            raise UserError(
                f"{path}: {reason}: the gguf package does not know this tensor type; "
                "update it, or take another quantisation of the model"
            ) from None
        raise UserError(
            f"{path} cannot be read ({reason}); it is cut short or damaged, {_AGAIN}"
        ) from None
    parts = metadata.get("split.count", 0)
    if parts > 1:
        raise UserError(
            f"{path} is part {metadata.get('split.no', 0) + 1} of {parts} of a model; "
            "join the parts with llama-gguf-split --merge"
        )
    return Header(path, metadata, tensors)


def _check_start(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(24)
    check_pointer(path, start)
    if not start.startswith(MAGIC):
        raise UserError(
            f"{path} is no GGUF file: it begins with {start[:4]!r}; check the path, or "
            f"{_AGAIN}"
        )
    if len(start) < 24:
        raise UserError(f"{path} is cut short; {_AGAIN}")
    (version,) = struct.unpack_from("<I", start, 4)
    if version and not version & 0xFFFF:
        raise UserError(
            f"{path} is a big-endian GGUF file, only little-endian ones are supported; "
            "download or convert it as such"
        )
    if version not in _VERSIONS:
        raise UserError(
            f"{path} is a GGUF file of version {version}, only "
            f"{' and '.join(map(str, _VERSIONS))} are supported; convert the original "
            "model again"
        )


@functools.cache
def _reader() -> type:
    """The package's reader, with arrays left as they lie in the file.

    Element by element, as it reads them by itself, a vocabulary takes seconds.
    """
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        def _get_field_parts(self, start: int, kind: int):
            if kind != GGUFValueType.ARRAY:
                return super()._get_field_parts(start, kind)
            inner = GGUFValueType(self._get(start, np.uint32)[0])
            count = int(self._get(start + 4, np.uint64)[0])
            first = start + 12
            if inner == GGUFValueType.STRING:
                stop, data = first, memoryview(self.data)
                for _ in range(count):
                    stop += _LENGTH.size + _LENGTH.unpack_from(data, stop)[0]
                array = self.data[first:stop]
            elif inner in self.gguf_scalar_to_np:
                array = self._get(first, self.gguf_scalar_to_np[inner], count)
                stop = first + count * array.itemsize
            else:
                return super()._get_field_parts(start, kind)
            if stop > len(self.data):
                raise ValueError("an array goes past the end")
            return stop - start, [array], [0], [GGUFValueType.ARRAY, inner]

    return Reader


def _contents(field: Any) -> Any:
    """The value of a field: a number, a text, or a list of them."""
    from gguf import GGUFValueType

    if field.types != [GGUFValueType.ARRAY, GGUFValueType.STRING]:
        return field.contents()
    data, start, texts = memoryview(field.parts[-1]), 0, []
    while start < len(data):
        stop = start + _LENGTH.size + _LENGTH.unpack_from(data, start)[0]
        texts.append(str(data[start + _LENGTH.size : stop], "utf-8"))
        start = stop
    return texts


class GgufSource:
    """Tensors of a GGUF file, dequantised; see `TensorSource`.

    Quantised ones are float32, and `read` gives float32 for all: every type is exact in
    it.

    Raises:
      UserError: as `read_header`; a tensor of a type that the gguf package does not
        dequantise.
    """

    def __init__(self, path: Path):
        self.path = path
        self._tensors = read_header(path).tensors
        sizes: Counter[str] = Counter()
        for name, tensor in self._tensors.items():
            if not _has_values(tensor.kind):
                raise UserError(
                    f"{path}: tensor {name} is of type {tensor.kind}, which the gguf "
                    "package does not dequantise; take another quantisation of the "
                    "model"
                )
            sizes[tensor.kind] += math.prod(tensor.shape)
        (most, _), *_ = sizes.most_common(1) or [("F32", 0)]
        self.dtype = _FLOATS.get(most, "float32")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def dtypes(self) -> dict[str, str]:
        return {
            name: _FLOATS.get(tensor.kind, "float32")
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, region: tuple[slice, ...]) -> np.ndarray:
        tensor = self._tensors[name]
        per_block, width = _block(tensor.kind)
        # Rows are contiguous in the file; of every row, the blocks that are wanted.
        rows, *middle, columns = (slice(0, 1),) * (len(region) < 2) + region
        *inner, size = tensor.shape[1:] or tensor.shape
        blocks = size // per_block
        count, stride = rows.stop - rows.start, math.prod(inner) * blocks * width
        try:
            raw = np.fromfile(
                self.path,
                np.uint8,
                count * stride,
                offset=tensor.offset + rows.start * stride,
            )
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from None
        if raw.size < count * stride:
            raise UserError(
                f"{self.path}: tensor {name} is cut short; copy or download it again"
            )
        first, last = columns.start // per_block, -(-columns.stop // per_block)
        raw = raw.reshape(count, *inner, blocks, width)[:, *middle, first:last]
        values = _dequantise(raw.reshape(-1, width), tensor.kind)
        values = values.reshape(*raw.shape[:-2], (last - first) * per_block)
        start = first * per_block
        values = values[..., columns.start - start : columns.stop - start]
        return values if len(region) > 1 else values[0]

    def files(self) -> list[Path]:
        return [self.path]


@functools.cache
def _block(kind: str) -> tuple[int, int]:
    """Values and bytes of a block."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


@functools.cache
def _has_values(kind: str) -> bool:
    """Whether the gguf package dequantises this type."""
    try:
        with np.errstate(all="ignore"):
            _dequantise(np.zeros((1, _block(kind)[1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _dequantise(raw_BW: np.ndarray, kind: str) -> np.ndarray:
    """float32 values of blocks of bytes."""
    from gguf import GGMLQuantizationType, dequantize

    per_block, _ = _block(kind)
    found = np.empty((len(raw_BW), per_block), np.float32)
    step = max(1, _CHUNK // per_block)
    for start in range(0, len(raw_BW), step):
        chunk = raw_BW[start : start + step]
        values = dequantize(chunk.reshape(1, -1), GGMLQuantizationType[kind])
        found[start : start + step] = values.reshape(-1, per_block)
    return found
