"""Trains a drafter for a target: EAGLE layers, Medusa heads or a small model.

On texts that the target wrote (`generate_answers`), or on plain text:

  train_drafter --method=eagle3 --target=MODEL --data=runs/texts --output=runs/eagle

The target stays as it is. Stopped in any way, the same command goes on where it was.
"""

from __future__ import annotations

from pathlib import Path

from absl.flags import (
    DEFINE_enum,
    DEFINE_float,
    DEFINE_integer,
    DEFINE_multi_string,
    DEFINE_string,
)

from treespec_jax.commands import config_file, flags, runtime
from treespec_jax.training.drafter_settings import METHODS

_USUAL = Path(__file__).with_name("train_drafter_config.py")


def define() -> None:
    config_file.define(str(_USUAL))
    DEFINE_enum("method", None, METHODS, "what drafts; default: the configuration's")
    DEFINE_string("target", None, "checkpoint of the target, a path or a name")
    DEFINE_multi_string("data", [], "folder of generate_answers; repeatable")
    DEFINE_multi_string("text", [], "text file to train on as it is; repeatable")
    DEFINE_integer("steps", None, "optimiser steps of the schedule")
    words = "then the final decay of the schedule begins"
    DEFINE_float("max_minutes", None, words)
    flags.define("compilation_cache", output=None)


def main(given) -> None:
    runtime.set_up(given.compilation_cache)
    from treespec_jax.training import drafter_command

    drafter_command.train(
        given.config,
        method=given.method,
        target=given.target,
        answers=given.data,
        text=given.text,
        steps=given.steps,
        max_minutes=given.max_minutes,
        output=given.output,
    )
