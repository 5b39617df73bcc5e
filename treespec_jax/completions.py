"""What a request gives back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from treespec_jax.engine.stats import Stats
from treespec_jax.errors import UserError
from treespec_jax.tracing.trace import Trace
from treespec_jax.trees.records import TreeRecord

Message = Mapping[str, Any]
Messages = Sequence[Message]
Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """One token that stands, or might have stood, somewhere in a text.

    Attributes:
      token_id: of the vocabulary.
      text: that it stands for by itself; its spelling, if it is a control token, and
        "" without a tokenizer.
      logprob: natural log p under the target, before penalties and the like.
      rank: 1 is the likeliest token there.
    """

    token_id: int
    text: str
    logprob: float
    rank: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """One finished text.

    Attributes:
      prompt: as given; for a chat the messages.
      prompt_token_ids: its tokens, as the model read them.
      text: what follows the prompt; "" without a tokenizer.
      token_ids: emitted tokens, the end-of-text token included if there was one.
      finish_reason: "stop" (end-of-text token or stop text), "length" (max_tokens,
        max_len, or more pages than there are) or "time" (max_time).
      logprobs: natural log p of each token under the target, if asked for.
      top_logprobs: for each token the k likeliest ones in its stead, best first, and
        behind them the token itself if it is not one of them; None if k is 0.
      prompt_logprobs: as `logprobs`, of the prompt's tokens; None for the first.
      prompt_top_logprobs: as `top_logprobs`, likewise.
      seed: of its noise, a fresh one where none was asked for; given again, it gives
        the text again.
      stats: of this request.
      records: of its trees, if the engine records them.
      arrivals: seconds since it was submitted and tokens of every time that tokens
        reached the host; those of one dispatch arrive together.
      make_trace: makes `trace`; None if the engine recorded nothing.
      others: further texts of the prompt, where `SamplingParams.n` is more than 1: in
        the order of their seeds, or the better ones first if `best_of` is more than n.
    """

    prompt: Prompt | Messages
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] | None
    top_logprobs: list[list[TokenLogprob]] | None
    prompt_logprobs: list[float | None] | None
    prompt_top_logprobs: list[list[TokenLogprob] | None] | None
    seed: int
    stats: Stats
    records: list[TreeRecord] = dataclasses.field(default_factory=list)
    arrivals: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    make_trace: Callable[[], Trace] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )
    others: tuple[Completion, ...] = ()

    @property
    def texts(self) -> tuple[Completion, ...]:
        """This text and the others of its prompt."""
        return (self, *self.others)

    @property
    def first_token_seconds(self) -> float | None:
        """From the submission to the first token on the host; None: there is none.

        With several steps per dispatch the first one arrives with others.
        """
        return self.arrivals[0][0] if self.arrivals else None

    @functools.cached_property
    def trace(self) -> Trace:
        """What was done step by step; `trace.save("run.html")` shows it.

        Raises:
          UserError: the engine did not record it.
        """
        if self.make_trace is None:
            raise UserError("nothing was recorded; make the LLM with record=True")
        return self.make_trace()


# Gets the number of a prompt, and its completion; what it raises ends the whole call.
OnFinish = Callable[[int, Completion], Any]


@dataclasses.dataclass(frozen=True)
class Generation(Sequence):
    """Completions in the order of their prompts.

    Attributes:
      completions: one per prompt.
      stats: summed counts; times are those that the engine spent in prefill and in
        decoding while the call was under way. Calls that overlap share the batch, and
        so each of them counts the time that they shared.
    """

    completions: list[Completion]
    stats: Stats

    def __getitem__(self, index):
        return self.completions[index]

    def __len__(self) -> int:
        return len(self.completions)
