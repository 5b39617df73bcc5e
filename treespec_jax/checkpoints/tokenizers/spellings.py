"""The tokens in which a word may come about in a text."""

from __future__ import annotations

from treespec_jax.checkpoints.tokenizers.base import Tokenizer
from treespec_jax.errors import UserError


def spellings(tokenizer: Tokenizer, word: str) -> tuple[tuple[int, ...], ...]:
    """Token ids of a word at the start of a text, behind a space, and behind a line.

    What ends with another one of them is left out: who forbids the shorter one forbids
    it too. A word that is split otherwise, as part of a longer one, is not among them.

    Raises:
      UserError: the tokenizer has no token for the word.
    """
    bare = word.lstrip(" ") or word
    found = []
    for front, behind in (("", bare), ("", f" {bare}"), ("\n", bare)):
        head = tokenizer.encode(front, add_bos=False) if front else []
        ids = tokenizer.encode(front + behind, add_bos=False)
        if ids[: len(head)] == head:
            found.append(tuple(ids[len(head) :]))
    found = sorted({ids for ids in found if ids}, key=lambda ids: (len(ids), ids))
    if not found:
        raise UserError(f"bad_words: the tokenizer has no token for {word!r}")
    return tuple(
        ids
        for number, ids in enumerate(found)
        if not any(ids[-len(short) :] == short for short in found[:number])
    )
