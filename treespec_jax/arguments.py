"""What users pass to `LLM` in one form; anything else is refused in one line."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from treespec_jax.checkpoints.tokenizers import Tokenizer, spellings
from treespec_jax.checks import check_text, from_mapping, shown
from treespec_jax.config import SamplingParams
from treespec_jax.errors import UserError

# Keys of vLLM's prompts.
_TEXT, _IDS = "prompt", "prompt_token_ids"
_LISTS = "a text, texts, or lists of token ids"


def as_prompts(given: Any) -> list[str | list[int]]:
    """The prompts of one call.

    Args:
      given: one prompt or several, each as `as_prompt` takes it.

    Raises:
      UserError: anything else; names it.
    """
    if isinstance(given, (str, Mapping)):
        given = [given]
    prompts = _listed(given, f"prompts must be {_LISTS}")
    if prompts and all(_is_int(prompt) for prompt in prompts):
        prompts = [prompts]
    return [as_prompt(prompt) for prompt in prompts]


def as_prompt(prompt: Any) -> str | list[int]:
    """A text, or token ids.

    Args:
      prompt: one of them, the ids of any integer type; or one in a dictionary, as vLLM
        takes it: {"prompt": …} or {"prompt_token_ids": …}, of which the ids win.

    Raises:
      UserError: anything else; names it.
    """
    if isinstance(prompt, Mapping):
        return _of_mapping(prompt)
    if isinstance(prompt, str):
        check_text("the prompt", prompt)
        return prompt
    problem = "a prompt must be text or token ids"
    tokens = _listed(prompt, problem)
    if not all(_is_int(token) for token in tokens):
        raise UserError(f"{problem}, got {shown(prompt)}")
    return [operator.index(token) for token in tokens]


def as_params(given: Any) -> SamplingParams:
    """Sampling parameters.

    Args:
      given: `SamplingParams`, a mapping of its fields, or None for the defaults.

    Raises:
      UserError: an unknown field, a bad value, or anything else; names it.
    """
    if given is None:
        return SamplingParams()
    if isinstance(given, Mapping):
        return from_mapping(SamplingParams, given, "params")
    if not isinstance(given, SamplingParams):
        raise UserError(
            f"params must be SamplingParams or its fields, got {shown(given)}"
        )
    return given


def single_params(given: Any, what: str) -> SamplingParams:
    """Sampling parameters of one text, as `as_params` takes them.

    Args:
      given: by the user.
      what: the text, for messages.

    Raises:
      UserError: they ask for several texts; and as `as_params`.
    """
    params = as_params(given)
    if params.samples > 1:
        raise UserError(
            f"{what} is one text, and n={params.n}, best_of={params.best_of} are for "
            "several; leave them out"
        )
    return params


def each_params(given: Any, count: int, what: str) -> list[SamplingParams]:
    """Sampling parameters for each of `count` prompts.

    Args:
      given: one for each, as they are; or one for all, as `as_params` takes it: the
        first prompt's, whose seed the others go on from (`SamplingParams.for_text`), so
        that equal prompts get texts of their own.
      what: the prompts, for messages.

    Raises:
      UserError: another number of them; and as `as_params`.
    """
    if given is None or isinstance(given, (Mapping, SamplingParams)):
        params = as_params(given)
        return [params.for_text(index * params.samples) for index in range(count)]
    params = [as_params(one) for one in _listed(given, "params must be SamplingParams")]
    if len(params) != count:
        raise UserError(
            f"{count} {what} but {len(params)} sampling parameters; give one for all "
            "or one for each"
        )
    return params


def with_token_ids(
    params: SamplingParams, tokenizer: Tokenizer | None
) -> SamplingParams:
    """The same, its bad words as token ids.

    Raises:
      UserError: a text among them without a tokenizer, or that it has no token for.
    """
    words: list[tuple[int, ...]] = []
    for word in params.bad_words:
        if not isinstance(word, str):
            words.append(word)
        elif tokenizer is None:
            raise UserError(
                f"bad_words: {word!r} needs a tokenizer, and the checkpoint has none; "
                "give its token ids"
            )
        else:
            words += spellings(tokenizer, word)
    return dataclasses.replace(params, bad_words=tuple(dict.fromkeys(words)))


def _of_mapping(prompt: Mapping[str, Any]) -> str | list[int]:
    given = {key: value for key, value in prompt.items() if value is not None}
    more = [key for key in given if key not in (_TEXT, _IDS)]
    if more or not given:
        hint = "; messages go to chat" if "role" in given else ""
        raise UserError(
            f"a prompt that is a dictionary holds {_TEXT!r} or {_IDS!r} and nothing "
            f"else, got {shown(dict(prompt))}{hint}"
        )
    text, ids = given.get(_TEXT), given.get(_IDS)
    if text is not None and not isinstance(text, str):
        raise UserError(f"{_TEXT!r} must be a text, got {shown(text)}")
    if isinstance(ids, (str, Mapping)):
        raise UserError(f"{_IDS!r} must be token ids, got {shown(ids)}")
    return as_prompt(text if ids is None else ids)


def _listed(given: Any, problem: str) -> list[Any]:
    """The items of a list or array. Raises UserError, which begins with `problem`."""
    try:
        if isinstance(given, (str, bytes, bytearray, memoryview, Mapping)):
            raise TypeError
        if not isinstance(given, Iterable):
            raise TypeError
        return list(given)
    except TypeError:
        raise UserError(f"{problem}, got {shown(given)}") from None


def _is_int(value: Any) -> bool:
    """Whether a value is a whole number of any type, numpy's for example."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)
