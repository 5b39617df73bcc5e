"""Whether two checkpoints are models of one vocabulary; free of jax."""

from __future__ import annotations

from typing import Protocol

from treespec_jax.checkpoints.tokenizers import (
    Tokenizer,
    check_rows,
    compare_vocabularies,
)
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError


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
