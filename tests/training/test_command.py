"""scripts/train_lm.py from the command line."""

from __future__ import annotations

import dataclasses
import pathlib
import runpy
import subprocess
import sys

import pytest

from treespec_jax.errors import UserError
from treespec_jax.training import (
    command,
    drafter_command,
    drafter_settings,
    settings,
)

ROOT = pathlib.Path(__file__).parents[2]


def test_flags_over_file():
    config = {
        "data": {"sources": {"a": {"path": "a", "lower": True}}, "seed": 3},
        "optimizer": {"steps": 5},
    }
    found = command.with_flags(
        config, text=["a=x=1.txt", "y.txt*0.5"], output="out", steps=7
    )
    assert found["data"] == {
        "sources": {
            "a": {"path": "x=1.txt", "lower": True},
            "text1": {"path": "y.txt", "weight": 0.5},
        },
        "seed": 3,
    }
    assert found["optimizer"] == {"steps": 7}
    assert found["run"] == {"output": "out"}
    assert config["data"]["sources"]["a"]["path"] == "a"
    with pytest.raises(UserError, match="'lots' is not a weight"):
        command.with_flags(config, text=["y.txt*lots"])


def _script(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "train_lm.py", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--text=none.txt", "--output=OUT"], "cannot read none.txt"),
        (["--config.optimizer.stepz=3"], "stepz"),
    ],
)
def test_mistakes_get_one_line(arguments, words, tmp_path):
    arguments = [a.replace("OUT", str(tmp_path / "run")) for a in arguments]
    done = _script(*arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("train_*.py")))
def test_files_name_every_setting(path):
    """A key that a file lacks cannot be given as --config.KEY either."""
    values = runpy.run_path(str(path))["get_config"]()
    parts = ["data", "optimizer", "run"]
    if "method" in values:
        given = drafter_command.with_flags(values, text=["x"], output="out")
        built, more = drafter_settings.build(given), ["drafter", "objective"]
    else:
        built = settings.build(command.with_flags(values, output="out"))
        more = ["vocabulary", "distill"]
    for part in (*parts, *more):
        fields = dataclasses.fields(getattr(built, part))
        assert {field.name for field in fields} == set(values[part])
