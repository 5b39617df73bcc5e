"""A request on its way through the engine; free of jax."""

from __future__ import annotations

import copy
import dataclasses

from treespec_jax.config import SamplingParams
from treespec_jax.engine.stats import Stats
from treespec_jax.trees.records import StepRecord, TreeRecord


@dataclasses.dataclass(frozen=True)
class BestTokens:
    """The target's likeliest tokens at one position.

    Attributes:
      tokens: ids, best first.
      log_probs: natural, of each.
      rank: of the token that stands there, 1 is the likeliest.
    """

    tokens: list[int]
    log_probs: list[float]
    rank: int


@dataclasses.dataclass(eq=False)
class Request:
    """One text in the making.

    Attributes:
      prompt: token ids, at least one.
      params: what was asked for; a seed of None is replaced by a fresh one.
      tokens: ids emitted so far.
      logprobs: log p of each, if asked for.
      top: the likeliest tokens in the stead of each, if asked for.
      prompt_logprobs: log p of each token of the prompt, None of the first; empty if
        not asked for.
      prompt_top: likewise.
      finish_reason: None while running; then "stop" (end-of-text token or a stop text),
        "length" (max_tokens, max_len, or more pages than there are), "time" (max_time)
        or "error" (what failed was raised).
      stats: counts and times.
      records: of every step's tree, if the engine records them.
      steps: what each step did.
      submitted: when it was submitted, by `time.perf_counter`; 0 before.
      arrivals: seconds since then and tokens of every time that tokens reached the
        host.
    """

    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[BestTokens] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float | None] = dataclasses.field(default_factory=list)
    prompt_top: list[BestTokens | None] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stats: Stats = dataclasses.field(default_factory=Stats)
    records: list[TreeRecord] = dataclasses.field(default_factory=list)
    steps: list[StepRecord] = dataclasses.field(default_factory=list)
    submitted: float = 0.0
    arrivals: list[tuple[float, int]] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.params = self.params.for_text()

    @property
    def penalised(self) -> bool:
        """Whether the next token's logits are changed before temperature."""
        return self.params.penalised or self.early

    @property
    def scoring(self) -> bool:
        """Whether log p of the prompt is asked for and not known yet."""
        wanted = self.params.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < len(self.prompt)

    def late(self, now: float) -> bool:
        """Whether its time is over, at a moment of `time.perf_counter`."""
        limit = self.params.max_time
        return limit is not None and now - self.submitted >= limit

    @property
    def early(self) -> bool:
        """Whether the text is too short to end."""
        return len(self.tokens) < self.params.min_tokens

    def forked(self, params: SamplingParams) -> Request:
        """A request of the same text so far, with settings of its own."""
        return dataclasses.replace(copy.deepcopy(self), params=params)

    def cut(self, tokens: int) -> None:
        """Ends the text after `tokens` tokens, as if no more had been emitted."""
        while self.stats.tokens > tokens:
            last = self.steps.pop()
            self.stats.take_back(last)
            missing = tokens - self.stats.tokens
            if missing > 0:
                self.steps.append(last.cut(missing))
                self.stats.record_step(self.steps[-1])
        excess = sum(count for _, count in self.arrivals) - tokens
        while excess > 0:
            seconds, count = self.arrivals.pop()
            if count > excess:
                self.arrivals.append((seconds, count - excess))
            excess -= count
        del self.tokens[tokens:]
        del self.logprobs[tokens:]
        del self.top[tokens:]
        del self.records[len(self.steps) :]
