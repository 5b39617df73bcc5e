"""The command line: convert_checkpoint.py and the runner that scripts share."""

import os
import pathlib
import signal
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
    assert "WARNING" not in done.stderr
    assert load(tmp_path / "out").dtype.name == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Flag --input must have a value"),
        (["--input=a", "--output=b", "--inptu=c"], "Unknown command line flag 'inptu'"),
        (["--input=a", "--output=b", "--dtype=int8"], "one of <float32|bfloat16|floa"),
        (["--input=a", "--output=b", "c"], "argument 'c' is not a flag"),
        (["--input=/nowhere", "--output=b"], "no checkpoint at /nowhere"),
        (["--input=tests", "--output=LICENSE"], "LICENSE is a file"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    one_line(start(SCRIPT, *arguments, cwd=ROOT), message)


def test_help_is_no_mistake():
    done = start(SCRIPT, "--help")
    assert done.returncode == 0
    assert "--dtype" in done.stdout


PROGRAM = """
import sys
from absl import flags
from treespec_jax import cli
from treespec_jax.errors import UserError

config = cli.define_config("config", DEFAULT, "settings")

def main(argv):
    BODY

cli.run(main)
"""
CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({"depth": 1, "inner": {"rate": 0.5}})
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "settings.py").write_text(CONFIG)
    (tmp_path / "broken.py").write_text("def (")

    def go(*arguments, body="print(config.value.to_dict())", default=None):
        text = PROGRAM.replace("BODY", body)
        (tmp_path / "program.py").write_text(text.replace("DEFAULT", repr(default)))
        return start("program.py", *arguments, cwd=tmp_path)

    return go


def test_runner_reads_configurations(program):
    done = program("--config=settings.py", "--config.inner.rate=2")
    assert done.stdout == "{'depth': 1, 'inner': {'rate': 2.0}}\n"
    assert done.returncode == 0


@pytest.mark.parametrize("default", [None, "settings.py"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nowhere.py"], "--config=nowhere.py is not a file"),
        (["--config=broken.py"], "configuration: invalid syntax"),
        (["--config=settings.py", "--config.dept=2"], "has no key 'dept'"),
        (["--config=settings.py", "--config.inner.x=2"], "has no key 'x'"),
        (["--config=settings.py", "--config.depth=deep"], "--config.depth=deep"),
    ],
)
def test_runner_explains_configurations(program, default, arguments, message):
    one_line(program(*arguments, default=default), message)


def test_damaged_checkpoint_is_one_line(tmp_path):
    save(load(GOLDEN / "llama_tied"), tmp_path / "in")
    (tmp_path / "in" / "params" / "_METADATA").unlink()
    done = start(SCRIPT, f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    one_line(done, "params/_METADATA cannot be read (No such file or directory)")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise UserError('a\\n  b')", "a b"),
        ("open('/nowhere/x', 'w')", "/nowhere/x: No such file or directory"),
    ],
)
def test_runner_explains_mistakes(program, body, message):
    one_line(program(body=body), message)


@pytest.mark.parametrize("body", ["1 / 0", "raise ValueError('x')", "raise OSError(5)"])
def test_runner_keeps_the_traceback_of_a_bug(program, body):
    done = program(body=body)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_runner_ends_an_interruption_quietly(program):
    done = program(body=f"import os; os.kill(os.getpid(), {int(signal.SIGINT)})")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_runner_passes_the_exit_code_on(program):
    assert program(body="return 3").returncode == 3


def test_runner_is_quiet_when_its_reader_leaves(tmp_path, program):
    program(body="[print('x' * 1000) for _ in range(1000)]")
    command = f"{sys.executable} program.py | head -n 1 > /dev/null"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
