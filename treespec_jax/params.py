"""What one request wants of its text. Checks itself, as `treespec_jax.config` does."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable
from typing import Any, ClassVar

from treespec_jax import adaptive
from treespec_jax.adaptive import AdaptiveTemperature
from treespec_jax.checks import (
    as_bias,
    as_bool,
    as_count,
    as_int,
    check_float,
    check_functions,
    check_ints,
    check_optional,
    check_texts,
    check_words,
)
from treespec_jax.errors import UserError

SEED_BITS = 32


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What one request wants. Two requests of a batch may differ in all of it.

    Attributes:
      max_tokens: tokens to emit at most, >= 1.
      min_tokens: tokens to emit before one that ends the text, or that completes a
        stop; at most `max_tokens`.
      temperature: 0 is greedy.
      adaptive_temperature: "entropy:1", "depth:0.9" or "siblings:0.2": the temperature
        as a function of the target's entropy, or of the place in the drafted tree that
        a token comes from, see `treespec_jax.adaptive`. LOSSY: not the target's
        distribution at `temperature`, and for the last two a text depends on its trees.
      top_k: keep the k likeliest tokens; 0 keeps all, and so does -1, which is kept
        as 0.
      top_p: keep the fewest likeliest tokens that have this probability together, in
        (0, 1].
      min_p: keep tokens at least this fraction as likely as the likeliest, in [0, 1].
      seed: of the request's noise; equal seeds give equal text (32 bits). Settings
        given for several prompts are those of the first: the seeds of the others
        follow (`for_text`). None, or -1, is a fresh one for every text, which its
        completion reports.
      stop: texts that end the output; one that contains the
        spelling of a control token is found where that token is emitted. None: none.
      stop_token_ids: tokens that end the output. None: none.
      include_stop_str_in_output: keep the stop text that ended the output, or the text
        of the token of `stop_token_ids`; else it is not part of it.
      n: texts of a prompt that are returned, with seeds from `seed` on; they share the
        prompt's pages of the cache (`Completion.others`).
      best_of: texts of a prompt that are tried; the n of the greatest mean log p per
        token are returned, best first. None: n.
      ignore_eos: go on past the end-of-text token.
      logprobs: also return log p (natural, of the target, before penalties, bias and
        all else that is set here) of every emitted token, and of the so many likeliest
        tokens in its stead. 0, or True, is that of the emitted one alone; None, or
        False, is none.
      prompt_logprobs: the same of the prompt's tokens but the first, each after those
        in front of it.
      bad_words: texts, or lists of token ids, that must not come about: their last
        token is forbidden where the text, prompt included, ends with the others. A text
        stands for its tokens, alone and behind a space (`tokenizers.spellings`).
      allowed_token_ids: the only tokens that may be emitted; None: all.
      logits_processors: functions that change the logits, in turn, after penalties and
        bias: of int32 [max_len], the tokens of prompt and output with the newest last
        and -1 in front of the first, and float32 [V], to [V]. They are compiled with
        the step (`jax.jit`), once for each function: define one outside of loops.
      repetition_penalty: logits of tokens in the prompt or the output are divided by
        it where positive, multiplied where not; 1 is none (`sampling.penalties`).
      presence_penalty: taken off the logits of tokens that were emitted, in [-2, 2];
        the prompt does not count, here and below.
      frequency_penalty: taken off once per time that the token was emitted, in
        [-2, 2].
      logit_bias: added to the logits of tokens, in [-100, 100] each: a mapping from
        ids, kept as sorted pairs; MAX_LOGIT_BIAS tokens at most.
      speculate: if not, no tree is grown for it, whatever its batch does.
      max_time: seconds from when it is submitted, waiting and compiling included, after
        which no dispatch begins for it: the text then ends where it stands, with the
        finish reason "time". None: no limit.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    adaptive_temperature: str = ""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    best_of: int | None = None
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    logits_processors: tuple[Callable[..., Any], ...] = dataclasses.field(
        default=(), metadata={"python": True}
    )
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    speculate: bool = True
    max_time: float | None = None

    MAX_LOGIT_BIAS: ClassVar = 64
    # Least value, and bits of what holds it.
    _INTS: ClassVar = (
        ("max_tokens", 1, 31),
        ("min_tokens", 0, 31),
        ("top_k", -1, 31),
    )
    # Least and greatest value, and whether the least one itself is refused.
    _FLOATS: ClassVar = {
        "temperature": (0, math.inf, False),
        "top_p": (0, 1, True),
        "min_p": (0, 1, False),
        "repetition_penalty": (0, math.inf, True),
        "presence_penalty": (-2, 2, False),
        "frequency_penalty": (-2, 2, False),
    }

    def __post_init__(self):
        checked = {
            name: as_int(name, getattr(self, name), least, bits)
            for name, least, bits in self._INTS
        }
        checked["top_k"] = max(checked["top_k"], 0)
        seed = -1 if self.seed is None else as_int("seed", self.seed, -1, SEED_BITS)
        checked["seed"] = None if seed < 0 else seed
        for name in ("logprobs", "prompt_logprobs"):
            checked[name] = as_count(name, getattr(self, name))
        for name in ("ignore_eos", "include_stop_str_in_output", "speculate"):
            checked[name] = as_bool(name, getattr(self, name))
        for name, (low, high, open_low) in self._FLOATS.items():
            check_float(name, getattr(self, name), low, high, open_low)
            checked[name] = float(getattr(self, name))
        check_optional("max_time", self.max_time)
        if self.max_time is not None:
            checked["max_time"] = float(self.max_time)
        checked["stop"] = check_texts("stop", self.stop)
        ends = check_ints("stop_token_ids", self.stop_token_ids, 0)
        checked["stop_token_ids"] = ends
        checked["bad_words"] = check_words("bad_words", self.bad_words)
        if self.allowed_token_ids is not None:
            allowed = check_ints("allowed_token_ids", self.allowed_token_ids, 0)
            checked["allowed_token_ids"] = tuple(sorted(set(allowed)))
        functions = check_functions("logits_processors", self.logits_processors)
        checked["logits_processors"] = functions
        checked["logit_bias"] = as_bias(self.logit_bias, self.MAX_LOGIT_BIAS)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._check_samples()
        self._check_temperature()
        if self.min_tokens > self.max_tokens:
            raise UserError(
                f"min_tokens={self.min_tokens} is more than "
                f"max_tokens={self.max_tokens}; lower it"
            )
        if self.allowed_token_ids == ():
            raise UserError("allowed_token_ids is empty; give one at least, or None")

    def _check_temperature(self):
        given = self.adaptive
        named = f"adaptive_temperature={self.adaptive_temperature!r}"
        if given and self.temperature == 0:
            raise UserError(
                f"{named} changes no greedy text; raise temperature, or leave it out"
            )
        if given and given.by_tree and not self.speculate:
            raise UserError(
                f"{named} looks at the drafted tree, and speculate=False grows none; "
                "leave one of them out, or take entropy:1"
            )

    def _check_samples(self):
        object.__setattr__(self, "n", as_int("n", self.n, 1))
        if self.best_of is not None:
            best_of = as_int("best_of", self.best_of, 1)
            object.__setattr__(self, "best_of", best_of)
            if best_of < self.n:
                raise UserError(f"best_of={best_of} is less than n={self.n}; raise it")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"n={self.n}, best_of={self.best_of}: greedy texts are all the same; "
                "raise temperature"
            )

    @property
    def adaptive(self) -> AdaptiveTemperature | None:
        """`adaptive_temperature`, read."""
        return adaptive.parse("adaptive_temperature", self.adaptive_temperature)

    @property
    def samples(self) -> int:
        """Texts of a prompt that are tried."""
        return self.best_of or self.n

    @property
    def ranked(self) -> bool:
        """Whether only the best of these are returned, in their order."""
        return self.samples > self.n

    def for_text(self, index: int = 0) -> SamplingParams:
        """Those of one of several texts: the seed and `index`, modulo 2**32.

        A fresh seed, from the system's entropy, where there is none.
        """
        if self.seed is None:
            return dataclasses.replace(self, seed=secrets.randbits(SEED_BITS))
        seed = (self.seed + index) % (1 << SEED_BITS)
        return self if seed == self.seed else dataclasses.replace(self, seed=seed)

    def each(self) -> list[SamplingParams]:
        """Those of each of the texts that are tried, with seeds of their own."""
        first = self.for_text()
        return [first.for_text(index) for index in range(self.samples)]

    @property
    def repeats(self) -> bool:
        """Whether there is a penalty or a bias."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
        )

    @property
    def penalised(self) -> bool:
        """Whether logits are changed before temperature and truncation, but for
        `min_tokens`, which ends with that many."""
        return bool(
            self.repeats
            or self.bad_words
            or self.allowed_token_ids
            or self.logits_processors
        )
