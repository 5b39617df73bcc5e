"""Trains a small language model on text files, on whatever machine this is.

  python scripts/train_lm.py --config=configs/train_bundled_target.py \\
      --text=stories.txt --output=runs/target

Stopped in any way, the same command goes on where it was.
"""

import pathlib

from absl import flags

from treespec_jax import cli
from treespec_jax.training import command

_TINY = pathlib.Path(__file__).parents[1] / "configs" / "train_tiny.py"
_CONFIG = cli.define_config(str(_TINY))
_TEXT = flags.DEFINE_multi_string(
    "text",
    [],
    "Text to train on, in place of the configuration's sources: PATH, PATH*WEIGHT, or "
    "NAME=PATH to clean it as the configuration cleans the source of that name",
)
_VOCABULARY = flags.DEFINE_string(
    "vocabulary", None, "Sentencepiece .model or checkpoint folder; else one is trained"
)
_TEACHER = flags.DEFINE_string("teacher", None, "Checkpoint to distil from")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the run")
_STEPS = flags.DEFINE_integer("steps", None, "Optimiser steps of the schedule")


def main(_):
    command.train(
        _CONFIG.value,
        text=_TEXT.value,
        vocabulary=_VOCABULARY.value,
        teacher=_TEACHER.value,
        output=_OUTPUT.value,
        steps=_STEPS.value,
    )


if __name__ == "__main__":
    cli.run(main)
