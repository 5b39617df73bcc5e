"""Small files of a checkpoint, and what to say of damaged ones; free of jax."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from treespec_jax.errors import UserError

_POINTER = b"version https://git-lfs."


def cache_folder() -> Path:
    """The user's folder of what can be made or fetched again.

    `treespec-jax` under $XDG_CACHE_HOME or ~/.cache; it need not exist.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "treespec-jax"


def read_bytes(path: Path) -> bytes:
    """All of a file. Raises UserError if it is missing, unreadable or a pointer."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    check_pointer(path, data)
    return data


def check_pointer(path: Path, start: bytes) -> None:
    """Raises UserError if a file that begins so only says what Git LFS holds for it."""
    if start.startswith(_POINTER):
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself; run git lfs pull"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if it is missing or damaged."""
    return parse_json(read_bytes(path), path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object that the file at `path` holds as `data`.

    Raises:
      UserError: the data is not a JSON object; names the file.
    """
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}; repair it") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not {values!r:.40}")
    return values


def check_writable(path: Path, remedy: str) -> None:
    """Raises UserError, which ends with `remedy`, if no file can be written there."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}; {remedy}")


def write_whole(path: Path, data: bytes, remedy: str) -> None:
    """Writes all of a file or nothing; the one that is there stays until then.

    Raises:
      UserError: it cannot be written; ends with `remedy`.
    """
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror}; {remedy}"
        raise UserError(message) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def cause(error: BaseException) -> str:
    """The first line of what caused an exception, cut to a sensible length."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = first_line(error)
    return line if len(line) <= 160 else line[:157] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or the name of its class."""
    return (str(error).splitlines() or [type(error).__name__])[0]
