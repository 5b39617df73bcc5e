"""Ctrl-C while a command starts: it ends the process at once; light to import."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

# What shells report of a program that an interrupt ended.
EXIT_CODE = 130


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """Lets an interrupt end the process, rather than be raised, within the block.

    For imports and other work that leaves nothing to tidy up: an exception that is
    raised within an import may be swallowed there, or spoil what is imported.
    A process that ignores interrupts, or handles them in another way, goes on so.
    """
    try:
        ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if ours:
            signal.signal(signal.SIGINT, _end)
    except ValueError:  # not the main thread, which alone may set handlers
        ours = False
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_) -> None:
    os.write(2, b"interrupted\n")
    os._exit(EXIT_CODE)
