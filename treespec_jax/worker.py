"""The one thread that runs an engine, for the calls of all other threads.

An `Engine` serves one thread at a time. Here that is a thread of its own; the callers
do not run the engine in turn, for three reasons. Python raises KeyboardInterrupt in the
main thread only, so that this thread is never stopped between giving a state away and
holding the next one, whatever the user interrupts. A caller that goes away (Control-C,
a cancelled task, a dropped stream) takes nothing along that the others need. And a task
of asyncio needs no thread to wait in.

The thread goes from dispatch to dispatch while any call is under way. It wakes a caller
when the call ends or the stream goes on: a call costs two handoffs, not two a dispatch.

Callers use flags, `queue.SimpleQueue` and plain locks, which are written in C: an
interrupt between two instructions leaves nothing locked (it can leave a `Condition`
locked), and the garbage collector may drop a stream at any point.

What a thread sets for itself in jax (`with jax.default_device(...)`) does not reach the
engine; `jax.config.update` does.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import queue
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import Request
from treespec_jax.errors import UserError
from treespec_jax.pace import Pace

_CLOSED = "the LLM was closed; make a new one"
_FORKED = "the LLM belongs to another process; make one in the process that uses it"


class Reader(Protocol):
    """Follows one request, as `texts.Reader` does.

    Attributes:
      request: that is followed.
    """

    request: Request

    def read(self, engine: Engine) -> None:
        """Takes in what the request emitted since; may end it."""


class Bell:
    """Wakes a thread."""

    def __init__(self):
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ring(self) -> None:
        """Wakes who waits, or who will."""
        self._rings.put(None)

    def wait(self) -> None:
        """Returns once for every ring."""
        self._rings.get()


class AsyncBell:
    """Wakes a task of the event loop that runs.

    Raises:
      RuntimeError: none runs.
    """

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """Wakes who waits, or who will; from any thread."""
        # A closed loop has nobody who waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._rung.set)

    async def wait(self) -> None:
        """Returns at least once after any number of rings."""
        await self._rung.wait()
        self._rung.clear()


class Call:
    """What one caller asked for: some requests that begin together.

    Args:
      readers: of the requests.
      bell: rung when the call has ended.
      max_steps: steps per dispatch at most while the call is under way; None: the
        compiled number. The smallest of all calls under way counts.
      streaming: the bell is also rung whenever tokens came.
      pace: of the dispatches while the call is under way; None: as `max_steps` says.

    Attributes:
      lock: held by whoever uses the readers.
      ended: whether all is done, failed or cancelled; nothing changes any more.
      error: what ended it, if something failed.
      prefill_seconds: that the engine spent in prefill while the call was under way,
        for other calls too.
      decode_seconds: the same of decoding.
      compile_seconds: the same of compiling, which is part of neither.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        bell: Bell | AsyncBell,
        max_steps: int | None = None,
        streaming: bool = False,
        pace: Pace | None = None,
    ):
        self.readers = list(readers)
        self.max_steps = max_steps
        self.streaming = streaming
        self.pace = pace
        self.lock = threading.Lock()
        self.ended = self.cancelled = False
        self.error: BaseException | None = None
        self.prefill_seconds = self.decode_seconds = self.compile_seconds = 0.0
        # Those of the readers whose requests have not ended.
        self.open = list(self.readers)
        self._tokens = 0
        self._traceback: types.TracebackType | None = None
        self._bell = bell

    def cancel(self) -> None:
        """Asks for the call's end; waits for nothing, and may be done anywhere."""
        self.cancelled = True

    def wait(self) -> None:
        """Waits for the call's end; of a streaming one, for news."""
        while not self.ended:
            self._bell.wait()
            if self.streaming:
                break

    async def wait_async(self) -> None:
        """Does the same for a task."""
        while not self.ended:
            await self._bell.wait()
            if self.streaming:
                break

    def ends(self, tell: Callable[[], Any]) -> Iterator[int]:
        """Waits, and gives the numbers of readers as their requests are finished.

        One at a time if the call is streaming, else together. Nothing is given of what
        an error ended.

        Args:
          tell: called whenever there is news.
        """
        waiting = dict(enumerate(self.readers))
        ended = False
        while not ended:
            self.wait()
            tell()
            with self.lock:
                ended, failed = self.ended, self.error is not None
                under_way = {id(reader) for reader in self.open}
            if failed or self.cancelled:
                continue
            for number in [n for n, r in waiting.items() if id(r) not in under_way]:
                del waiting[number]
                yield number

    def check(self) -> None:
        """Raises what ended the call, if something failed."""
        if self.error is not None:
            # Several calls may have ended by it: each shows its own way to it.
            raise self.error.with_traceback(self._traceback)

    def begin(self, engine: Engine) -> None:
        """Submits the requests; in the engine's thread, as all that follows."""
        self._add_seconds(engine, -1)
        for reader in self.readers:
            engine.submit(reader.request)

    def read(self, engine: Engine) -> bool:
        """Reads what came; whether anything is still under way."""
        with self.lock:
            for reader in self.open:
                reader.read(engine)
            tokens = sum(len(reader.request.tokens) for reader in self.open)
            still = [r for r in self.open if r.request.finish_reason is None]
            news = tokens > self._tokens or len(still) < len(self.open)
            self.open = still
            self._tokens = sum(len(reader.request.tokens) for reader in still)
        # The end of a call rings once more.
        if self.streaming and still and news:
            self._bell.ring()
        return bool(self.open)

    def end(self, engine: Engine, error: BaseException | None = None) -> None:
        """Ends what is still under way, and tells the caller."""
        # First, so that nothing of what is ended now is taken for finished.
        self.error = error
        try:
            for reader in self.open:
                engine.cancel(reader.request)
            self.read(engine)
        except BaseException as another:
            error = error or another
        self._add_seconds(engine, 1)
        if error is not None:
            self.error, self._traceback = error, error.__traceback__
        self.ended = True
        self._bell.ring()

    def _add_seconds(self, engine: Engine, sign: int) -> None:
        self.prefill_seconds += sign * engine.prefill_seconds
        self.decode_seconds += sign * engine.decode_seconds
        self.compile_seconds += sign * engine.compile_seconds


