"""Flags that several commands have, whatever their settings."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from treespec_jax.errors import UserError

# --help shows the flags below as those of the command that defines them.
flags.disclaim_key_flags()


def define_output(default: str | None = "", required: bool = False):
    """Defines --output, a folder."""
    return flags.DEFINE_string(
        "output", default, "folder to write to", required=required
    )


def define_prompts_file():
    """Defines --prompts_file for a command whose settings have no such field."""
    words = "a prompt a line, or .jsonl with a prompt (or messages) in each"
    return flags.DEFINE_string("prompts_file", None, words)


def define_compilation_cache():
    """Defines --compilation_cache, as `runtime.set_up` takes it."""
    words = "its folder; default: in the user's cache folder; '' is none"
    return flags.DEFINE_string("compilation_cache", None, words)


def define_page_size(default: int = 128):
    """Defines --page_size for a command without engine settings."""
    return flags.DEFINE_integer("page_size", default, "cache rows per page")


def numbers(name: str, texts: Sequence[str], kind: type = int) -> tuple:
    """The numbers of a flag that takes a list.

    Raises:
      UserError: a text that is no number of that kind.
    """
    try:
        return tuple(kind(text) for text in texts)
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(
            f"--{name}={','.join(texts)}: give {what}, as in 1,16,64"
        ) from None
