"""Flags that several commands have beside those of settings: one name per thing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from absl import flags

from treespec_jax.distributed import Cluster
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
    "verify_lossless": (
        flags.DEFINE_bool,
        False,
        "decode plainly too: count equal tokens, tell near ties from true differences "
        "(exit code 1)",
    ),
    "distributed": (
        flags.DEFINE_bool,
        False,
        "one of several processes that share the devices of --mesh; docs/tpu.md",
    ),
    "coordinator": (
        flags.DEFINE_string,
        None,
        "HOST:PORT of process 0; default: jax finds it, and the next two (Cloud TPU)",
    ),
    "num_processes": (flags.DEFINE_integer, None, "how many processes there are"),
    "process_id": (flags.DEFINE_integer, None, "which this is, from 0"),
    "join_timeout": (flags.DEFINE_integer, 300, "seconds to wait for all processes"),
    "max_batch": (_positive, 8, "texts decoded together"),
    "page_size": (_positive, 128, "cache rows per page"),
    "prefix": (_positive, 2048, "tokens of prefix of each text"),
    "kv_heads": (_positive, 8, "key/value heads"),
    "head_dim": (_positive, 128, "width of a head"),
}


# Those of `cluster`.
CLUSTER = "distributed", "coordinator", "num_processes", "process_id", "join_timeout"


def cluster(given) -> Cluster | None:
    """The processes that `CLUSTER` names; None: this one is alone.

    Raises:
      UserError: flags that do not fit together.
    """
    names = CLUSTER[1:4]
    if given.distributed:
        return Cluster(*(given[name].value for name in names), given.join_timeout)
    for name in names:
        if given[name].value is not None:
            raise UserError(f"--{name} needs --distributed; give both")
    return None


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