class _Job:
    """A function to run between two dispatches."""

    def __init__(self, function: Callable[[Engine], Any]):
        self.function = function
        self.bell = Bell()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self, engine: Engine) -> None:
        try:
            self.result = self.function(engine)
        except BaseException as error:
            self.error = error
        self.bell.ring()

    def finish(self) -> Any:
        """The result, once the bell has rung."""
        if self.error is not None:
            raise self.error
        return self.result


class Worker:
    """Runs an engine in a thread of its own.

    The thread starts here. It ends with `close`, when the last reference to the worker
    goes, or when the interpreter exits, which waits for the dispatch under way: a
    thread that is stopped inside XLA brings the process down.

    Args:
      engine: nobody else may use it, but within `exclusive`.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._inbox: queue.SimpleQueue[Call | _Job | None] = queue.SimpleQueue()
        self._calls: list[Call] = []
        self._closed = False
        self._process = os.getpid()
        # Empty once the thread has nothing more to do.
        self._serving = [True]
        self._borrowed: Bell | None = None
        # Idle, the thread must not keep the engine, and with it the models, alive.
        self._thread = threading.Thread(
            target=_run,
            args=(self._inbox, weakref.ref(self), self._serving),
            name="treespec-engine",
            daemon=True,
        )
        weakref.finalize(self, self._inbox.put, None).atexit = False
        _workers.add(self)
        self._thread.start()

    @property
    def inside(self) -> bool:
        """Whether the current thread is the engine's, which may wait for nobody."""
        return threading.current_thread() is self._thread

    def submit(self, call: Call) -> None:
        """Begins a call.

        Raises:
          UserError: the worker is closed, or its thread stayed behind in a process that
            this one was forked from.
        """
        now = time.perf_counter()
        for reader in call.readers:
            reader.request.submitted = now
        self._put(call)

    def run(self, function: Callable[[Engine], Any]) -> Any:
        """Runs a function of the engine between two dispatches; returns its result.

        Calls that were cancelled before have ended then.

        Raises:
          UserError: the worker is closed.
          Exception: what the function raises.
        """
        if self.inside:
            return function(self.engine)
        job = _Job(function)
        self._put(job)
        job.bell.wait()
        return job.finish()

    def post(self, function: Callable[[Engine], Any]) -> None:
        """Has a function of the engine run soon, and waits for nothing.

        It may be called anywhere, by the garbage collector too. What the function
        raises is lost.
        """
        self._inbox.put(_Job(function))

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[Engine]:
        """Lends the engine to the current thread; the calls of others wait.

        Raises:
          ValueError: a request waits or runs.
          UserError: the worker is closed.
        """
        back = Bell()

        def lend(engine: Engine) -> None:
            if engine.busy:
                raise ValueError("requests are under way; end them first")
            # A dispatch may have been started ahead of a text that then ended.
            engine.drain()
            self._borrowed = back
            job.bell.ring()
            back.wait()
            self._borrowed = None

        job = _Job(lend)
        try:
            self._put(job)
            job.bell.wait()
            job.finish()
            yield self.engine
        finally:
            back.ring()

    def close(self) -> None:
        """Ends all calls, and the thread; waits for the dispatch under way."""
        self._closed = True
        self._inbox.put(None)
        if self._borrowed is not None:
            self._borrowed.ring()
        # Not by `join`: interrupted there, Python 3.11 takes the thread for ended.
        while self._serving and not self.inside and os.getpid() == self._process:
            time.sleep(0.001)

    def _put(self, item: Call | _Job) -> None:
        self._inbox.put(item)
        # Asked afterwards: what comes before the end of an open inbox is found there.
        # Not by `is_alive`: interrupted there, Python 3.11 takes the thread for ended.
        if self._closed or os.getpid() != self._process:
            if isinstance(item, Call):
                item.cancel()
            raise UserError(_CLOSED if self._closed else _FORKED)

    def serve(self, item: Call | _Job | None) -> bool:
        """Serves until nobody waits for anything; whether the thread goes on."""
        try:
            self._take(item)
            while self._calls and not self._closed:
                self._turn()
                while not self._inbox.empty():
                    self._take(self._inbox.get())
        except BaseException as error:
            # No memory for a list of calls, for example: the thread outlives it.
            self._end_all(error)
        if self._closed:
            self._end_all(UserError(_CLOSED))
            with contextlib.suppress(Exception):
                self.engine.drain()
        return not self._closed

    def _take(self, item: Call | _Job | None) -> None:
        self._sweep()
        if isinstance(item, _Job):
            item.run(self.engine)
        elif item is not None:
            self._calls.append(item)
            try:
                item.begin(self.engine)
            except BaseException as error:
                self._end(item, error)
            else:
                self._read(item)

    def _turn(self) -> None:
        """A dispatch, and its news."""
        self._sweep()
        if not self._calls:
            return
        asked = [call.max_steps for call in self._calls if call.max_steps is not None]
        paces = [call.pace for call in self._calls if call.pace is not None]
        asked += [pace.steps for pace in paces]
        began = time.perf_counter()
        try:
            self.engine.advance(min(asked, default=None))
        except BaseException as error:
            self._fail(error)
        seconds = time.perf_counter() - began
        for pace in paces:
            pace.took(seconds, self.engine.config.steps_per_dispatch)
        for call in list(self._calls):
            self._read(call)

    def _sweep(self) -> None:
        for call in [call for call in self._calls if call.cancelled]:
            self._end(call)

    def _read(self, call: Call) -> None:
        try:
            if not call.read(self.engine):
                self._end(call)
        except BaseException as error:
            self._end(call, error)

    def _fail(self, error: BaseException) -> None:
        """Ends the calls that a failure concerns."""
        found = [
            call
            for call in self._calls
            if any(reader.request.finish_reason == "error" for reader in call.open)
        ]
        # What nobody is to blame for would come again and again.
        for call in found or list(self._calls):
            self._end(call, error)

    def _end_all(self, error: BaseException) -> None:
        """Ends all calls, those that have not begun too."""
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, Call):
                self._calls.append(item)
            elif item is not None:
                item.error = error
                item.bell.ring()
        for call in list(self._calls):
            self._end(call, error)

    def _end(self, call: Call, error: BaseException | None = None) -> None:
        self._calls.remove(call)
        call.end(self.engine, error)


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for worker in list(_workers):
        worker.close()


def _run(
    inbox: queue.SimpleQueue, reference: weakref.ref[Worker], serving: list[bool]
) -> None:
    """The thread's work."""
    goes_on = True
    try:
        while goes_on:
            item = inbox.get()
            worker = reference()
            goes_on = worker is not None and worker.serve(item)
            # Until there is work again, neither is held.
            del item, worker
    finally:
        serving.clear()
