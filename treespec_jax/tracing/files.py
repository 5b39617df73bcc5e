"""One file of traces, by its ending."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from treespec_jax.errors import UserError
from treespec_jax.tracing import figure, page, trace
from treespec_jax.tracing.trace import Trace

# What writes a file of that ending.
WRITERS: dict[str, Callable[[Sequence[Trace], Path], None]] = {
    ".html": page.write,
    ".json": trace.write,
    ".png": figure.write,
    ".svg": figure.write,
}


def check(path: str | Path) -> Path:
    """The path, if a trace can be written there.

    Raises:
      UserError: an ending of no writer, no such folder, or no matplotlib for a picture.
    """
    found = Path(path).expanduser()
    if found.suffix not in WRITERS:
        raise UserError(
            f"trace {str(path)!r} must end in {', '.join(WRITERS)}; name it run.html "
            "for example"
        )
    if found.is_dir() or not found.absolute().parent.is_dir():
        raise UserError(f"trace {path}: there is no such folder; make it first")
    if WRITERS[found.suffix] is figure.write and not importlib.util.find_spec(
        "matplotlib"
    ):
        raise UserError(
            f"trace {path} needs matplotlib; pip install 'treespec-jax[train]', or "
            "name an .html file"
        )
    return found


def save(traces: Sequence[Trace], path: str | Path) -> Path:
    """Writes traces to one file.

    Raises:
      UserError: see `check`.
    """
    found = check(path)
    WRITERS[found.suffix](traces, found)
    return found
