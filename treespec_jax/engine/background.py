"""Compiling programs while others run.

XLA releases Python's lock while it compiles, so that decoding goes on. Nothing can
stop it: a process that ends in good order waits for the program under way
(`wait_for_all`, at exit), unless it calls `os._exit` as the commands do.
"""

from __future__ import annotations

import atexit
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable

_ALL: weakref.WeakSet[Background] = weakref.WeakSet()


class Background:
    """Compiles one program at a time in a thread of its own.

    Attributes:
      busy: whether a program is being compiled.
      done: keys of programs that were compiled.
      failed: keys of those that could not be.
    """

    def __init__(self):
        self.done: set[Hashable] = set()
        self.failed: set[Hashable] = set()
        # Not `Thread.is_alive`: interrupted there, Python 3.11 takes it for ended.
        self.busy = False
        self._thread: threading.Thread | None = None
        _ALL.add(self)

    def start(self, key: Hashable, job: Callable[[], object]) -> None:
        """Runs `job` in a thread. Nothing happens while another one runs."""
        if self.busy:
            return
        # A daemon: an interrupt may end the process before XLA is done.
        self._thread = threading.Thread(
            target=self._run, args=(key, job), name="compiling", daemon=True
        )
        self.busy = True
        try:
            self._thread.start()
        except BaseException:
            self.busy = False
            raise

    def wait(self) -> None:
        """Waits for the program that is being compiled, if there is one."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, key: Hashable, job: Callable[[], object]) -> None:
        try:
            job()
        except Exception as error:
            # Decoding goes on without it.
            self.failed.add(key)
            message = str(error).strip() or type(error).__name__
            warnings.warn(
                f"a program could not be compiled beside decoding and is not used: "
                f"{message.splitlines()[0]}",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            self.done.add(key)
        finally:
            self.busy = False


def compiling() -> bool:
    """Whether some program is being compiled beside others."""
    return any(one.busy for one in list(_ALL))


def firsts() -> list[Background]:
    """Those that compile their first program."""
    return [one for one in list(_ALL) if one.busy and not one.done]


def wait_for_all() -> None:
    """Waits for programs that are being compiled."""
    for one in list(_ALL):
        one.wait()


atexit.register(wait_for_all)
