"""Writes the package's own folders; `formats.native` says what they hold.

A folder is written beside its destination and renamed at the end, so that one that is
there is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from treespec_jax.checkpoints.files import cause, read_json
from treespec_jax.checkpoints.formats import Description
from treespec_jax.checkpoints.formats.native import (
    FORMAT,
    METADATA,
    PARAMS,
    SCALES,
    VALUES,
    VERSION,
    checksum,
)
from treespec_jax.checkpoints.loading import LoadedModel
from treespec_jax.checkpoints.placement import Item, nbytes, parameters_of
from treespec_jax.errors import UserError
from treespec_jax.models.quantized import Quantized, signed
from treespec_jax.models.weight_types import Types, types_of

_GROUP = 64 << 20
# What is read at once to get at a part of a parameter.
_CHUNK = 1 << 20


def save(loaded: LoadedModel, path: str | Path, dtype: Any = None) -> None:
    """Writes a model that `load` reads back, tokenizer included.

    Parameters may be sharded. An earlier folder of this kind at `path` is replaced,
    once the new one is whole.

    Args:
      loaded: what to write.
      path: the folder to make; its parents are made too.
      dtype: float32, bfloat16 or float16, of all that is not int8; None: as it is.

    Raises:
      UserError: `path` holds something else, cannot be written, or a parameter holds
        NaN or infinity.
    """
    path = Path(path).expanduser().absolute()
    types = loaded.model.types
    if dtype is not None:
        types = types_of(dtype, types.weights if types.is_int8 else None)
    check_output(path)
    leaves = parameters_of(loaded.model)
    items = [Item(name, nbytes(leaf)) for name, leaf in leaves.items()]
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    files: dict[str, Any] = {}
    try:
        with writing(path):
            for group in grouped(items):
                arrays = {
                    item.path: cast(leaves[item.path], item.path, dtype, loaded.source)
                    for item in group.items
                }
                files |= write_group(partial, group.name, arrays)
            origin = {"source": loaded.source}
            finish(partial, path, loaded, origin, types, files)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cast(
    leaf: nnx.Variable, name: str, dtype: Any, source: str
) -> jax.Array | Quantized:
    """A parameter in the dtype in which it is written.

    Args:
      leaf: one in int8 stays as it is.
      name: of the parameter.
      dtype: None: its own.
      source: the model's.

    Raises:
      UserError: it holds NaN or infinity; names it and the model's source.
    """
    value = leaf[...]
    if isinstance(value, Quantized):
        return value
    value = value.astype(dtype or value.dtype)
    if not _is_finite(value):
        raise UserError(
            f"{source}: tensor {name} holds NaN or infinity; training went wrong, or "
            f"{value.dtype.name} cannot hold it"
        )
    return value


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
    folder: Path, name: str, arrays: Mapping[str, np.ndarray | jax.Array | Quantized]
) -> dict[str, list[int]]:
    """Writes parameters below `folder`; size and CRC-32 of their files, by name.

    One in int8 becomes two arrays, see `formats.native`.
    """
    import orbax.checkpoint as ocp

    params = folder / PARAMS
    params.mkdir(parents=True, exist_ok=True)
    plain = {
        path: _stored(array) if isinstance(array, Quantized) else array
        for path, array in arrays.items()
    }
    tree = traverse_util.unflatten_dict(plain, sep=".")
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
        path.relative_to(params).as_posix(): [path.stat().st_size, checksum(path)]
        for path in sorted((params / name).rglob("*"))
        if path.is_file()
    }


def _stored(matrix: Quantized) -> dict[str, np.ndarray]:
    values = np.asarray(signed(matrix.values))
    values = np.moveaxis(values, 0, -2).reshape(matrix.shape)
    return {VALUES: values, SCALES: np.moveaxis(np.asarray(matrix.scales), 0, -1)}


def finish(
    partial: Path,
    path: Path,
    model: LoadedModel | Description,
    origin: Mapping[str, Any],
    types: Types,
    files: Mapping[str, Any],
) -> None:
    """Completes a folder of parameters and renames it to its final name.

    Args:
      partial: the folder, whose parameters are written.
      path: the final name; an earlier folder there is replaced.
      model: its configuration and tokenizer are added.
      origin: "source", the name of the file or folder that the model came from, and
        what else tells that from others.
      types: of the parameters.
      files: sizes and checksums of the parameters' files, by name.
    """
    tokenizer = model.tokenizer
    if tokenizer is not None:
        tokenizer.save(partial)
    about = {
        "format": FORMAT,
        "version": VERSION,
        **origin,
        **types.on_file,
        "model": dataclasses.asdict(model.config),
        "tokenizer": tokenizer
        and {
            "file": tokenizer.file_name,
            "bos_id": tokenizer.bos_id,
            "eos_ids": tokenizer.eos_ids,
        },
        "files": files,
    }
    put_in_place(partial, path, about)


def put_in_place(partial: Path, path: Path, about: Mapping[str, Any]) -> None:
    """Writes the metadata of a folder, and renames the folder to its final name."""
    text = json.dumps(about, indent=2)
    (partial / METADATA).write_text(text + "\n", encoding="utf-8")
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def check_output(path: str | Path, written: str = FORMAT) -> None:
    """Checks that `save` may write to `path`, to fail before a long run, not after.

    Args:
      path: of the folder.
      written: format of folders that may be replaced.

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
            if read_json(path / METADATA).get("format") == written:
                return
        raise UserError(
            f"output {path} is not empty and not a converted checkpoint; choose "
            "another folder"
        )
    if path.exists():
        raise UserError(f"output {path} is a file; choose a folder")


