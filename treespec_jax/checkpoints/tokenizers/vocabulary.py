"""Whether a tokenizer fits a model, and two models fit each other."""

from __future__ import annotations

import hashlib
from typing import Protocol

from treespec_jax.checkpoints.tokenizers.base import Tokenizer
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError

# Embeddings are padded to round numbers, by well below a tenth of a real vocabulary.
_PADDING, _ROUND = 0.25, 128


def check_rows(tokenizer: Tokenizer, rows: int, chosen: bool = False) -> str | None:
    """Checks that a tokenizer and an embedding belong together.

    Rows past the tokenizer are padding if they are at most a quarter of its pieces, or
    round their number up to a multiple of 128. Pieces past the embedding are harmless
    only if they were added to a finished vocabulary: such a token cannot be used.

    Args:
      tokenizer: of the model.
      rows: V, of the model's embedding.
      chosen: whether a user named it, now or when the checkpoint was written, so that a
        small one is meant.

    Returns:
      what to know of a difference that does no harm, or None.

    Raises:
      UserError: more pieces than rows, or far fewer.
    """
    pieces = tokenizer.vocab_size
    if pieces == rows:
        return None
    counts = f"{tokenizer.source} has {pieces} pieces, the model {rows} embeddings"
    if pieces > rows:
        if tokenizer.core_size <= rows:
            return (
                f"{counts}: the added tokens from {tokenizer.piece(rows)!r} on cannot "
                "be used"
            )
        raise UserError(f"{counts}; give the tokenizer that belongs to it")
    padded = max(pieces * (1 + _PADDING), -(-pieces // _ROUND) * _ROUND)
    if rows > padded and not chosen:
        raise UserError(
            f"{counts}, more than padding explains; give the tokenizer that belongs to "
            "it, or name this one with --tokenizer"
        )
    return f"{counts}: the last {rows - pieces} are padding and stand for no text"


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 in hex of all spellings: equal for equal vocabularies, in any format."""
    digest = hashlib.sha256()
    for token in range(tokenizer.vocab_size):
        digest.update(tokenizer.piece(token).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def compare_vocabularies(target: Tokenizer, drafter: Tokenizer) -> str | None:
    """Compares two tokenizers token by token; one may go on where the other ends.

    Returns:
      which one does, or None if they are the same.

    Raises:
      UserError: names the first token that differs.
    """
    shared = min(target.vocab_size, drafter.vocab_size)
    for token in range(shared):
        ours, theirs = target.piece(token), drafter.piece(token)
        if ours != theirs:
            raise UserError(
                f"target and drafter have different vocabularies: token {token} is "
                f"{ours!r} in the target and {theirs!r} in the drafter; speculation "
                "needs two models over one vocabulary"
            )
    if target.vocab_size > shared:
        return (
            f"the drafter's vocabulary is the first {shared} of the target's "
            f"{target.vocab_size} tokens; it never proposes the others"
        )
    if drafter.vocab_size > shared:
        return (
            f"the target's vocabulary is the first {shared} of the drafter's "
            f"{drafter.vocab_size} tokens; the others are never accepted"
        )
    return None


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
    if draft is not None and not isinstance(draft.config, ModelConfig):
        # It reads the target's rows, and was compared when it was described.
        draft = None
    models = [target] if draft is None else [target, draft]
    # The tokenizers are read by now, so that small ones were meant.
    notes = [
        check_rows(model.tokenizer, model.config.vocab_size, chosen=True)
        for model in models
        if model.tokenizer is not None
    ]
    sizes = [model.config.vocab_size for model in models]
    if draft is not None and target.tokenizer and draft.tokenizer:
        notes.append(compare_vocabularies(target.tokenizer, draft.tokenizer))
    elif len(set(sizes)) > 1:
        raise UserError(
            f"the drafter has {sizes[1]} tokens, the target {sizes[0]}, and without "
            "the tokenizers of both nobody knows whether they mean the same; put them "
            "beside the weights"
        )
    return list(dict.fromkeys(filter(None, notes)))
