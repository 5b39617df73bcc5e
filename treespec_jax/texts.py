"""From a request's tokens to text, as they come."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from treespec_jax.checkpoints.tokenizers import Tokenizer
from treespec_jax.completions import (
    Completion,
    Messages,
    OnFinish,
    Prompt,
    TokenLogprob,
)
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import BestTokens, Request
from treespec_jax.pace import Pace
from treespec_jax.stops import StoppedText
from treespec_jax.tracing import build
from treespec_jax.tracing.trace import Step
from treespec_jax.worker import AsyncBell, Bell, Call, Worker


class Reader:
    """Turns a request's tokens into text, and looks for its stops.

    Args:
      prompt: as the user gave it.
      request: whose tokens are read.
      tokenizer: None: there is no text.
      context: tokens that the text goes on from.
    """

    def __init__(
        self,
        prompt: Prompt | Messages,
        request: Request,
        tokenizer: Tokenizer | None,
        context: Sequence[int],
    ):
        self.prompt = prompt
        self.request = request
        params = request.params
        self._end_ids = frozenset(params.stop_token_ids)
        self._min_tokens = params.min_tokens
        self._included = included = params.include_stop_str_in_output
        self._text: StoppedText | None = None
        if tokenizer is not None:
            self._text = StoppedText(tokenizer, context, params.stop, included)
        self._tokenizer, self._context = tokenizer, context
        self._steps = build.StepReader(request, tokenizer, context)
        self._seen = 0
        self._taken = 0

    def read(self, engine: Engine) -> None:
        """Takes in what the request emitted since; ends it at a stop."""
        request, text = self.request, self._text
        while self._seen < len(request.tokens):
            token = request.tokens[self._seen]
            self._seen += 1
            early = self._seen <= self._min_tokens
            stopped = token in self._end_ids and not early
            if text is not None and (self._included or not stopped):
                text.push(token, early)
                stopped |= text.stopped
            if stopped:
                self._cut(engine)
                break
        if text is not None and request.finish_reason:
            text.end()

    def _cut(self, engine: Engine) -> None:
        """Ends the request at the token that completed a stop."""
        request = self.request
        engine.cancel(request)
        if request.finish_reason == "time":
            # The text was whole before its time was over.
            request.stats.bound_by = request.stats.bound_by[:-1]
        request.finish_reason = "stop"
        request.cut(self._seen)

    def take(self) -> str:
        """Text not taken yet, less an end that could be the start of a stop text."""
        if self._text is None:
            return ""
        end = self._text.certain()
        piece = self._text.text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def take_steps(self) -> list[Step]:
        """Recorded steps not taken yet; none if the engine does not record."""
        return self._steps.read()

    def _tops(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        top: Sequence[BestTokens | None],
    ) -> list[list[TokenLogprob] | None]:
        """The likeliest tokens at each position, and the one that stands there."""
        found: list[list[TokenLogprob] | None] = []
        for token, logprob, best in zip(tokens, logprobs, top, strict=True):
            if best is None:
                found.append(None)
                continue
            some = list(zip(best.tokens, best.log_probs, strict=True))
            some = [(t, p, rank) for rank, (t, p) in enumerate(some, 1)]
            if token not in best.tokens:
                some.append((token, logprob, best.rank))
            found.append([TokenLogprob(t, self._shown(t), p, r) for t, p, r in some])
        return found

    def _shown(self, token: int) -> str:
        """The text of one token, or the spelling of a control token."""
        tokenizer = self._tokenizer
        if tokenizer is None or token >= tokenizer.vocab_size:
            return ""
        data = tokenizer.token_bytes(token)
        return data.decode("utf-8", "replace") if data else tokenizer.piece(token)

    def completion(self) -> Completion:
        request, params = self.request, self.request.params
        # A text that was given up may have no more than a part of them.
        scored = len(request.prompt_logprobs) == len(request.prompt)
        text = self._text.text if self._text is not None else ""
        make_trace = None
        if len(request.records) == len(request.steps):
            parts = self.prompt, text, self._tokenizer, self._context
            make_trace = functools.partial(build.trace_of, request, *parts)
        return Completion(
            prompt=self.prompt,
            prompt_token_ids=request.prompt,
            text=text,
            token_ids=request.tokens,
            finish_reason=request.finish_reason,
            logprobs=None if params.logprobs is None else request.logprobs,
            top_logprobs=self._tops(request.tokens, request.logprobs, request.top)
            if params.logprobs
            else None,
            prompt_logprobs=request.prompt_logprobs if scored else None,
            prompt_top_logprobs=self._tops(
                request.prompt, request.prompt_logprobs, request.prompt_top
            )
            if params.prompt_logprobs and scored
            else None,
            seed=request.params.seed,
            stats=request.stats,
            records=request.records,
            arrivals=request.arrivals,
            make_trace=make_trace,
        )


def completions_of(readers: Sequence[Reader]) -> list[Completion]:
    """A completion per prompt, with the other texts that were asked for.

    Args:
      readers: whose requests have ended; those of a prompt stand together.
    """
    return [_completion_of(group) for group in _by_prompt(readers)]


def telling(
    readers: Sequence[Reader], on_finish: OnFinish | None
) -> Callable[[int], None]:
    """A function to call with the number of every reader whose request has ended.

    It calls `on_finish` with the number of a prompt and its completion as soon as all
    texts of that prompt have ended.

    Args:
      readers: as of `completions_of`.
      on_finish: None: nothing is told.
    """
    groups = _by_prompt(readers)
    prompts = [number for number, group in enumerate(groups) for _ in group]
    missing = [len(group) for group in groups]

    def ended(index: int) -> None:
        number = prompts[index]
        missing[number] -= 1
        if on_finish is not None and not missing[number]:
            on_finish(number, _completion_of(groups[number]))

    return ended


def _by_prompt(readers: Sequence[Reader]) -> list[list[Reader]]:
    """Those of a prompt, which stand together."""
    groups, rest = [], list(readers)
    while rest:
        count = rest[0].request.params.samples
        groups.append(rest[:count])
        rest = rest[count:]
    return groups


def _completion_of(group: Sequence[Reader]) -> Completion:
    """The first of a prompt's texts, with the others; the best ones, if ranked."""
    params = group[0].request.params
    if params.ranked:
        # The order of seeds decides between equals.
        group = sorted(group, key=_mean_log_prob, reverse=True)
    first, *others = (reader.completion() for reader in group[: params.n])
    return dataclasses.replace(first, others=tuple(others))


