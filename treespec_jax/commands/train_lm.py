"""Trains a small language model on text files, on whatever machine this is.

For example:

  train_lm --config=configs/train_bundled_target.py --text=stories.txt \\
      --output=runs/target

Stopped in any way, the same command goes on where it was.
"""

from __future__ import annotations

from pathlib import Path

from absl.flags import DEFINE_integer, DEFINE_multi_string, DEFINE_string

from treespec_jax.commands import config_file, flags

_TINY = Path(__file__).with_name("train_tiny.py")


def define() -> None:
    config_file.define(str(_TINY))
    DEFINE_multi_string(
        "text",
        [],
        "text to train on, in place of the configuration's sources: PATH, "
        "PATH*WEIGHT, or NAME=PATH to clean it as the configuration cleans the "
        "source of that name",
    )
    DEFINE_string(
        "vocabulary",
        None,
        "sentencepiece .model or checkpoint folder; default: one is trained",
    )
    DEFINE_string("teacher", None, "checkpoint to distil from")
    flags.define(output=None)
    DEFINE_integer("steps", None, "optimiser steps of the schedule")


def main(given) -> None:
    from treespec_jax.training import command

    names = ("text", "vocabulary", "teacher", "output", "steps")
    command.train(given.config, **{name: given[name].value for name in names})
