"""How much of a call was spent on making its program.

jax reports how long it traced, lowered, and compiled or read from its disk cache, from
the thread that did it (`jax.monitoring`). What other threads compile meanwhile is not
part of a call, nor is what the call runs once its program is there.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import jax.monitoring

from treespec_jax.engine.clock import SteadyClock

# Events of tracing, lowering and compiling; the last holds the disk cache, too.
_PREFIX = "/jax/core/compile/"


class _Heard(threading.local):
    """Of each thread: the spans of what it compiled, None while nobody measures."""

    spans: list[tuple[float, float]] | None = None


_HEARD = _Heard()


def _listen(event: str, seconds: float, **_) -> None:
    """Called where and when a stage ends."""
    spans = _HEARD.spans
    if spans is None or not event.startswith(_PREFIX):
        return
    end = time.perf_counter()
    start = end - seconds
    # A stage within this one, such as a function that is compiled while another is
    # traced, has ended before and counts once.
    while spans and spans[-1][0] >= start:
        spans.pop()
    spans.append((max(start, spans[-1][1]) if spans else start, end))


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def measured(clock: SteadyClock) -> Iterator[None]:
    """Stops a clock for as long as this thread compiles inside."""
    outer, _HEARD.spans = _HEARD.spans, []
    try:
        yield
    finally:
        clock.compile_seconds += sum(end - start for start, end in _HEARD.spans)
        _HEARD.spans = outer
