"""The settings of the requests in B slots, as NumPy arrays; free of jax."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from treespec_jax.adaptive import FORMS
from treespec_jax.config import SamplingParams
from treespec_jax.engine.request import Request

# Stands for no token: past every vocabulary, so that scatters drop it.
NO_TOKEN = np.int32(2**31 - 1)
# Stands for any token in a bad word, as in `sampling.constraints`.
ANY = np.int32(-2)
# Bits of 32 tokens.
ALL = np.uint32(2**32 - 1)
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


def sampling_of_all(batch: int, params: SamplingParams) -> dict[str, np.ndarray]:
    """Fields of `sampling.policy.Sampling`, if all slots ask for the same."""
    return {
        name: np.full(batch, getattr(params, name), dtype)
        for name, (dtype, _) in _SAMPLING.items()
    }


def adaptive_of_all(batch: int, params: SamplingParams) -> dict[str, Any] | None:
    """Fields of `sampling.temperature.Adaptive`, if all slots ask for the same."""
    given = params.adaptive
    if given is None:
        return None
    return {
        "form": np.full(batch, list(FORMS).index(given.form), np.int32),
        "strength": np.full(batch, given.strength, np.float32),
        "forms": (given.form,),
    }


class SlotSettings:
    """What each slot's request asked for.

    A free slot is greedy and asks for nothing, so that it does not keep the others
    from the shortcuts of a batch in which nobody does. Only what makes another program,
    `top`, the forms of `adaptive` and the parts of `text`, stays until the last request
    that asked for such is done: a batch that runs empty compiles nothing anew.

    Args:
      batch: B.
      max_len: tokens of a text, prompt and output together.
      eos_ids: tokens that end a text, unless a request ignores them.
      vocab_size: V.
    """

    def __init__(
        self, batch: int, max_len: int, eos_ids: Sequence[int], vocab_size: int
    ):
        self._max_len = max_len
        self._vocab_size, self._eos_ids = vocab_size, tuple(eos_ids)
        self._params: dict[int, SamplingParams] = {}
        self._top = 0
        self._parts: set[str] = set()
        self._forms: set[str] = set()
        self._words_shape = 0, 0
        self._chains: tuple[tuple[Callable[..., Any], ...], ...] = ()
        bits = batch, -(-vocab_size // 32)
        self._allowed, self._ends = np.full(bits, ALL), np.zeros(bits, np.uint32)
        known = {**_SAMPLING, **_PENALTIES}
        self._defaults = {name: value for name, (_, value) in known.items()}
        self._values = {
            name: np.full(batch, value, dtype) for name, (dtype, value) in known.items()
        }
        self._eos = np.full((batch, max(1, len(self._eos_ids))), -1, np.int32)
        self._want_logprobs = np.zeros(batch, bool)
        self._speculate = np.ones(batch, bool)
        bias = batch, SamplingParams.MAX_LOGIT_BIAS
        self._bias_tokens = np.full(bias, NO_TOKEN)
        self._bias = np.zeros(bias, np.float32)

    def insert(self, slot: int, params: SamplingParams) -> None:
        """A request takes a slot; its bad words are token ids."""
        self._params[slot] = params
        self._note_parts(params)
        for name, values in self._values.items():
            values[slot] = getattr(params, name)
        if not params.ignore_eos and self._eos_ids:
            self._eos[slot] = self._eos_ids
        self._want_logprobs[slot] = params.logprobs is not None or params.ranked
        self._top = max(self._top, self._rounded(params.logprobs or 0))
        self._allowed[slot] = self._allowed_bits(params)
        self._ends[slot] = self._end_bits(params)
        self._speculate[slot] = params.speculate
        if params.adaptive is not None:
            self._forms |= {params.adaptive.form}
        for column, (token, bias) in enumerate(params.logit_bias):
            self._bias_tokens[slot, column] = token
            self._bias[slot, column] = bias

    def clear(self, slot: int) -> None:
        """A slot becomes free."""
        self._params.pop(slot, None)
        if not any(p.penalised or p.min_tokens for p in self._params.values()):
            self._parts, self._words_shape, self._chains = set(), (0, 0), ()
        if not any(p.logprobs for p in self._params.values()):
            self._top = 0
        if not any(p.adaptive_temperature for p in self._params.values()):
            self._forms = set()
        self._allowed[slot] = ALL
        self._ends[slot] = 0
        for name, values in self._values.items():
            values[slot] = self._defaults[name]
        self._eos[slot] = -1
        self._want_logprobs[slot] = False
        self._speculate[slot] = True
        self._bias_tokens[slot] = NO_TOKEN
        self._bias[slot] = 0

    def running(self, slots: Collection[int]) -> SlotSettings:
        """Copies the settings, with all other slots free.

        A text that is still being prefilled does not run: its settings may not keep the
        others from a shortcut either.
        """
        # What requests asked for is the same in the copy.
        copied = copy.deepcopy(self, {id(self._params): dict(self._params)})
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

    @property
    def speculate(self) -> np.ndarray:
        """bool [B]."""
        return self._speculate.copy()

    @property
    def top(self) -> int:
        """Likeliest tokens that are told beside emitted ones: enough for everybody."""
        return self._top

    def prompt_top(self, request: Request) -> int | None:
        """The same of a prompt; None if nothing has to be told of it (any more)."""
        if not request.scoring:
            return None
        return self._rounded(request.params.prompt_logprobs)

    def _rounded(self, count: int) -> int:
        """The next power of two, or V: so that few programs serve many counts."""
        return min(_at_least(count, 8), self._vocab_size) if count else 0

    def sampling(self) -> dict[str, np.ndarray]:
        """Fields of `sampling.policy.Sampling`."""
        return {name: self._values[name].copy() for name in _SAMPLING}

    def adaptive(self) -> dict[str, Any] | None:
        """Fields of `sampling.temperature.Adaptive`; None if nobody asked for it."""
        if not self._forms:
            return None
        batch = len(self._want_logprobs)
        form, strength = np.full(batch, -1, np.int32), np.zeros(batch, np.float32)
        for slot, params in self._params.items():
            given = params.adaptive
            if given is not None:
                form[slot] = list(FORMS).index(given.form)
                strength[slot] = given.strength
        return {"form": form, "strength": strength, "forms": tuple(sorted(self._forms))}

    def text(
        self, texts: Mapping[int, tuple[Sequence[int], Sequence[int]]]
    ) -> dict[str, np.ndarray]:
        """Fields of `sampling.penalties.TextSoFar`, for its `of`.

        Args:
          texts: prompt and output by slot.
        """
        batch = len(self._want_logprobs)
        length = np.zeros(batch, np.int32)
        tokens = np.full((batch, self._max_len), NO_TOKEN)
        prompt_length = np.zeros(batch, np.int32)
        for slot, (prompt, output) in texts.items():
            prompt_length[slot] = len(prompt)
            tokens[slot, : len(prompt)] = prompt
            length[slot] = len(prompt) + len(output)
            tokens[slot, len(prompt) : length[slot]] = output
        return {
            "tokens": tokens,
            "prompt_length": prompt_length,
            "length": length,
            "repeats": self._repeats(),
            "masks": self._masks(),
            "bad_words": self._bad_words(),
            "processors": self._processors(),
        }

    def _allowed_bits(self, params: SamplingParams) -> np.ndarray:
        """uint32 [ceil(V / 32)]: tokens that are not forbidden everywhere."""
        single = [word[0] for word in params.bad_words if len(word) == 1]
        if params.allowed_token_ids is None and not single:
            return np.full(self._allowed.shape[1], ALL)
        allowed = np.full(self._vocab_size, params.allowed_token_ids is None)
        allowed[list(params.allowed_token_ids or ())] = True
        allowed[single] = False
        return _bits(allowed)

    def _end_bits(self, params: SamplingParams) -> np.ndarray:
        """uint32 [ceil(V / 32)]: tokens that end a text which may be too short."""
        if not params.min_tokens:
            return np.zeros_like(self._ends[0])
        ends = np.zeros(self._vocab_size, bool)
        ends[list(params.stop_token_ids)] = True
        ends[list(() if params.ignore_eos else self._eos_ids)] = True
        return _bits(ends)

    def _note_parts(self, params: SamplingParams) -> None:
        """What `text` has to have for a request."""
        if params.repeats:
            self._parts.add("repeats")
        words = [word for word in params.bad_words if len(word) > 1]
        single = len(words) < len(params.bad_words)
        if params.min_tokens or params.allowed_token_ids is not None or single:
            self._parts.add("masks")
        if words:
            count, length = self._words_shape
            count = max(count, _at_least(len(words), 8))
            self._words_shape = count, max(length, _at_least(max(map(len, words)), 4))
        if params.logits_processors:
            chains = *self._chains, params.logits_processors
            self._chains = tuple(dict.fromkeys(chains))

    def _repeats(self) -> dict[str, np.ndarray] | None:
        """Penalties and bias; None if nobody had any, as all of these."""
        if "repeats" not in self._parts:
            return None
        penalties = {
            name.removesuffix("_penalty"): self._values[name].copy()
            for name in _PENALTIES
        }
        return {
            **penalties,
            "bias_tokens": self._bias_tokens.copy(),
            "bias": self._bias.copy(),
        }

    def _masks(self) -> dict[str, np.ndarray] | None:
        """Fields of `sampling.constraints.Masks`."""
        if "masks" not in self._parts:
            return None
        min_tokens = np.zeros(len(self._want_logprobs), np.int32)
        for slot, params in self._params.items():
            min_tokens[slot] = params.min_tokens
        return {
            "allowed": self._allowed.copy(),
            "ends": self._ends.copy(),
            "min_tokens": min_tokens,
        }

    def _bad_words(self) -> dict[str, np.ndarray] | None:
        """Fields of `sampling.constraints.BadWords`.

        Sizes are powers of two, so that few programs serve many lists.
        """
        count, length = self._words_shape
        if not count:
            return None
        batch = len(self._want_logprobs)
        start = np.full((batch, count, length - 1), ANY)
        last = np.full((batch, count), NO_TOKEN)
        for slot, params in self._params.items():
            words = (word for word in params.bad_words if len(word) > 1)
            for number, word in enumerate(words):
                start[slot, number, length - len(word) :] = word[:-1]
                last[slot, number] = word[-1]
        return {"start": start, "last": last}

    def _processors(self) -> dict[str, Any] | None:
        """Fields of `sampling.constraints.Processors`."""
        if not self._chains:
            return None
        which = np.full(len(self._want_logprobs), -1, np.int32)
        for slot, params in self._params.items():
            if params.logits_processors:
                which[slot] = self._chains.index(params.logits_processors)
        return {"which": which, "chains": self._chains}


def _bits(marks: np.ndarray) -> np.ndarray:
    """uint32 [ceil(V / 32)] of bool [V], the lowest bit first."""
    marks = np.pad(marks, (0, -len(marks) % 32), constant_values=marks.all())
    return np.packbits(marks, bitorder="little").view("<u4").astype(np.uint32)


def _at_least(number: int, least: int) -> int:
    """The next power of two, `least` at least."""
    return max(least, 1 << (number - 1).bit_length())
