"""One LLM for many callers: threads, tasks, streams, interrupts and failures.

The models say a script, so that the right answer to the token at any point of it is the
rest. Whatever happened, afterwards all pages are free and the next answer is right.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
import threading
import time

import jax
import pytest

from treespec_jax import pace, worker
from treespec_jax.cache.allocator import PageAllocator
from treespec_jax.config import SamplingParams
from treespec_jax.engine import engine as engines
from treespec_jax.engine.executor import Executor
from treespec_jax.engine.request import Request
from treespec_jax.engine.slots import SlotSettings
from treespec_jax.errors import UserError
from treespec_jax.worker import Call

pytestmark = pytest.mark.slow

THREADS, REQUESTS = 8, 50


@pytest.fixture
def llm(scripted_llm, script):
    yield scripted_llm
    with scripted_llm.exclusive() as engine:
        assert not engine.busy and engine.free_pages == 8
    (completion,) = scripted_llm.generate(script.prompt, SamplingParams())
    assert completion.token_ids == script.ids and completion.text == script.text


@pytest.fixture
def ask(script):
    """A prompt that begins at a random point of the script, and its right answer."""

    def make(rng: random.Random):
        start = rng.randrange(len(script.ids) - 2)
        count = rng.randrange(1, len(script.ids))
        more = {}
        answer = script.ids[start + 1 :][:count]
        if rng.random() < 0.3:
            # Also where the answer does not get to.
            more["stop_token_ids"] = (rng.choice(script.ids),)
            if more["stop_token_ids"][0] in answer:
                answer = answer[: answer.index(more["stop_token_ids"][0]) + 1]
        params = SamplingParams(max_tokens=count, **more)
        return [script.ids[start]], params, answer

    return make


def in_threads(work, count=THREADS):
    """Runs work(number) in threads; raises what the first of them raises."""
    errors = []

    def guarded(number):
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def by_generate(llm, rng, ask):
    asked = [ask(rng) for _ in range(rng.randrange(1, 4))]
    prompts, params, answers = zip(*asked, strict=True)
    began = time.perf_counter()
    generation = llm.generate(list(prompts), list(params))
    seconds, stats = time.perf_counter() - began, generation.stats
    assert 0 < stats.decode_seconds <= seconds - stats.prefill_seconds
    assert [c.token_ids for c in generation] == list(answers)
    assert all(c.stats.tokens == len(c.token_ids) for c in generation)


def by_stream(llm, rng, ask):
    """Read to its end, closed or dropped on the way."""
    prompt, params, answer = ask(rng)
    stream, pieces, end = llm.stream(prompt, params), [], rng.random()
    for piece in stream:
        pieces.append(piece)
        if end < 0.5 and rng.random() < 0.5:
            break
    if end < 0.25:
        return
    stream.close()
    completion = stream.completion
    assert completion.text.startswith("".join(pieces))
    if end >= 0.5:
        assert completion.token_ids == answer
        assert completion.text == "".join(pieces)
    else:
        assert completion.token_ids == answer[: len(completion.token_ids)]


def by_task(llm, rng, ask):
    """Several tasks of one loop, of which some are cancelled."""

    async def stream():
        prompt, params, answer = ask(rng)
        pieces = llm.astream(prompt, params)
        text = "".join([piece async for piece in pieces])
        assert pieces.completion.text == text
        assert pieces.completion.token_ids == answer

    async def generate():
        prompt, params, answer = ask(rng)
        (completion,) = await llm.agenerate([prompt], params)
        assert completion.token_ids == answer

    async def main():
        tasks = [asyncio.create_task(f()) for f in (stream, generate, generate)]
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.01)
            tasks[rng.randrange(3)].cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    asyncio.run(main())


WAYS = by_generate, by_generate, by_stream, by_stream, by_task


def test_callers_share_the_engine(llm, ask):
    """Threads, streams and tasks at once; each gets its own answer."""

    def work(number):
        rng = random.Random(number)
        for _ in range(REQUESTS):
            rng.choice(WAYS)(llm, rng, ask)

    in_threads(work)


class Faults:
    """Lets what takes memory or runs on the device fail now and then."""

    FUNCTIONS = (
        (PageAllocator, "take"),
        (SlotSettings, "insert"),
        (Executor, "prefill"),
        (Executor, "dispatch"),
        (engines, "fetch"),
    )

    def __init__(self, monkeypatch, llm):
        self.rng, self.rate, self.raised = random.Random(0), 0.02, 0
        self._executor = llm.engine._executor
        for owner, name in self.FUNCTIONS:
            function = getattr(owner, name)
            monkeypatch.setattr(owner, name, self._failing(function, name))

    def _failing(self, function, name):
        def call(*args, **options):
            fails = self.rng.random()
            if fails < self.rate / 3:
                self._fail(name)
            result = function(*args, **options)
            if fails < self.rate:
                if fails < 2 * self.rate / 3 and name == "dispatch":
                    # A program that failed on the device has taken the state along.
                    for leaf in jax.tree.leaves(self._executor._state):
                        leaf.delete()
                self._fail(name)
            return result

        return call

    def _fail(self, name):
        self.raised += 1
        raise MemoryError(name)


def test_failures_reach_their_callers_and_nobody_else(llm, ask, monkeypatch):
    """Every answer is right or the error of what failed; never another one."""
    faults = Faults(monkeypatch, llm)
    outcomes = []

    def work(number):
        rng = random.Random(number)
        for _ in range(REQUESTS):
            try:
                rng.choice(WAYS)(llm, rng, ask)
                outcomes.append("right")
            except MemoryError:
                outcomes.append("failed")

    in_threads(work)
    monkeypatch.undo()
    assert faults.raised > 10
    assert 5 < outcomes.count("failed") < outcomes.count("right")


@pytest.mark.parametrize("kind", ["launch", "device", "result"])
def test_a_failing_dispatch_ends_what_runs_in_it(llm, script, monkeypatch, kind):
    """Both running texts; the one that waits is answered as if nothing had been."""
    dispatch = Executor.dispatch

    def failing(*args):
        if kind == "device":
            dispatch(*args)
            for leaf in jax.tree.leaves(args[0]._state):
                leaf.delete()
        raise MemoryError(kind)

    params = SamplingParams(max_tokens=40)
    requests = [Request(list(script.prompt_ids), params) for _ in range(3)]
    with llm.exclusive() as engine:
        for request in requests:
            engine.submit(request)
        owner, name = (engines, "fetch") if kind == "result" else (Executor, "dispatch")
        monkeypatch.setattr(owner, name, failing)
        with pytest.raises(MemoryError, match=kind):
            engine.advance()
        monkeypatch.undo()
        reasons = [request.finish_reason for request in requests]
        assert reasons == ["error", "error", None] and engine.free_pages == 8
        while engine.busy:
            engine.advance()
    assert requests[2].tokens == script.ids
    assert requests[2].finish_reason == "stop"


def test_one_failing_text_takes_no_other_along(llm, script, monkeypatch):
    """Two callers side by side: the chunk of one does not go into the cache."""
    prefill, failed = Executor.prefill, threading.Event()

    def failing(executor, chunk):
        if chunk.root[0] == script.ids[5]:
            failed.set()
            raise MemoryError("no room for the chunk")
        prefill(executor, chunk)

    monkeypatch.setattr(Executor, "prefill", failing)
    stream = llm.stream(script.prompt)
    with pytest.raises(MemoryError, match="no room for the chunk"):
        llm.generate([[script.ids[5]], script.prompt])
    assert failed.is_set()
    assert "".join(stream) == script.text
    assert stream.completion.token_ids == script.ids


def test_a_reader_that_fails_ends_its_own_call(llm, script):
    stream, other = llm.stream(script.prompt), llm.stream(script.prompt)
    broken = stream._reader

    def push(token, early=False):
        raise UnicodeError("no such token")

    with stream._call.lock:
        broken._text.push = push
    with pytest.raises(UnicodeError, match="no such token"):
        "".join(stream)
    assert next(stream, None) is None
    assert "".join(other) == script.text


@contextlib.contextmanager
def interrupts():
    """Control-C that comes while `armed` holds something, in the main thread."""
    armed = []

    def interrupt(*_):
        if armed:
            armed.clear()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        yield armed
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# A stream that is dropped just then may be interrupted while it says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_control_c_ends_the_requests_of_its_caller(llm, ask):
    """At any moment of the main thread, while two others go on undisturbed."""
    done, counts = threading.Event(), [0, 0]

    def others(number):
        rng = random.Random(number)
        while not done.is_set():
            by_generate(llm, rng, ask)
            counts[number] += 1

    def main(_):
        try:
            in_threads(others, 2)
        except BaseException as error:
            failures.append(error)

    failures: list[BaseException] = []
    background = threading.Thread(target=main, args=(0,))
    background.start()
    rng, interrupted = random.Random(0), 0
    with interrupts() as armed:
        for number in range(3 * REQUESTS):
            way = (by_generate, by_stream)[number % 2]
            try:
                armed.append(True)
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + rng.random() * 0.006)
                way(llm, rng, ask)
                armed.clear()
            except KeyboardInterrupt:
                interrupted += 1
    done.set()
    background.join()
    assert not failures and min(counts) > 0
    assert interrupted > 10


def test_control_c_at_any_line_of_asking_leaves_the_llm_usable(llm, script):
    """Python's own lines too: an interrupted `Thread.is_alive` takes it for ended."""
    lines, number = None, 0

    def trace(frame, event, _):
        nonlocal lines
        if event == "line":
            lines -= 1
            if not lines:
                raise KeyboardInterrupt
        return trace

    while lines is None or lines <= 0:
        number += 1
        lines = number
        sys.settrace(trace)
        try:
            llm._worker.post(lambda _: None)
            llm._worker.submit(Call([], worker.Bell()))
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
    assert number > 5
    (completion,) = llm.generate(script.prompt)
    assert completion.token_ids == script.ids


