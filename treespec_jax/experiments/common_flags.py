"""Flags that several scripts have, and the settings that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from absl import flags

# They are shown by --help as the script's own.
flags.disclaim_key_flags()

# Name: how to define it, default, help, and the dotted name of its setting, if any.
_FLAGS: dict[str, tuple[Callable, Any, str, str | None]] = {
    "target": (
        flags.DEFINE_string,
        None,
        "target's checkpoint; else the bundled one",
        "target",
    ),
    "draft": (flags.DEFINE_string, None, "drafter's checkpoint", "draft"),
    "tokenizer": (
        flags.DEFINE_string,
        None,
        "tokenizer file, if not the own",
        "tokenizer",
    ),
    "rule": (
        flags.DEFINE_string,
        None,
        "exact, token, block, traversal, terminal or (LOSSY) typical",
        "rule",
    ),
    "proposal": (
        flags.DEFINE_string,
        None,
        "shared, sampled, with_replacement, best, best_kept; else as the rule has it",
        "proposal",
    ),
    "cascade": (
        flags.DEFINE_string,
        None,
        "LOSSY: chow, diff, opt, token_v1, token_v2 or token_v3",
        "cascade",
    ),
    "alpha": (flags.DEFINE_float, None, "of the cascade, in [0, 1]", "alpha"),
    "dtype": (flags.DEFINE_string, None, "float32, bfloat16 or float16", "dtype"),
    "max_tokens": (
        flags.DEFINE_integer,
        None,
        "tokens to emit per prompt, at most",
        "sampling.max_tokens",
    ),
    "temperature": (flags.DEFINE_float, None, "0 is greedy", "sampling.temperature"),
    "seed": (
        flags.DEFINE_integer,
        None,
        "of the noise (of the first prompt, where each has its own)",
        "sampling.seed",
    ),
    "max_batch": (
        flags.DEFINE_integer,
        None,
        "texts decoded together",
        "engine.max_batch",
    ),
    "max_len": (
        flags.DEFINE_integer,
        None,
        "tokens per text, prompt included",
        "engine.max_len",
    ),
    "output": (flags.DEFINE_string, "", "folder to write to", None),
    "compilation_cache": (
        flags.DEFINE_string,
        None,
        "its folder; else the user's cache folder; '' is none",
        None,
    ),
}


class Shared:
    """Flags of this module, once the command line is parsed.

    Args:
      holders: by name.
    """

    def __init__(self, holders: dict[str, flags.FlagHolder]):
        self._holders = holders

    def __getitem__(self, name: str) -> Any:
        return self._holders[name].value

    def settings(self) -> dict[str, Any]:
        """By dotted name, as `settings.build` takes them; None is not given."""
        return {
            _FLAGS[name][3]: holder.value
            for name, holder in self._holders.items()
            if _FLAGS[name][3] is not None
        }


def define(*names: str) -> Shared:
    """Defines some of the flags; unknown names are a KeyError."""
    holders = {}
    for name in names:
        how, default, words, _ = _FLAGS[name]
        holders[name] = how(name, default, words)
    return Shared(holders)
