"""A folder of results that is there whole or not at all."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from treespec_jax.errors import UserError


@contextlib.contextmanager
def folder(path: str) -> Iterator[Path]:
    """Gives a temporary folder beside `path` and moves its files there at the end.

    If the block raises, nothing of it stays.

    Raises:
      UserError: `path` is empty or cannot be written; found before the block runs.
    """
    if not path:
        raise UserError("no output folder: give --output=FOLDER")
    final = Path(path).expanduser().absolute()
    beside = final.parent
    while not beside.exists():
        beside = beside.parent
    try:
        if final.exists() and (not final.is_dir() or not os.access(final, os.W_OK)):
            raise NotADirectoryError(None, "not a folder that can be written")
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=beside))
    except OSError as error:
        raise UserError(f"output {path}: {error.strerror}; choose another") from None
    try:
        yield work
        final.mkdir(parents=True, exist_ok=True)
        for file in sorted(work.iterdir()):
            os.replace(file, final / file.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def can_plot() -> bool:
    """Whether there will be a plot; says so if not."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        say("no plot: matplotlib is missing; pip install 'treespec-jax[train]'")
    return found


def say(line: str) -> None:
    """Tells a person how far it is, on stderr."""
    print(line, file=sys.stderr, flush=True)
