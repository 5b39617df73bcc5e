"""cli.run: exit codes and single lines, whatever goes wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from treespec_jax import cli
from treespec_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def raising(error):
    def main(_):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UserError("tree 'x'\nis malformed"), 2, "error: tree 'x' is malformed\n"),
        (FileNotFoundError(2, "no such file", "a/b"), 2, "a/b: no such file"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(capsys, error, code, expected):
    with pytest.raises(SystemExit) as caught:
        cli.run(raising(error), ["program"])
    printed = capsys.readouterr()
    assert caught.value.code == code
    assert expected in printed.err and printed.err.count("\n") == 1
    assert printed.out == ""


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(raising(ZeroDivisionError()), ["program"])
    with pytest.raises(OSError, match="of a library"):
        cli.run(raising(OSError("of a library")), ["program"])


def python(code: str, output) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("size", [10, 1 << 17])
def test_full_disk(size):
    code = (
        "from treespec_jax import cli\n"
        f"cli.run(lambda _: print('x' * {size}), ['program'])"
    )
    with open("/dev/full", "w") as full:
        result = python(code, full)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert os.strerror(errno.ENOSPC) in result.stderr


def test_reader_that_left():
    code = (
        "from treespec_jax import cli\n"
        "cli.run(lambda _: print('x' * (1 << 17)), ['program'])"
    )
    read, write = os.pipe()
    os.close(read)
    result = python(code, write)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({"size": 1})
"""


def test_default_configuration_and_scripts_in_turn(tmp_path):
    """Two scripts in one process, each with a --config of its own."""
    (tmp_path / "one.py").write_text(CONFIG)
    (tmp_path / "two.py").write_text(CONFIG.replace("size", "width"))
    code = f"""
import sys
from absl import flags
from treespec_jax import cli
from treespec_jax.commands import config_file

def script(default, *argv):
    sys.argv = ["program", *argv]
    config = config_file.define(default)
    try:
        cli.run(lambda _: print(config.value.to_dict()))
    except SystemExit as end:
        print(end.code)
    for name in [n for n in flags.FLAGS if n.startswith("config")]:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()

script({str(tmp_path / "one.py")!r}, "--config.size=3")
script({str(tmp_path / "one.py")!r}, "--config={tmp_path / "two.py"}")
script(None, "--config={tmp_path / "two.py"}", "--config.width=5")
"""
    result = python(code, subprocess.PIPE)
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "{'size': 3}",
        "None",
        "{'width': 1}",
        "None",
        "{'width': 5}",
        "None",
    ]


@pytest.mark.parametrize("override", [[], ["--config.speculative.tree=none"]])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, "cannot be read"),
        ("def get_config():\n    return 3\n", "must return a ConfigDict, not 3"),
        ("def get_config():\n    pass\n", "must return a ConfigDict, not None"),
        ("def get_config():\n    raise ValueError('odd')\n", "ValueError: odd"),
        ("def get_config():\n    open('gone')\n", "gone: No such file"),
        ("import gone\n", "No module named 'gone'"),
        ("gone = 1\n", "no attribute get_config"),
        ("def get_config(:\n", "invalid syntax"),
    ],
)
def test_bad_configuration_files(refuses, tmp_path, source, expected, override):
    path = tmp_path / "settings.py"
    if source is not None:
        path.write_text(source)
    refuses(expected, "generate.py", "--prompt=a", f"--config={path}", *override)


def test_overrides_that_do_not_fit(refuses, tmp_path):
    path = tmp_path / "settings.py"
    path.write_text(
        "from treespec_jax.commands.settings import default_config as get_config\n"
    )
    given = ["generate.py", "--prompt=a", f"--config={path}"]
    refuses('Did you mean "tree"', *given, "--config.speculative.trea=none")
    refuses("few", *given, "--config.sampling.max_tokens=few")
    refuses(
        "--config=FILE", "generate.py", "--prompt=a", "--config.speculative.tree=none"
    )
    path.write_text(
        path.read_text()
        + "def get_config(base=get_config):\n"
        + "    config = base()\n"
        + "    config.speculative.trea = 'none'\n    return config\n"
    )
    refuses('Key "trea" does not exist', *given)


def test_interruption_and_exit_codes_of_a_process():
    # A program started in the background inherits that it ignores interrupts.
    code = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from treespec_jax import cli\ncli.run(lambda _: BODY, ['program'])"
    )
    kill = f"__import__('os').kill(__import__('os').getpid(), {int(signal.SIGINT)})"
    result = python(code.replace("BODY", kill), subprocess.PIPE)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")
    assert python(code.replace("BODY", "3"), subprocess.PIPE).returncode == 3
    result = python(code.replace("BODY", "1 / 0"), subprocess.PIPE)
    assert result.returncode == 1 and "Traceback" in result.stderr
