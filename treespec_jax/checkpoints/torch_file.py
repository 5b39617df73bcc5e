"""Tensors of a file that `torch.save` wrote, without torch and without trust in it.

Such a file is a zip archive: `data.pkl` says by pickle which tensors there are, and
`data/0`, `data/1`, … hold their numbers. A pickle may name any function to call; here
only what builds a tensor or an ordered dictionary is admitted, and all else is refused
by its name before anything is called. Free of jax.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pickle
import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np

from treespec_jax.checkpoints.files import check_pointer, first_line
from treespec_jax.errors import UserError

# Kinds of storage, as numpy calls them.
_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_FLOATS = ("float32", "bfloat16", "float16")
# Of a member's header within the archive: the lengths of its name and of what follows.
_HEADER, _LENGTHS = 30, struct.Struct("<26x2H")


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Numbers of one type in a row.

    Attributes:
      key: name of the archive's member.
      dtype: as numpy calls it.
      size: how many.
    """

    key: str
    dtype: str
    size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A part of a storage.

    Attributes:
      storage: whose part it is.
      offset: of the first number.
      shape: of the tensor.
    """

    storage: _Storage
    offset: int
    shape: tuple[int, ...]


class TorchFile:
    """See `TensorSource`.

    Args:
      path: of the file.

    Raises:
      UserError: not such a file, a damaged one, or one whose pickle asks for more than
        tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as start:
                check_pointer(path, start.read(24))
            with zipfile.ZipFile(path) as archive:
                root = _root(path, archive)
                with archive.open(f"{root}/data.pkl") as pickled:
                    found = _Unpickler(pickled, path).load()
                self._spans = self._found_spans(archive, root)
        except UserError:
            raise
        except zipfile.BadZipFile:
            raise UserError(
                f"{path} is no file of torch.save's zip form; save it again with a "
                "present torch, or as safetensors"
            ) from None
        # What a damaged pickle raises depends on where it is damaged.
        except Exception as error:
            raise UserError(
                f"{path} cannot be read ({first_line(error)}); it is damaged, download "
                "it again"
            ) from None
        if not isinstance(found, dict):
            raise UserError(f"{path} must hold tensors by name, not {type(found)}")
        sizes: Counter[str] = Counter()
        for name, value in found.items():
            if not isinstance(value, _Tensor):
                raise UserError(f"{path}: {name!r} is no tensor; save tensors alone")
            self._check(name, value)
            sizes[value.storage.dtype] += math.prod(value.shape)
        self._tensors: dict[str, _Tensor] = dict(found)
        self.dtype = next(
            (k for k, _ in sizes.most_common() if k in _FLOATS), "float32"
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def dtypes(self) -> dict[str, str]:
        return {name: tensor.storage.dtype for name, tensor in self._tensors.items()}

    def files(self) -> list[Path]:
        return [self.path]

    def read(self, name: str, region: tuple[slice, ...]) -> np.ndarray:
        tensor = self._tensors[name]
        dtype = np.dtype(tensor.storage.dtype)
        first, shape = tensor.offset, tensor.shape
        if shape:
            rows, row = region[0], math.prod(shape[1:])
            first += rows.start * row
            shape = (rows.stop - rows.start, *shape[1:])
        start = self._spans[tensor.storage.key][0] + first * dtype.itemsize
        flat = np.fromfile(self.path, dtype, math.prod(shape), offset=start)
        array = flat.reshape(shape)
        return array[:, *region[1:]] if shape else array

    def _found_spans(self, archive: zipfile.ZipFile, root: str) -> dict[str, Any]:
        """Start and bytes of every storage in the file."""
        spans = {}
        with self.path.open("rb") as file:
            for info in archive.infolist():
                folder, _, key = info.filename.rpartition("/")
                if folder != f"{root}/data":
                    continue
                if info.compress_type != zipfile.ZIP_STORED:
                    raise UserError(f"{self.path}: {info.filename} is compressed")
                file.seek(info.header_offset)
                lengths = _LENGTHS.unpack(file.read(_HEADER))
                start = info.header_offset + _HEADER + sum(lengths)
                spans[key] = start, info.file_size
        return spans

    def _check(self, name: str, tensor: _Tensor) -> None:
        storage = tensor.storage
        size = storage.size * np.dtype(storage.dtype).itemsize
        last = tensor.offset + math.prod(tensor.shape)
        held = self._spans.get(storage.key, (0, -1))[1]
        if held != size or not 0 <= tensor.offset <= last <= storage.size:
            raise UserError(
                f"{self.path}: tensor {name} lies outside the numbers that are there; "
                "the file is damaged, download it again"
            )


def _root(path: Path, archive: zipfile.ZipFile) -> str:
    """The folder of the archive that holds everything."""
    names = archive.namelist()
    root = next((n.partition("/")[0] for n in names if n.endswith("/data.pkl")), None)
    if root is None:
        raise UserError(f"{path} is a zip archive, but holds no tensors of torch.save")
    order = f"{root}/byteorder"
    if order in names and archive.read(order) != b"little":
        raise UserError(f"{path} was written on a big-endian machine; save it again")
    return root


class _Call:
    """Something that a pickle may call; made anew for each, and closed to changes."""

    __slots__ = ("_function",)

    def __init__(self, function):
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name, value):
        raise AttributeError(name)

    def __call__(self, *args):
        return self._function(*args)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A type of storage that a pickle names.

    Attributes:
      dtype: of its numbers.
    """

    __slots__ = ("dtype",)

    dtype: str


class _Unpickler(pickle.Unpickler):
    """Builds dictionaries of tensors, and refuses everything else."""

    def __init__(self, file, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _Kind(_DTYPES[name])
        if (module, name) == ("collections", "OrderedDict"):
            return _Call(lambda *pairs: collections.OrderedDict(*pairs))
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _Call(self._tensor)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _Call(lambda tensor, *_: tensor)
        raise UserError(
            f"{self._path} asks for {module}.{name}, which builds no tensor; such a "
            "file could run anything, so it is not read: save tensors alone, or "
            "convert it to safetensors"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, size = pid
        return _Storage(str(key), kind.dtype, int(size))

    def _tensor(self, storage: _Storage, offset: int, shape, strides, *_) -> _Tensor:
        shape, expected = tuple(int(size) for size in shape), 1
        for size, stride in reversed(list(zip(shape, strides, strict=True))):
            if size < 0 or (size > 1 and stride != expected):
                raise UserError(
                    f"{self._path}: a tensor of shape {list(shape)} is not stored row "
                    "by row; save it .contiguous()"
                )
            expected *= size
        return _Tensor(storage, int(offset), shape)
