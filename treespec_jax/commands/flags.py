"""Flags that several commands have beside those of settings: one name per thing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from absl import flags

from treespec_jax.errors import UserError

# --help shows the flags below as those of the command that defines them.
flags.disclaim_key_flags()

_positive = functools.partial(flags.DEFINE_integer, lower_bound=1)
# How to define a flag, its default and its help.
_SHARED = {
    "output": (flags.DEFINE_string, "", "folder to write to"),
    "prompts_file": (
        flags.DEFINE_string,
        None,
        "a prompt a line, or .jsonl with a prompt (or messages) in each",
    ),
    "compilation_cache": (
        flags.DEFINE_string,
        None,
        "its folder; default: in the user's cache folder; '' is none",
    ),
    "max_batch": (_positive, 8, "texts decoded together"),
    "page_size": (_positive, 128, "cache rows per page"),
    "prefix": (_positive, 2048, "tokens of prefix of each text"),
    "kv_heads": (_positive, 8, "key/value heads"),
    "head_dim": (_positive, 128, "width of a head"),
}


def define(*names: str, **defaults: Any) -> None:
    """Defines some of the flags above, or those named here with another default."""
    for name in (*names, *defaults):
        how, default, words = _SHARED[name]
        how(name, defaults.get(name, default), words)


def numbers(name: str, texts: Sequence[str], kind: type = int) -> tuple:
    """The numbers of a flag that takes a list.

    Raises:
      UserError: a text that is no number of that kind.
    """
    try:
        return tuple(kind(text) for text in texts)
    except ValueError:
        want = "whole numbers" if kind is int else "numbers"
        message = f"--{name}={','.join(texts)}: give {want}, as in 1,16,64"
        raise UserError(message) from None
