"""Tensors of a folder of `*.safetensors` files, one or many; free of jax."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treespec_jax.checkpoints.files import check_pointer, first_line, read_json
from treespec_jax.errors import UserError

INDEX = "model.safetensors.index.json"

# As numpy calls them; what it does not know keeps the name that the file uses.
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_FLOATS = ("float32", "bfloat16", "float16")

# A file is mapped into memory, and the pages that were read stay with the map. It is
# opened anew after this many bytes, or they would add up to a copy of the model.
_MAPPED = 4 << 20


class SafetensorsSource:
    """Tensors of a folder of safetensors files; see `TensorSource`.

    The files are those that `model.safetensors.index.json` names; without an index
    `model.safetensors`, or else all there are.

    Args:
      folder: that holds them.
      files: to read instead.

    Raises:
      UserError: no such file, a shard of the index missing, an index that does not say
        what the shards hold, a tensor in two files, or a damaged header.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None):
        self.path = folder
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._current: tuple[Path, Any] | None = None
        self._read = 0
        files, index = _find(folder) if files is None else (files, None)
        named = {} if index is None else index[1]
        for file in files:
            with _open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dictionary)
                    if not self._is_meant(name, file, named):
                        continue
                    part = tensors.get_slice(name)
                    kind = part.get_dtype()
                    self._files[name] = file
                    self._shapes[name] = tuple(part.get_shape())
                    self._dtypes[name] = _DTYPES.get(kind, kind)
        if index is not None:
            self._check_index(*index)
        sizes: Counter[str] = Counter()
        for name, shape in self._shapes.items():
            sizes[self._dtypes[name]] += math.prod(shape)
        self.dtype = next(
            (kind for kind, _ in sizes.most_common() if kind in _FLOATS), "float32"
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def dtypes(self) -> dict[str, str]:
        return dict(self._dtypes)

    def files(self) -> list[Path]:
        return sorted(set(self._files.values()))

    def read(self, name: str, region: tuple[slice, ...]) -> np.ndarray:
        from safetensors import SafetensorError

        file = self._files[name]
        try:
            array = self._map(file).get_slice(name)[region]
        except (SafetensorError, OSError) as error:
            raise _damaged(file, f"tensor {name}: {first_line(error)}") from None
        self._read += array.nbytes
        return array

    def _map(self, file: Path) -> Any:
        if self._current is None or self._current[0] != file or self._read > _MAPPED:
            self._current = None  # before the next map is made
            self._current = file, _open(file)
            self._read = 0
        return self._current[1]

    def _is_meant(self, name: str, file: Path, index: Mapping[str, str]) -> bool:
        """Whether a tensor that this file holds is read from it.

        An index decides where another file holds one of that name, too.
        """
        before = self._files.get(name)
        if before is None:
            return True
        meant = index.get(name)
        if meant not in (before.name, file.name):
            raise UserError(
                f"tensor {name} is both in {before} and in {file.name}; remove the "
                "file that does not belong there"
            )
        return meant == file.name

    def _check_index(self, index: Path, names: Mapping[str, str]) -> None:
        for name, file in names.items():
            if name not in self._files or self._files[name].name != file:
                where = self._files.get(name)
                raise UserError(
                    f"{index} says that {file} holds tensor {name}, "
                    f"{'which no file does' if where is None else f'{where.name} does'}"
                    "; download the index and that file again"
                )
        for name, file in self._files.items():
            if name not in names:
                raise UserError(
                    f"{file} holds tensor {name}, which {index.name} does not name; "
                    "download both again"
                )


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise _damaged(file, first_line(error)) from None


def _damaged(file: Path, reason: str) -> UserError:
    with contextlib.suppress(OSError), file.open("rb") as start:
        check_pointer(file, start.read(24))
    return UserError(
        f"{file} cannot be read ({reason}); it is cut short or no safetensors file, "
        "copy or download it again"
    )


def _find(folder: Path) -> tuple[Iterable[Path], tuple[Path, Mapping[str, str]] | None]:
    """The files to read, and the index with what it says, if there is one."""
    index = folder / INDEX
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, Mapping) or not names:
            raise UserError(f"{index} lacks a weight_map; download it again")
        for name, file in names.items():
            if not isinstance(file, str) or not file or Path(file).name != file:
                raise UserError(
                    f"{index} puts tensor {name} into {file!r}, which is no file of "
                    "its folder; download it again"
                )
        files = [folder / name for name in sorted(set(names.values()))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing, {index.name} names it; fetch it")
        return files, (index, names)
    # Some publishers put the same weights beside it, named otherwise.
    only = folder / "model.safetensors"
    files = [only] if only.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder} holds no *.safetensors file; convert its weights to safetensors"
        )
    return files, None