def check_replaced(path: str | Path, about: Mapping[str, Any], overwrite: bool) -> None:
    """Checks that a folder to be replaced holds the same model, if there is one.

    Args:
      path: of a folder that `check_output` allows.
      about: what the metadata of the same model would hold, by key; empty: no model
        is the same.
      overwrite: allows any model to be replaced.

    Raises:
      UserError: another model is there; names its source.
    """
    file = Path(path).expanduser() / METADATA
    if overwrite or not file.is_file():
        return
    there = read_json(file)
    # As JSON holds it: tuples are lists there.
    wanted = json.loads(json.dumps(about))
    if not wanted or any(there.get(key) != value for key, value in wanted.items()):
        what = there.get("source") or there.get("method") or "unknown"
        raise UserError(
            f"output {path} already holds a model (of {what}, {there.get('dtype')}); "
            "--overwrite replaces it, or choose another folder"
        )


def check_apart(output: str | Path, **inputs: str | Path | None) -> None:
    """Checks that none of the inputs is, or lies in, the folder to be replaced.

    Raises:
      UserError: names the input.
    """
    folder = Path(output).expanduser().resolve()
    for name, path in inputs.items():
        found = Path(path).expanduser().resolve() if path else None
        if found and found.exists() and (found == folder or folder in found.parents):
            raise UserError(
                f"--{name}={path} would be replaced by --output={output}; choose "
                "another folder"
            )


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
        reason = told or cause(error)
        raise UserError(f"cannot write {path}: {reason}{hint}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracebacks of orbax's threads: what goes wrong is raised, too."""
    from absl import logging as absl_logging

    _drop_complaints()
    hook, threading.excepthook = threading.excepthook, lambda _: None
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        yield
    finally:
        threading.excepthook = hook
        absl_logging.set_verbosity(verbosity)


@functools.cache
def _drop_complaints() -> None:
    """Drops, from now on, what the writes that a failed one leaves behind complain of.

    tensorstore's threads end them later, and find the event loop of orbax closed;
    asyncio misses a reader of each one's error, of which the first was raised.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        ours = threading.current_thread() is threading.main_thread()
        if ours or str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    def is_news(record: logging.LogRecord) -> bool:
        told = record.getMessage()
        return "orbax" not in told or "exception was never retrieved" not in told

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(is_news)


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
    # Where the shards are: the host need not hold them.
    return jnp.isfinite(array).all()
