"""From a request's tokens to text, as they come."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from treespec_jax.checkpoints.tokenizers import TextStream, Tokenizer
from treespec_jax.completions import Completion, Messages, Prompt
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import Request
from treespec_jax.tracing import build
from treespec_jax.tracing.trace import Step


class Reader:
    """Turns a request's tokens into text, and looks for stop texts.

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
        self._stop = request.params.stop
        self._stream = TextStream(tokenizer, context) if tokenizer else None
        self._tokenizer, self._context = tokenizer, context
        self._steps = build.StepReader(request, tokenizer, context)
        self._seen = 0
        self._text = ""
        self._taken = 0
        self._ended = False

    def read(self, engine: Engine) -> None:
        """Takes in what the request emitted since; ends it at a stop text."""
        request = self.request
        if self._stream is None or self._ended:
            return
        while self._seen < len(request.tokens):
            token = request.tokens[self._seen]
            self._seen += 1
            self._append(self._stream.push([token]))
            if self._ended:
                self._cut(engine)
                return
        if request.finish_reason:
            self._append(self._stream.flush())
            self._ended = True

    def _append(self, piece: str) -> None:
        longest = max((len(stop) for stop in self._stop), default=0)
        begin = max(0, len(self._text) - longest + 1)
        self._text += piece
        found = [i for s in self._stop if (i := self._text.find(s, begin)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self._ended = True

    def _cut(self, engine: Engine) -> None:
        """Ends the request at the token that completed a stop text."""
        request = self.request
        engine.cancel(request)
        request.finish_reason = "stop"
        request.cut(self._seen)

    def take(self) -> str:
        """Text not taken yet, less an end that could be the start of a stop text."""
        end = len(self._text)
        if not self._ended:
            end -= max((_overlap(self._text, stop) for stop in self._stop), default=0)
        piece = self._text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def take_steps(self) -> list[Step]:
        """Recorded steps not taken yet; none if the engine does not record."""
        return self._steps.read()

    def completion(self) -> Completion:
        request = self.request
        make_trace = None
        if len(request.records) == len(request.steps):
            text = self.prompt, self._text, self._tokenizer, self._context
            make_trace = functools.partial(build.trace_of, request, *text)
        return Completion(
            prompt=self.prompt,
            text=self._text,
            token_ids=request.tokens,
            finish_reason=request.finish_reason,
            logprobs=request.logprobs if request.params.logprobs else None,
            stats=request.stats,
            records=request.records,
            arrivals=request.arrivals,
            make_trace=make_trace,
        )


class Stream(Iterator[str]):
    """Pieces of one text.

    Attributes:
      completion: the finished text, once the pieces have run out; else None.
    """

    def __init__(self, engine: Engine, reader: Reader):
        self.completion: Completion | None = None
        self._engine = engine
        self._reader = reader
        self._engine.submit(reader.request)

    def __next__(self) -> str:
        while self.completion is None:
            if self._reader.request.finish_reason is None:
                # One step a dispatch: each piece is shown as soon as it is known.
                self._engine.advance(max_steps=1)
            self._reader.read(self._engine)
            piece = self._reader.take()
            if self._reader.request.finish_reason is not None:
                self.completion = self._reader.completion()
            if piece:
                return piece
        raise StopIteration

    def take_steps(self) -> list[Step]:
        """Recorded steps behind the pieces so far that were not taken yet."""
        return self._reader.take_steps()

    def close(self) -> None:
        """Gives the text up and frees its slot."""
        if self.completion is None:
            self._engine.cancel(self._reader.request)
            self.completion = self._reader.completion()

    def __del__(self):
        self.close()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper start of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
