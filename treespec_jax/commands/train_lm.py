"""Trains a small language model on text files, on whatever machine this is.

For example:

  train_lm --config=configs/train_bundled_target.py --text=stories.txt \\
      --output=runs/target

Stopped in any way, the same command goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from absl.flags import DEFINE_integer, DEFINE_multi_string, DEFINE_string

from treespec_jax.commands import config_file, flags

_TINY = Path(__file__).with_name("train_tiny.py")


def define() -> SimpleNamespace:
    """Defines the flags."""
    return SimpleNamespace(
        config=config_file.define(str(_TINY)),
        text=DEFINE_multi_string(
            "text",
            [],
            "text to train on, in place of the configuration's sources: PATH, "
            "PATH*WEIGHT, or NAME=PATH to clean it as the configuration cleans the "
            "source of that name",
        ),
        vocabulary=DEFINE_string(
            "vocabulary",
            None,
            "sentencepiece .model or checkpoint folder; default: one is trained",
        ),
        teacher=DEFINE_string("teacher", None, "checkpoint to distil from"),
        output=flags.define_output(None),
        steps=DEFINE_integer("steps", None, "optimiser steps of the schedule"),
    )


def main(given: SimpleNamespace) -> None:
    """Runs the command."""
    from treespec_jax.training import command

    holders = dict(vars(given))
    config = holders.pop("config").value
    command.train(config, **{name: holder.value for name, holder in holders.items()})
