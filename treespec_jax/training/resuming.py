"""What runs share that can be stopped at any moment and go on by the same command."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax import traverse_util

from treespec_jax.errors import UserError


@contextlib.contextmanager
def interruption() -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGINT sets, to stop after the running step."""
    wanted = threading.Event()
    handlers = {}
    # Outside the main thread handlers cannot be set, and nobody sends signals.
    with contextlib.suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGINT):
            handlers[number] = signal.signal(number, lambda *_: wanted.set())
    try:
        yield wanted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def check_same(
    before: Mapping[str, Any], now: Mapping[str, Any], folder: str | Path
) -> None:
    """Raises UserError naming the first setting in which a resumed run differs.

    Args:
      before: settings of the run that the folder holds, as nested plain values.
      now: those of the command.
      folder: for the message.
    """
    old, new = (traverse_util.flatten_dict(each, sep=".") for each in (before, now))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise UserError(
                f"{folder} holds a run with {name}={old.get(name)!r}, not "
                f"{new.get(name)!r}; choose another --output or the old settings"
            )
