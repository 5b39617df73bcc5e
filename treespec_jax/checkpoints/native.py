"""The package's own folders: `metadata.json`, `params/` (orbax) and the tokenizer.

`params/` holds the parameters in groups of some 64 MB, each an orbax checkpoint of its
own, so that a conversion holds one group and goes on after the last one. They are
read through tensorstore, which orbax stores in: any part of a parameter, whereas
orbax's own restore holds up to three copies of what it restores.

`metadata.json` holds the configuration, and size and checksum of every file of
`params/`. A folder is written beside its destination and renamed at the end, so that
one that is there is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from treespec_jax.checkpoints.files import first_line, read_json
from treespec_jax.checkpoints.loaded import LoadedModel
from treespec_jax.checkpoints.metadata import FORMAT, METADATA, VERSION
from treespec_jax.checkpoints.placement import Item, check_dtype, dotted
from treespec_jax.checkpoints.tokenizers import Tokenizer
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError
from treespec_jax.models import memory

PARAMS = "params"
_GROUP = 64 << 20
# What is read at once to get at a part of a parameter.
_CHUNK = 1 << 20


class NativeSource:
    """Parameters in a folder that `save` or `convert` wrote; see `TensorSource`.

    Raises:
      UserError: a file is missing, of another size, or changed; names the first one.
    """

    def __init__(self, path: Path):
        self.path = path
        values = read_json(path / METADATA)
        self.dtype = values.get("dtype")
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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(array.shape) for name, array in self._arrays.items()}

    def dtypes(self) -> dict[str, str]:
        return {
            name: array.dtype.numpy_dtype.name for name, array in self._arrays.items()
        }

    def read(self, name: str, region: tuple[slice, ...]) -> np.ndarray:
        import tensorstore as ts

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
            raise _damaged(self.path / PARAMS, f"{what}: {_short(error)}") from None


def save(loaded: LoadedModel, path: str | Path, dtype: Any = None) -> None:
    """Writes a model that `load` reads back, tokenizer included.

    Parameters may be sharded. An earlier folder of this kind at `path` is replaced,
    once the new one is whole.

    Args:
      loaded: what to write.
      path: the folder to make; its parents are made too.
      dtype: float32, bfloat16 or float16; None: that of the model.

    Raises:
      UserError: `path` holds something else, cannot be written, or a parameter holds
        NaN or infinity.
    """
    path = Path(path).expanduser().absolute()
    wanted = check_dtype(dtype or loaded.dtype)
    check_output(path)
    leaves = {
        dotted(path): leaf
        for path, leaf in nnx.to_flat_state(nnx.state(loaded.model, nnx.Param))
    }
    items = [Item(name, leaf.size * wanted.itemsize) for name, leaf in leaves.items()]
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    files: dict[str, Any] = {}
    try:
        with writing(path):
            for group in grouped(items):
                arrays = {}
                for item in group.items:
                    value = leaves[item.path][...].astype(wanted)
                    if not _is_finite(value):
                        raise UserError(
                            f"{loaded.source}: tensor {item.path} holds NaN or "
                            "infinity; training went wrong, or "
                            f"{wanted.name} cannot hold it"
                        )
                    arrays[item.path] = value
                files |= write_group(partial, group.name, arrays)
            finish(
                partial,
                path,
                loaded.config,
                loaded.tokenizer,
                loaded.source,
                wanted,
                files,
            )
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that are written together.

    Attributes:
      name: of their folder below `params/`.
      items: the parameters.
      nbytes: of all of them.
    """

    name: str
    items: tuple[Item, ...]

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)


def grouped(items: Sequence[Item]) -> list[Group]:
    """Cuts the parameters, in order, into groups of about `_GROUP` bytes."""
    groups: list[list[Item]] = []
    room = 0
    for item in items:
        if item.nbytes > room:
            groups.append([])
            room = _GROUP
        groups[-1].append(item)
        room -= item.nbytes
    return [Group(f"{i:04d}", tuple(group)) for i, group in enumerate(groups)]


