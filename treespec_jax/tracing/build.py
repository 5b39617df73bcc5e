"""From what an engine records of a request to its trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from treespec_jax.checkpoints.tokenizers import TextStream, Tokenizer
from treespec_jax.engine.request import Request
from treespec_jax.tracing.trace import Step, Timeline, Trace
from treespec_jax.trees.records import TreeRecord

# Stands for the logarithm of nearly nothing; JSON has no infinity.
LEAST = -99.0


class StepReader:
    """Turns the records of a request into steps, as they come.

    Args:
      request: of an engine that records.
      tokenizer: None: tokens add no text.
      context: tokens that the text goes on from.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None = None,
        context: Sequence[int] = (),
    ):
        self._request = request
        self._stream = TextStream(tokenizer, context) if tokenizer else None
        self._steps = self._tokens = self._arrival = self._arrived = 0

    def read(self) -> list[Step]:
        """Steps that were recorded since the last call."""
        request, found = self._request, []
        for number in range(self._steps, len(request.records)):
            count = request.steps[number].emitted
            emitted = request.tokens[self._tokens : self._tokens + count]
            self._tokens += count
            pieces = [self._piece(token) for token in emitted]
            drafted = request.steps[number].nodes
            step = _step(request.records[number], emitted, pieces, drafted)
            found.append(dataclasses.replace(step, dispatch=self._dispatch()))
        self._steps = len(request.records)
        return found

    def _piece(self, token: int) -> str:
        return self._stream.push([token]) if self._stream else ""

    def _dispatch(self) -> int:
        """Number of the arrival that brought the newest token."""
        arrivals = self._request.arrivals
        while self._arrival < len(arrivals):
            through = self._arrived + arrivals[self._arrival][1]
            if self._tokens <= through:
                break
            self._arrived = through
            self._arrival += 1
        return min(self._arrival, max(0, len(arrivals) - 1))


def _step(
    record: TreeRecord, emitted: Sequence[int], pieces: Sequence[str], drafted: int
) -> Step:
    real = record.log_prob > -np.inf
    real[0] = True
    for node, parent in enumerate(record.parents):
        real[node] &= real[parent]
    # Numbers without the void nodes.
    number = np.cumsum(real) - 1
    sources = np.where(np.arange(len(real)) > 0, record.sources, 0)
    return Step(
        parents=tuple(number[record.parents[real]].tolist()),
        tokens=tuple(record.tokens[real].tolist()),
        sources=tuple(sources[real].tolist()),
        draft_log_prob=_rounded(record.log_prob[real]),
        target_log_prob=_rounded(record.target_log_prob[real]),
        path=tuple(number[record.accepted].tolist()),
        emitted=tuple(emitted),
        emitted_log_prob=_rounded(record.emitted_log_prob[: len(emitted)]),
        pieces=tuple(pieces),
        drafted=drafted,
        dispatch=0,
    )


def _rounded(log_prob: np.ndarray) -> tuple[float, ...]:
    clipped = np.clip(np.nan_to_num(log_prob.astype(float), nan=LEAST), LEAST, 0)
    # Minus zero is zero.
    return tuple((np.round(clipped, 3) + 0.0).tolist())


def trace_of(
    request: Request,
    prompt: str | Sequence[Any],
    text: str,
    tokenizer: Tokenizer | None = None,
    context: Sequence[int] = (),
) -> Trace:
    """The trace of a request that ended.

    Args:
      request: of an engine that records.
      prompt: as the user gave it: a text, token ids, or messages.
      text: what the request added; pieces past its end are cut off.
      tokenizer: of the text.
      context: tokens that the text goes on from.
    """
    steps = _cut(StepReader(request, tokenizer, context).read(), text)
    tokens = {token for step in steps for token in (*step.tokens, *step.emitted)}
    return Trace(
        prompt=_said(prompt, tokenizer),
        text=text,
        finish_reason=request.finish_reason or "",
        settings={"rule": request.stats.label},
        sources=tuple(request.stats.sources),
        vocabulary={token: spelling(tokenizer, token) for token in sorted(tokens)},
        steps=tuple(steps),
        arrivals=tuple(round(seconds, 6) for seconds, _ in request.arrivals),
        stats=request.stats.as_dict(),
    )


def timeline(
    token_ids: Sequence[int],
    arrivals: Iterable[tuple[float, int]],
    tokenizer: Tokenizer | None,
    context: Sequence[int] = (),
) -> Timeline:
    """When the tokens of a text came (`Completion.arrivals`)."""
    stream = TextStream(tokenizer, context) if tokenizer else None
    pieces = [stream.push([token]) if stream else "" for token in token_ids]
    arrived = tuple((round(seconds, 6), count) for seconds, count in arrivals)
    return Timeline(tuple(pieces), arrived)


def spelling(tokenizer: Tokenizer | None, token: int) -> str:
    """How to show a token: the bytes that it adds, else its name or its number."""
    if tokenizer is None or token >= tokenizer.vocab_size:
        return f"#{token}"
    data = tokenizer.token_bytes(token)
    return data.decode("utf-8", "backslashreplace") if data else tokenizer.piece(token)


def _cut(steps: Iterable[Step], text: str) -> list[Step]:
    """The same with pieces that make up the text, which a stop text may have cut."""
    found, room = [], len(text)
    for step in steps:
        pieces = []
        for piece in step.pieces:
            pieces.append(piece[:room])
            room -= len(pieces[-1])
        found.append(dataclasses.replace(step, pieces=tuple(pieces)))
    if room and found:
        # A character that stayed incomplete.
        *pieces, last = found[-1].pieces
        pieces.append(last + text[len(text) - room :])
        found[-1] = dataclasses.replace(found[-1], pieces=tuple(pieces))
    return found


def _said(prompt, tokenizer) -> tuple[tuple[str, str], ...]:
    if isinstance(prompt, str):
        return (("", prompt),)
    if prompt and isinstance(prompt[0], Mapping):
        return tuple((str(m.get("role", "")), _content(m)) for m in prompt)
    if tokenizer is None:
        return (("", f"{len(prompt)} token ids"),)
    return (("", tokenizer.decode(prompt)),)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    parts = content or ()
    return "".join(str(part.get("text", "")) for part in parts)
