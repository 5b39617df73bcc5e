"""From a request's tokens to text, as they come."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from treespec_jax.checkpoints.tokenizers import Tokenizer
from treespec_jax.completions import Completion, Messages, Prompt
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import Request
from treespec_jax.stops import StoppedText
from treespec_jax.tracing import build
from treespec_jax.tracing.trace import Step


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
        self._text = StoppedText(tokenizer, context, params.stop) if tokenizer else None
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
            stopped = token in self._end_ids
            if text is not None and not stopped:
                text.push(token)
                stopped = text.stopped
            if stopped:
                self._cut(engine)
                break
        if text is not None and request.finish_reason:
            text.end()

    def _cut(self, engine: Engine) -> None:
        """Ends the request at the token that completed a stop."""
        request = self.request
        engine.cancel(request)
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

    def completion(self) -> Completion:
        request = self.request
        text = self._text.text if self._text is not None else ""
        make_trace = None
        if len(request.records) == len(request.steps):
            parts = self.prompt, text, self._tokenizer, self._context
            make_trace = functools.partial(build.trace_of, request, *parts)
        return Completion(
            prompt=self.prompt,
            text=text,
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
