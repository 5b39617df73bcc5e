"""The settings of the requests in B slots, as NumPy arrays; free of jax."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from treespec_jax.config import SamplingParams

# Stands for no token: past every vocabulary, so that scatters drop it.
NO_TOKEN = np.int32(2**31 - 1)
# Name of a setting in SamplingParams -> dtype, and its value in a free slot.
_SAMPLING = {
    "temperature": (np.float32, 0.0),
    "top_k": (np.int32, 0),
    "top_p": (np.float32, 1.0),
    "min_p": (np.float32, 0.0),
    "seed": (np.uint32, 0),
}
_PENALTIES = {
    "repetition_penalty": (np.float32, 1.0),
    "presence_penalty": (np.float32, 0.0),
    "frequency_penalty": (np.float32, 0.0),
}


class SlotSettings:
    """What each slot's request asked for.

    A free slot is greedy and asks for nothing, so that it does not keep the others
    from the shortcuts of a batch in which nobody does.

    Args:
      batch: B.
      max_len: tokens of a text, prompt and output together.
      eos_ids: tokens that end a text, unless a request ignores them.
    """

    def __init__(self, batch: int, max_len: int, eos_ids: Sequence[int]):
        self._max_len = max_len
        self._eos_ids = tuple(eos_ids)
        known = {**_SAMPLING, **_PENALTIES}
        self._defaults = {name: value for name, (_, value) in known.items()}
        self._values = {
            name: np.full(batch, value, dtype) for name, (dtype, value) in known.items()
        }
        self._eos = np.full((batch, max(1, len(self._eos_ids))), -1, np.int32)
        self._want_logprobs = np.zeros(batch, bool)
        bias = batch, SamplingParams.MAX_LOGIT_BIAS
        self._bias_tokens = np.full(bias, NO_TOKEN)
        self._bias = np.zeros(bias, np.float32)

    def insert(self, slot: int, params: SamplingParams) -> None:
        """A request takes a slot."""
        for name, values in self._values.items():
            values[slot] = getattr(params, name)
        if not params.ignore_eos and self._eos_ids:
            self._eos[slot] = self._eos_ids
        self._want_logprobs[slot] = params.logprobs
        for column, (token, bias) in enumerate(params.logit_bias):
            self._bias_tokens[slot, column] = token
            self._bias[slot, column] = bias

    def clear(self, slot: int) -> None:
        """A slot becomes free."""
        for name, values in self._values.items():
            values[slot] = self._defaults[name]
        self._eos[slot] = -1
        self._want_logprobs[slot] = False
        self._bias_tokens[slot] = NO_TOKEN
        self._bias[slot] = 0

    def running(self, slots: Collection[int]) -> SlotSettings:
        """Copies the settings, with all other slots free.

        A text that is still being prefilled does not run: its settings may not keep the
        others from a shortcut either.
        """
        copied = copy.deepcopy(self)
        for slot in range(len(self._want_logprobs)):
            if slot not in slots:
                copied.clear(slot)
        return copied

    @property
    def eos(self) -> np.ndarray:
        """int32 [B, E], padded with -1; a copy, as all arrays here."""
        return self._eos.copy()

    @property
    def want_logprobs(self) -> np.ndarray:
        """bool [B]."""
        return self._want_logprobs.copy()

    def sampling(self) -> dict[str, np.ndarray]:
        """Fields of `sampling.policy.Sampling`."""
        return {name: self._values[name].copy() for name in _SAMPLING}

    def text(
        self, texts: Mapping[int, tuple[Sequence[int], Sequence[int]]]
    ) -> dict[str, np.ndarray]:
        """Fields of `sampling.penalties.TextSoFar`.

        Args:
          texts: prompt and output by slot.
        """
        batch = len(self._want_logprobs)
        tokens = np.full((batch, self._max_len), NO_TOKEN)
        prompt_length = np.zeros(batch, np.int32)
        for slot, (prompt, output) in texts.items():
            prompt_length[slot] = len(prompt)
            tokens[slot, : len(prompt)] = prompt
            tokens[slot, len(prompt) : len(prompt) + len(output)] = output
        penalties = {
            name.removesuffix("_penalty"): self._values[name].copy()
            for name in _PENALTIES
        }
        return {
            **penalties,
            "bias_tokens": self._bias_tokens.copy(),
            "bias": self._bias.copy(),
            "tokens": tokens,
            "prompt_length": prompt_length,
        }