def test_an_interrupted_stream_gives_what_there_was(llm, script, monkeypatch):
    advance, goes_on = llm.engine.advance, threading.Semaphore(3)

    def slow(*args):
        goes_on.acquire()
        advance(*args)

    monkeypatch.setattr(llm.engine, "advance", slow)
    monkeypatch.setattr(pace.Pace, "took", lambda *_: None)
    stream, pieces = llm.stream(script.prompt), []
    with interrupts() as armed, pytest.raises(KeyboardInterrupt):
        armed.append(True)
        for piece in stream:
            pieces.append(piece)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
    goes_on.release()
    stream.close()
    assert script.text.startswith(stream.completion.text)
    assert stream.completion.text.startswith("".join(pieces))
    assert 0 < len(stream.completion.token_ids) < len(script.ids)


def test_control_c_does_not_wait_for_a_program_that_compiles(llm, script, monkeypatch):
    """The caller goes at once; the prefill ends when it ends, and loses nothing."""
    prefill, compiled = Executor.prefill, threading.Event()

    def compiling(*args):
        if not compiled.is_set():
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        compiled.wait()
        prefill(*args)

    monkeypatch.setattr(Executor, "prefill", compiling)
    with interrupts() as armed, pytest.raises(KeyboardInterrupt):
        armed.append(True)
        llm.generate([script.prompt] * 3)
    assert llm.engine.busy and not compiled.is_set()
    compiled.set()


