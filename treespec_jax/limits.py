"""What must hold of models and requests, checked before weights are read; no jax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from treespec_jax.checkpoints.tokenizers import Tokenizer, same_vocabulary
from treespec_jax.config import ModelConfig
from treespec_jax.errors import UserError

# Length of a slot unless asked for: longer ones take memory that few texts use.
DEFAULT_MAX_LEN = 4096


class Model(Protocol):
    """A described or a loaded checkpoint."""

    config: ModelConfig
    tokenizer: Tokenizer | None


def check_pair(target: Model, draft: Model) -> None:
    """Raises UserError unless both models mean the same by every token."""
    sizes = target.config.vocab_size, draft.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"the drafter has {sizes[1]} tokens, the target {sizes[0]}; they must "
            "share one vocabulary"
        )
    if target.tokenizer is not None and draft.tokenizer is not None:
        same_vocabulary(target.tokenizer, draft.tokenizer)


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


def check_prompt(ids: Sequence[int], max_len: int) -> None:
    """Raises UserError: no token, or no room for a new one."""
    if not ids:
        raise UserError("the prompt is empty; give at least one token")
    if len(ids) >= max_len:
        raise UserError(
            f"the prompt has {len(ids)} tokens, max_len is {max_len}; shorten it or "
            "raise max_len"
        )
