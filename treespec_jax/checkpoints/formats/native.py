"""The package's own folders: `metadata.json`, `params/` (orbax) and the tokenizer.

`params/` holds the parameters in groups of some 64 MB, each an orbax checkpoint of its
own, so that a conversion holds one group and goes on after the last one. They are
read through tensorstore, which orbax stores in: any part of a parameter, whereas
orbax's own restore holds up to three copies of what it restores.

`metadata.json` holds the configuration, and size and checksum of every file of
`params/`. `checkpoints.saving` writes the folders.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from treespec_jax.checkpoints.files import cause, read_json
from treespec_jax.checkpoints.formats.protocol import Description
from treespec_jax.checkpoints.pieces import Tensors
from treespec_jax.checkpoints.tokenizers import Tokenizer, load_tokenizer
from treespec_jax.checks import from_mapping
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError

METADATA, PARAMS = "metadata.json", "params"
# A matrix in int8 is two arrays: its values, and scales [*out, G], each of I / G inputs
# of an output, by which they are to be multiplied.
VALUES, SCALES = "values", "scales"
FORMAT = "treespec-jax"
VERSION = 2


class NativeFormat:
    """See `Format`."""

    expects = f"a folder with {METADATA} (written by convert_checkpoint.py)"
    tokenizer_chosen = True

    def claims(self, path: Path) -> bool:
        return (path / METADATA).is_file()

    def describe(self, path: Path) -> Description:
        values = read_json(path / METADATA)
        _check(path / METADATA, values)
        config = from_mapping(ModelConfig, values["model"], f"{path / METADATA}: model")
        return Description(config, None, path, self, values.get("dtype"))

    def read_tokenizer(self, path: Path) -> Tokenizer | None:
        about = read_json(path / METADATA).get("tokenizer")
        if not about:
            return None
        ends = tuple(about.get("eos_ids", ()))
        return load_tokenizer(path / about["file"], about.get("bos_id"), ends)

    def open(self, description: Description) -> Tensors:
        return Tensors(NativeSource(description.path))


def _check(where: Path, values: Mapping[str, Any]) -> None:
    if values.get("format") != FORMAT:
        raise UserError(f"{where} was not written by {FORMAT}; check the path")
    if values.get("version") != VERSION:
        raise UserError(
            f"{where}: version {values.get('version')!r} is not known here, only "
            f"{VERSION}; update {FORMAT}, or convert the original again"
        )
    if not isinstance(values.get("model"), dict):
        raise UserError(f"{where} lacks 'model'; convert the original again")
    tokenizer = values.get("tokenizer")
    if tokenizer and not (isinstance(tokenizer, dict) and "file" in tokenizer):
        raise UserError(f"{where}: tokenizer lacks 'file'; convert the original again")


class NativeSource:
    """Parameters in a folder that `save` or `convert` wrote; see `TensorSource`.

    Raises:
      UserError: a file is missing, of another size, or changed; names the first one.
    """

    def __init__(self, path: Path):
        self.path = path
        values = read_json(path / METADATA)
        self.dtype, self.weights = values.get("dtype"), values.get("weights")
        # tensorstore takes absolute paths only.
        self._folder = path.absolute() / PARAMS
        files = values.get("files")
        if not isinstance(files, Mapping) or not files:
            raise UserError(
                f"{path / METADATA} lacks 'files'; convert the original again"
            )
        check_files(path / PARAMS, files)
        self._arrays: dict[str, Any] = {}
        for group in sorted({name.partition("/")[0] for name in files}):
            with self._reading(group):
                self._arrays.update(_open(self._folder / group))

        self._int8 = {
            name.removesuffix(f".{SCALES}")
            for name in self._arrays
            if name.endswith(f".{SCALES}")
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {name: tuple(array.shape) for name, array in self._arrays.items()}
        for name in self._int8:
            shapes[name] = shapes.pop(f"{name}.{VALUES}")
            del shapes[f"{name}.{SCALES}"]
        return shapes

    def dtypes(self) -> dict[str, str]:
        """The dtypes in which `read` gives them: float64 of what is stored in int8."""
        found = {n: array.dtype.numpy_dtype.name for n, array in self._arrays.items()}
        return {n: "float64" if n in self._int8 else found[n] for n in self.shapes()}

    def read(self, name: str, region: tuple[slice, ...]) -> np.ndarray:
        if name not in self._int8:
            return self._read(name, region)
        return self._read_int8(f"{name}.{VALUES}", f"{name}.{SCALES}", region)

    def _read_int8(self, values: str, scales: str, region) -> np.ndarray:
        """Part of a matrix in float64, which holds values times scales exactly."""
        *out, groups = self._arrays[scales].shape
        rank = len(out)
        inner = self._arrays[values].shape[rank:]
        scales_OG = self._read(scales, (*region[:rank], slice(0, groups)))
        count = math.prod(inner)
        numbers = np.arange(count).reshape(inner)[region[rank:]]
        scale = scales_OG.astype(np.float64)[..., numbers // (count // groups)]
        return self._read(values, region) * scale

    def _read(self, name: str, region: tuple[slice, ...]) -> np.ndarray:
        import tensorstore as ts

        from treespec_jax.models import memory

        with self._reading(f"parameter {name}"):
            # Into memory of ours: theirs would come from the heap, and leave holes.
            part = self._arrays[name][region][ts.d[:].translate_to[0]]
            array = memory.empty(part.shape, part.dtype.numpy_dtype)
            ts.array(array).write(part).result()
            return array

    def files(self) -> list[Path]:
        return [self.path / METADATA]

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tensorstore raises many kinds
            raise _damaged(self.path / PARAMS, f"{what}: {cause(error)}") from None


def check_files(folder: Path, written: Mapping[str, Any]) -> None:
    """Compares the files with what was written.

    tensorstore answers a damaged one with pages of text, and loads bytes that changed
    silently.

    Raises:
      UserError: names the first file that is missing, of another size, or changed.
    """
    for name, (size, crc) in written.items():
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                raise _damaged(path, f"{found} bytes instead of {size}")
            if checksum(path) != crc:
                raise _damaged(path, "its checksum is not that of the file written")
        except OSError as error:
            raise _damaged(path, str(error.strerror)) from None


def _open(group: Path) -> dict[str, Any]:
    """The arrays of an orbax checkpoint, by parameter, unread."""
    import tensorstore as ts

    context = ts.Context({"file_io_mode": {"mode": "memmap"}})
    store = {"driver": "ocdbt", "base": f"file://{group}/"}
    kv = ts.KvStore.open(store, context=context).result()
    keys = [key.decode() for key in kv.list().result()]
    opened = {
        name: ts.open(
            {"driver": "zarr", "kvstore": {**store, "path": name}},
            open=True,
            read=True,
            context=context,
        )
        for name, _, file in (key.rpartition("/") for key in keys)
        if file == ".zarray"
    }
    return {name: array.result() for name, array in opened.items()}


def _damaged(where: Path, reason: str) -> UserError:
    return UserError(
        f"{where} cannot be read ({reason}); it is damaged or incomplete, convert or "
        "copy it again"
    )


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total = zlib.crc32(block, total)
    return total