def test_the_smallest_number_of_steps_counts(llm, script, monkeypatch):
    """While a stream is under way its own pace, then what was asked for."""
    advance, asked, begun = llm.engine.advance, [], threading.Event()

    def watched(max_steps):
        begun.wait()
        asked.append(max_steps)
        advance(max_steps)

    monkeypatch.setattr(llm.engine, "advance", watched)
    # Every dispatch takes too long to run more steps.
    monkeypatch.setattr(pace.Pace, "took", lambda *_: None)
    stream = llm.stream(script.prompt, SamplingParams(max_tokens=3))
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    thread = threading.Thread(target=llm.generate, args=([[5]], params, 3))
    thread.start()
    while llm._worker._inbox.empty():
        time.sleep(0.001)
    begun.set()
    "".join(stream)
    thread.join()
    assert asked[0] == 1 and asked[-1] == 3 and set(asked) == {1, 3}
    assert asked == sorted(asked)


def test_what_needs_the_engine_alone_waits_or_says_so(llm, script, monkeypatch):
    advance, begun, goes_on = llm.engine.advance, threading.Event(), threading.Event()

    def watched(*args):
        begun.set()
        goes_on.wait()
        advance(*args)

    monkeypatch.setattr(llm.engine, "advance", watched)
    stream = llm.stream(script.prompt)
    begun.wait()
    threading.Timer(0.05, goes_on.set).start()
    with pytest.raises(ValueError, match="requests are under way; end them first"):
        llm.reset()
    assert "".join(stream) == script.text
    monkeypatch.undo()
    with llm.exclusive() as engine:
        assert engine is llm.engine
        late = llm.stream(script.prompt)
        late._call._bell.ring()
        assert not engine.busy
    assert "".join(late) == script.text
    llm.reset()


def test_a_process_without_the_thread_is_told_so(llm, monkeypatch):
    """As a fork is, which has the thread that forked alone."""
    monkeypatch.setattr(worker.os, "getpid", lambda: 1)
    with pytest.raises(UserError, match="belongs to another process; make one in"):
        llm.generate([[5]])
    monkeypatch.undo()
