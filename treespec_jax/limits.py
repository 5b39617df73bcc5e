"""What must hold of models and requests, checked before weights are read; no jax."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from treespec_jax.checkpoints.tokenizers import (
    Tokenizer,
    check_rows,
    compare_vocabularies,
)
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError

# Length of a slot unless asked for: longer ones take memory that few texts use.
DEFAULT_MAX_LEN = 4096


class Model(Protocol):
    """A described or a loaded checkpoint."""

    config: ModelConfig
    tokenizer: Tokenizer | None


def check_pair(target: Model, draft: Model | None) -> list[str]:
    """What to know of vocabularies that differ without harm (docs/models.md).

    Whatever the drafter lacks or has besides, the text is the target's own.

    Args:
      target: any model.
      draft: of the same tokens, as far as both have them; None: plain decoding.

    Raises:
      UserError: a token means something else to the drafter, or embeddings of
        different sizes come without tokenizers to compare.
    """
    models = {"target": target} | ({} if draft is None else {"drafter": draft})
    notes = []
    for model in models.values():
        if model.tokenizer is not None:
            # Read by now, so that a small one was meant.
            rows = model.config.vocab_size
            notes.append(check_rows(model.tokenizer, rows, chosen=True))
    if draft is not None:
        notes += [_compare(target, draft)]
    return list(dict.fromkeys(note for note in notes if note))


def _compare(target: Model, draft: Model) -> str | None:
    if target.tokenizer is not None and draft.tokenizer is not None:
        return compare_vocabularies(target.tokenizer, draft.tokenizer)
    sizes = target.config.vocab_size, draft.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"the drafter has {sizes[1]} tokens, the target {sizes[0]}, and without "
            "the tokenizers of both nobody knows whether they mean the same; put them "
            "beside the weights"
        )
    return None


def text_length(max_len: int | None, target: Model, draft: Model | None) -> int:
    """Tokens per slot: `max_len`, or what the models can do.

    Raises:
      UserError: more than the positions of either model.
    """
    models = {"target": target} | ({} if draft is None else {"drafter": draft})
    name = min(models, key=lambda n: models[n].config.max_positions)
    longest = models[name].config.max_positions
    if max_len is None:
        return min(longest, DEFAULT_MAX_LEN)
    if max_len > longest:
        raise UserError(
            f"max_len={max_len} is past the {name}'s {longest} positions; lower it"
        )
    return max_len


def check_tree(depth: int, max_len: int) -> None:
    """Raises UserError if a tree of this depth can never be accepted whole."""
    if depth >= max_len:
        raise UserError(
            f"a tree of depth {depth} does not fit max_len={max_len}; take a "
            "shallower one or raise max_len"
        )


def check_tokens(ids: Iterable[int], vocab_size: int) -> None:
    """Raises UserError: a token without a row in the embedding."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UserError(
                f"token id {token} is outside the vocabulary of {vocab_size}; leave it "
                "out of the prompt"
            )


def check_bias(bias: Iterable[tuple[int, float]], vocab_size: int) -> None:
    """Raises UserError: a logit bias for a token that the model lacks."""
    for token, _ in bias:
        if token >= vocab_size:
            raise UserError(
                f"logit_bias: token id {token} is outside the vocabulary of "
                f"{vocab_size}; leave it out"
            )


def check_prompt(ids: Sequence[int], max_len: int) -> None:
    """Raises UserError: no token, or no room for a new one."""
    if not ids:
        raise UserError("the prompt is empty; give at least one token")
    if len(ids) >= max_len:
        raise UserError(
            f"the prompt has {len(ids)} tokens, max_len is {max_len}; shorten it or "
            "raise max_len"
        )