def _mean_log_prob(reader: Reader) -> float:
    """Of the text's tokens; the least there is of a text without any."""
    log_probs = reader.request.logprobs
    return sum(log_probs) / len(log_probs) if log_probs else -math.inf


class _Pieces:
    """What streams of threads and of tasks share.

    Attributes:
      completion: the finished text, once the pieces have run out; else None.
    """

    def __init__(self, worker: Worker, reader: Reader, bell: Bell | AsyncBell):
        self.completion: Completion | None = None
        self._reader = reader
        self._worker = worker
        self._call = Call([reader], bell, streaming=True, pace=Pace())
        worker.submit(self._call)

    def take_steps(self) -> list[Step]:
        """Recorded steps behind the pieces so far that were not taken yet."""
        with self._call.lock:
            return self._reader.take_steps()

    def _take(self) -> str:
        """The text that came, if any; raises what ended the call, behind it."""
        # Asked first: what comes in between is taken the next time.
        ended = self._call.ended
        with self._call.lock:
            piece = self._reader.take()
        if ended and not (piece and self._call.error):
            self._finish()
            self._call.check()
        return piece

    def _finish(self) -> None:
        self.completion = self._reader.completion()

    def __del__(self):
        # At any point of any thread: nothing may wait here.
        if hasattr(self, "_call"):
            self._call.cancel()


class Stream(_Pieces, Iterator[str]):
    """Pieces of one text, which goes on while they are read.

    An interrupt (Control-C) while a piece is waited for gives the text up; after
    `close`, `completion` has what there was of it.
    """

    def __init__(self, worker: Worker, reader: Reader):
        super().__init__(worker, reader, Bell())

    def __next__(self) -> str:
        while self.completion is None:
            if piece := self._take():
                return piece
            if self.completion is None:
                try:
                    self._call.wait()
                except BaseException:
                    self._call.cancel()
                    raise
        raise StopIteration

    def close(self) -> None:
        """Gives the text up, and waits until its slot is free."""
        self._call.cancel()
        if self.completion is None and not self._worker.inside:
            while not self._call.ended:
                self._call.wait()
            self._finish()


class AsyncStream(_Pieces, AsyncIterator[str]):
    """Pieces of one text for a task of asyncio; see `Stream`.

    A task that is cancelled while it waits for a piece gives the text up.

    Raises:
      RuntimeError: no event loop runs.
    """

    def __init__(self, worker: Worker, reader: Reader):
        super().__init__(worker, reader, AsyncBell())

    async def __anext__(self) -> str:
        while self.completion is None:
            if piece := self._take():
                return piece
            if self.completion is None:
                try:
                    await self._call.wait_async()
                except BaseException:
                    self._call.cancel()
                    raise
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Gives the text up, and waits until its slot is free."""
        self._call.cancel()
        if self.completion is None:
            while not self._call.ended:
                await self._call.wait_async()
            self._finish()
