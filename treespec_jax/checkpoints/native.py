"""The package's own folders: `metadata.json`, `params/` (orbax) and the tokenizer.

`metadata.json` holds the configuration, and size and checksum of every file of
`params/`. A folder is written beside its destination and renamed at the end, so that
one that is there is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from treespec_jax.checkpoints.files import first_line, read_json
from treespec_jax.checkpoints.metadata import FORMAT, METADATA, VERSION
from treespec_jax.checkpoints.placement import (
    Progress,
    abstract_parameters,
    check_dtype,
    check_finite,
    check_shape,
    concrete,
    dotted,
)
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError
from treespec_jax.models.transformer import Transformer

if TYPE_CHECKING:
    from treespec_jax.checkpoints.loading import LoadedModel

PARAMS = "params"
_BATCH = 32 << 20


def save(loaded: LoadedModel, path: str | Path, dtype: Any = None) -> None:
    """Writes a model that `load` reads back, tokenizer included.

    An earlier folder of this kind at `path` is replaced, once the new one is whole.

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
    arrays = _arrays(loaded.model, wanted, loaded.source)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with _writing(path):
            partial.mkdir(parents=True)
            _write_params(arrays, partial / PARAMS)
            if loaded.tokenizer is not None:
                loaded.tokenizer.save(partial)
            about = _metadata(loaded, wanted)
            about["files"] = _checksums(partial / PARAMS)
            text = json.dumps(about, indent=2)
            (partial / METADATA).write_text(text + "\n", encoding="utf-8")
            _move_into_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read(
    path: Path, config: ModelConfig, dtype: np.dtype, progress: Progress = iter
) -> Transformer:
    """The model in a folder that `save` wrote; `config` is that of its metadata.

    Raises:
      UserError: damaged, or names and shapes of the parameters are not those that the
        configuration asks for.
    """
    _check_files(path / PARAMS, read_json(path / METADATA).get("files", {}))
    # orbax takes absolute paths only.
    return _read_params(path.absolute() / PARAMS, config, dtype, progress)


def _metadata(loaded: LoadedModel, dtype: np.dtype) -> dict[str, Any]:
    tokenizer = loaded.tokenizer
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": loaded.source,
        "dtype": dtype.name,
        "model": dataclasses.asdict(loaded.config),
        "tokenizer": tokenizer
        and {
            "file": tokenizer.file_name,
            "bos_id": tokenizer.bos_id,
            "eos_ids": tokenizer.eos_ids,
        },
    }


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
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    # orbax reports a full disk as ValueError or RuntimeError.
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot write {path}: {reason}") from None


def _move_into_place(partial: Path, path: Path) -> None:
    old = None
    if path.exists():
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        path.rename(old)
    partial.rename(path)
    if old is not None:
        shutil.rmtree(old)


def _arrays(model: Transformer, dtype: np.dtype, source: str) -> dict[str, jax.Array]:
    arrays = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = leaf[...].astype(dtype)
        check_finite(np.asarray(value), dotted(path), source)
        arrays[dotted(path)] = value
    return arrays


def _write_params(arrays: Mapping[str, jax.Array], folder: Path) -> None:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(_nested(arrays)))
    # Holds nothing but the path at which it was written; object stores need it, a
    # folder is whole because it was renamed.
    (folder / "commit_success.txt").unlink(missing_ok=True)


def _read_params(
    folder: Path, config: ModelConfig, dtype: np.dtype, progress: Progress
) -> Transformer:
    """Restores into the abstract model, cast to `dtype` on the way."""
    import orbax.checkpoint as ocp

    graph, state, flat = abstract_parameters(config, dtype)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place)
        for path, leaf in flat.items()
    }
    arrays: dict[str, jax.Array] = {}
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            stored = checkpointer.metadata(folder).item_metadata
            if stored is None:
                raise ValueError("its list of tensors is missing")
            _check_stored(folder, _flat(stored.tree), wanted)
            for batch in progress(_batches(wanted)):
                arrays.update(_restore(checkpointer, folder, batch))
    except UserError:
        raise
    except Exception as error:  # orbax raises down to a bare Exception
        raise _damaged(folder, _root_cause(error)) from None
    return concrete(graph, state, arrays)


def _restore(
    checkpointer: Any, folder: Path, batch: Mapping[str, Any]
) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    tree = _nested(batch)
    how = ocp.checkpoint_utils.construct_restore_args(tree)
    args = ocp.args.PyTreeRestore(tree, restore_args=how, partial_restore=True)
    arrays = _flat(checkpointer.restore(folder, args=args))
    for path, array in arrays.items():
        check_finite(np.asarray(array), path, folder)
    return arrays


def _damaged(where: Path, reason: str) -> UserError:
    return UserError(
        f"{where} cannot be read ({reason}); it is damaged or incomplete, convert or "
        "copy it again"
    )


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file below `folder`, by relative name."""
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _crc(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _crc(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total = zlib.crc32(block, total)
    return total


def _check_files(folder: Path, written: Mapping[str, Any]) -> None:
    """Compares the files with what was written.

    Orbax reads many at once and answers a damaged one with pages of text, some of it
    from threads that nobody waits for; it also loads bytes that changed silently.

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


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    line = first_line(error)
    return line if len(line) <= 160 else line[:157] + "..."


def _batches(wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parameters to restore together, largest first.

    What a restore holds besides its result grows with what it restores at once; a call
    costs tens of milliseconds whatever its size. Hence batches of `_BATCH` bytes.
    """
    batches: list[dict[str, Any]] = []
    room = 0
    for path, leaf in sorted(wanted.items(), key=lambda item: -item[1].size):
        size = leaf.size * leaf.dtype.itemsize
        if size > room:
            batches.append({})
            room = _BATCH
        batches[-1][path] = leaf
        room -= size
    return batches


def _check_stored(
    folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    missing = sorted(set(wanted) - set(stored))
    unread = sorted(set(stored) - set(wanted))
    if missing:
        raise UserError(
            f"{folder}: tensor {missing[0]} is missing; convert the original again"
        )
    if unread:
        raise UserError(
            f"{folder}: tensor {unread[0]} would stay unread; {METADATA} does not "
            "belong to it, convert the original again"
        )
    for path, leaf in wanted.items():
        check_shape(folder, path, stored[path].shape, leaf.shape)


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


def _flat(tree: Mapping[str, Any], front: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a.b": x}."""
    flat = {}
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            flat.update(_flat(leaf, f"{front}{name}."))
        else:
            flat[f"{front}{name}"] = leaf
    return flat
