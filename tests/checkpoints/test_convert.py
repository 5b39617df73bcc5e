"""The command line of convert_checkpoint.py."""

import os
import pathlib
import subprocess
import sys

import pytest

from treespec_jax.checkpoints import load, save

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
SCRIPT = ROOT / "scripts" / "convert_checkpoint.py"


def start(*arguments, **options):
    search = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))},
        **options,
    )


def one_line(done, message):
    """Asserts exit code 2 and one line on stderr that holds the message."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not done.stdout


def test_converts(tmp_path):
    done = start(
        SCRIPT,
        f"--input={GOLDEN / 'llama_tied'}",
        f"--output={tmp_path / 'out'}",
        "--dtype=bfloat16",
    )
    assert done.returncode == 0, done.stderr
    assert "parameters in bfloat16, no tokenizer" in done.stdout
    assert "14/14" in done.stderr
    assert "WARNING" not in done.stderr and "note: " not in done.stderr
    assert load(tmp_path / "out").dtype.name == "bfloat16"


def test_says_what_is_left_out(tmp_path):
    folder = GOLDEN / "gemma3_multimodal"
    done = start(SCRIPT, f"--input={folder}", f"--output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert f"note: {folder} also reads images; its text part alone" in done.stderr
    found = load(tmp_path / "out")
    assert found.config == load(folder).config
    assert found.notes == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--input is missing"),
        (["--input=a", "--output=b", "--inptu=c"], "Unknown command line flag 'inptu'"),
        (["--input=a", "--output=b", "--dtype=int8"], "one of <float32|bfloat16|floa"),
        (["--input=a", "--output=b", "c"], "argument 'c' is not a flag"),
        (["--input=/nowhere", "--output=b"], "no checkpoint at /nowhere"),
        (["--input=tests", "--output=LICENSE"], "LICENSE is a file"),
        (["--input=tests", "--output=LICENSE/a"], "choose another"),
        (["--input=tests"], "--output is missing"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    one_line(start(SCRIPT, *arguments, cwd=ROOT), message)


def test_help_is_no_mistake():
    done = start(SCRIPT, "--help")
    assert done.returncode == 0
    assert "--dtype" in done.stdout


def test_damaged_checkpoint_is_one_line(tmp_path):
    save(load(GOLDEN / "llama_tied"), tmp_path / "in")
    (tmp_path / "in" / "params" / "0000" / "_METADATA").unlink()
    done = start(SCRIPT, f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    one_line(done, "params/0000/_METADATA cannot be read (No such file or directory)")
