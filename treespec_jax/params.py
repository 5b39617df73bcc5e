"""What one request wants of its text. Checks itself, as `treespec_jax.config` does."""

from __future__ import annotations

import dataclasses
import math
import secrets
from typing import ClassVar

from treespec_jax.checks import (
    as_bias,
    as_bool,
    as_int,
    check_float,
    check_ints,
    check_texts,
)

SEED_BITS = 32


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """What one request wants. Two requests of a batch may differ in all of it.

    Attributes:
      max_tokens: tokens to emit at most, >= 1.
      temperature: 0 is greedy.
      top_k: keep the k likeliest tokens; 0 keeps all, and so does -1, which is kept
        as 0.
      top_p: keep the fewest likeliest tokens that have this probability together, in
        (0, 1].
      min_p: keep tokens at least this fraction as likely as the likeliest, in [0, 1].
      seed: of the request's noise; equal seeds give equal text (32 bits). Settings
        given for several prompts are those of the first: the seeds of the others
        follow (`for_text`). None, or -1, is a fresh one for every text, which its
        completion reports.
      stop: texts that end the output (they are not part of it); one that contains the
        spelling of a control token is found where that token is emitted. None: none.
      stop_token_ids: tokens that end the output; their text is not part of it. None:
        none.
      ignore_eos: go on past the end-of-text token.
      logprobs: also return log p (natural, of the model before penalties, bias,
        temperature and truncation) of every emitted token.
      repetition_penalty: logits of tokens in the prompt or the output are divided by
        it where positive, multiplied where not; 1 is none (`sampling.penalties`).
      presence_penalty: taken off the logits of tokens that were emitted, in [-2, 2];
        the prompt does not count, here and below.
      frequency_penalty: taken off once per time that the token was emitted, in
        [-2, 2].
      logit_bias: added to the logits of tokens, in [-100, 100] each: a mapping from
        ids, kept as sorted pairs; MAX_LOGIT_BIAS tokens at most.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    MAX_LOGIT_BIAS: ClassVar = 64
    # Least value, and bits of what holds it.
    _INTS: ClassVar = (("max_tokens", 1, 31), ("top_k", -1, 31))
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
        for name in ("ignore_eos", "logprobs"):
            checked[name] = as_bool(name, getattr(self, name))
        for name, (low, high, open_low) in self._FLOATS.items():
            check_float(name, getattr(self, name), low, high, open_low)
            checked[name] = float(getattr(self, name))
        checked["stop"] = check_texts("stop", self.stop)
        ends = check_ints("stop_token_ids", self.stop_token_ids, 0)
        checked["stop_token_ids"] = ends
        checked["logit_bias"] = as_bias(self.logit_bias, self.MAX_LOGIT_BIAS)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def for_text(self, index: int = 0) -> SamplingParams:
        """Those of one of several texts: the seed and `index`, modulo 2**32.

        A fresh seed, from the system's entropy, where there is none.
        """
        if self.seed is None:
            return dataclasses.replace(self, seed=secrets.randbits(SEED_BITS))
        seed = (self.seed + index) % (1 << SEED_BITS)
        return self if seed == self.seed else dataclasses.replace(self, seed=seed)

    @property
    def penalised(self) -> bool:
        """Whether the policy looks at the text so far, or has a bias."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
        )
