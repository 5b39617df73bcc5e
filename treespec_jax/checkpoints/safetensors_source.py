"""Tensors of a folder of `*.safetensors` files, one or many; free of jax."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from treespec_jax.checkpoints.files import first_line, read_json
from treespec_jax.errors import UserError

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class SafetensorsSource:
    """Tensors of a folder of safetensors files; see `TensorSource`.

    Raises:
      UserError: no such file, a shard of the index missing, or a damaged header.
    """

    def __init__(self, folder: Path):
        self.path = folder
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        sizes: Counter[str] = Counter()
        for file in _shards(folder):
            with self._open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dictionary)
                    part = tensors.get_slice(name)
                    self._files[name] = file
                    self._shapes[name] = tuple(part.get_shape())
                    sizes[part.get_dtype()] += int(np.prod(self._shapes[name]))
        self.dtype = next(
            (_DTYPES[kind] for kind, _ in sizes.most_common() if kind in _DTYPES),
            "float32",
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def read(self, name: str) -> np.ndarray:
        # Opened anew each time: the pages of a map that stays open would add up to a
        # second copy of the model.
        from safetensors import SafetensorError

        try:
            with self._open(self._files[name]) as tensors:
                return tensors.get_tensor(name)
        except (SafetensorError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{self._files[name]}: tensor {name} cannot be read "
                f"({first_line(error)}); convert it to float32, bfloat16 or float16"
            ) from None

    def _open(self, file: Path):
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(str(file), framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} cannot be read ({first_line(error)}); it is cut short or no "
                "safetensors file, copy or download it again"
            ) from None


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, Mapping) or not names:
            raise UserError(f"{index} lacks a weight_map; download it again")
        files = [folder / name for name in sorted(set(names.values()))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing, {index.name} names it; fetch it")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder} holds no *.safetensors file; convert its weights to safetensors"
        )
    return files
