"""Wall time without that of compiling; free of jax.

A program is compiled in the call that first needs it, in the middle of serving. Counted
as decoding, those seconds would make the speed of a first text that of the compiler.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from treespec_jax.engine.stats import Stats


class SteadyClock:
    """Stands still while the engine waits for a program to be compiled.

    One thread at a time may use it, as with the engine that it belongs to.

    Attributes:
      compile_seconds: wall time that it stood still for so far.
    """

    def __init__(self):
        self.compile_seconds = 0.0

    def now(self) -> float:
        """Seconds since some moment; their differences are those of steady running."""
        return time.perf_counter() - self.compile_seconds

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """All that runs inside counts as compiling."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.compile_seconds += time.perf_counter() - began


class Stopwatch:
    """Laps by a steady clock; the first begins at once.

    Args:
      clock: of the engine.
    """

    def __init__(self, clock: SteadyClock):
        self._clock = clock
        self._now, self._compiled = clock.now(), clock.compile_seconds

    def lap(self, stats: Stats) -> float:
        """Seconds since the last lap; those of compiling go to `stats` instead."""
        then, compiled = self._now, self._compiled
        self._now, self._compiled = self._clock.now(), self._clock.compile_seconds
        stats.compile_seconds += self._compiled - compiled
        return self._now - then