def write_group(
    folder: Path, name: str, arrays: Mapping[str, np.ndarray | jax.Array]
) -> dict[str, list[int]]:
    """Writes parameters below `folder`; size and CRC-32 of their files, by name."""
    import orbax.checkpoint as ocp

    params = folder / PARAMS
    params.mkdir(parents=True, exist_ok=True)
    tree = _nested(arrays)
    # Weights hardly compress: without, files are a seventh larger, and are written and
    # read four times as fast.
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=False, use_compression=False
    )
    how = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree)
    with _quiet(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(params / name, args=ocp.args.PyTreeSave(tree, save_args=how))
    # Holds nothing but the path at which it was written; object stores need it, a
    # folder is whole because it was renamed.
    (params / name / "commit_success.txt").unlink(missing_ok=True)
    return {
        path.relative_to(params).as_posix(): [path.stat().st_size, _crc(path)]
        for path in sorted((params / name).rglob("*"))
        if path.is_file()
    }


def finish(
    partial: Path,
    path: Path,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    source: str,
    dtype: np.dtype,
    files: Mapping[str, Any],
) -> None:
    """Makes the folder `partial`, whose parameters are written, whole and `path`."""
    if tokenizer is not None:
        tokenizer.save(partial)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "source": source,
        "dtype": dtype.name,
        "model": dataclasses.asdict(config),
        "tokenizer": tokenizer
        and {
            "file": tokenizer.file_name,
            "bos_id": tokenizer.bos_id,
            "eos_ids": tokenizer.eos_ids,
        },
        "files": files,
    }
    text = json.dumps(about, indent=2)
    (partial / METADATA).write_text(text + "\n", encoding="utf-8")
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def check_output(path: str | Path) -> None:
    """Checks that `save` may write to `path`, to fail before a long run, not after.

    Raises:
      UserError: `path` holds something that `save` did not write, or is in a folder
        that cannot be written.
    """
    path = Path(path).expanduser().absolute()
    beside = next(parent for parent in path.parents if parent.exists())
    if not beside.is_dir() or not os.access(beside, os.W_OK | os.X_OK):
        raise UserError(
            f"output {path}: {beside} is no folder that can be written; choose another"
        )
    if path.is_dir():
        if not any(path.iterdir()):
            return
        with contextlib.suppress(UserError):
            if read_json(path / METADATA).get("format") == FORMAT:
                return
        raise UserError(
            f"output {path} is not empty and not a converted checkpoint; choose "
            "another folder"
        )
    if path.exists():
        raise UserError(f"output {path} is a file; choose a folder")


@contextlib.contextmanager
def writing(path: Path, hint: str = "") -> Iterator[None]:
    """Turns what goes wrong with files into a UserError that ends with `hint`."""
    try:
        yield
    except UserError:
        raise
    # orbax reports a full disk as ValueError or RuntimeError.
    except (OSError, ValueError, RuntimeError) as error:
        # tensorstore puts the system's answer behind a page of its own.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        told = os.strerror(int(code[1])) if code else getattr(error, "strerror", None)
        reason = told or _short(error)
        raise UserError(f"cannot write {path}: {reason}{hint}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracebacks of orbax's threads: what goes wrong is raised, too."""
    from absl import logging

    hook, threading.excepthook = threading.excepthook, lambda _: None
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        threading.excepthook = hook
        logging.set_verbosity(verbosity)


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
            if _crc(path) != crc:
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


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
    # Where the shards are: the host need not hold them.
    return jnp.isfinite(array).all()


def _damaged(where: Path, reason: str) -> UserError:
    return UserError(
        f"{where} cannot be read ({reason}); it is damaged or incomplete, convert or "
        "copy it again"
    )


def _crc(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total = zlib.crc32(block, total)
    return total


def _short(error: BaseException) -> str:
    """The first line of what caused an exception, cut to a sensible length."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = first_line(error)
    return line if len(line) <= 160 else line[:157] + "..."


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree
