"""scripts/generate.py as a process: exit codes, interrupts, and what it imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.scripts.support import SCRIPTS

pytestmark = pytest.mark.slow


def _run(*args: str):
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "generate.py"), *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)},
    )


def test_own_process_answers_a_bad_flag(files):
    result = _run(f"--target={files.target}", "--prompt=a", "--tree=regular:0")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_own_process_generates(run_script, files, compilation_cache):
    args = [f"--target={files.target}", "--tree=none", "--prompt=a", "--max_len=64"]
    args += ["--max_tokens=3", "--ignore_eos", "--json"]
    here = run_script("generate.py", *args)
    result = _run(*args, f"--compilation_cache={compilation_cache}")
    assert result.returncode == 0, result.stderr
    # A machine that takes long says so.
    assert result.stderr.replace("compiling (kept for next time) …\n", "") == ""
    ours, theirs = json.loads(here.out), json.loads(result.stdout)
    assert theirs["completions"][0]["token_ids"] == ours["completions"][0]["token_ids"]


# A program started in the background inherits that it ignores interrupts.
HEEDING_INTERRUPTS = [
    sys.executable,
    "-c",
    "import os, signal, sys\n"
    "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
]


def test_interruption_ends_the_text(files, compilation_cache):
    args = [f"--target={files.target}", "--tree=none", "--prompt=a", "--ignore_eos"]
    args += ["--max_tokens=200", f"--compilation_cache={compilation_cache}", "--quiet"]
    with subprocess.Popen(
        [*HEEDING_INTERRUPTS, str(SCRIPTS / "generate.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)},
    ) as process:
        process.stdout.read(3)  # the prompt and a piece of its continuation
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == b"interrupted\n"
    assert out.endswith(b"\n") and b"tokens per step" not in out


def test_flags_are_checked_before_jax_starts():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['generate.py', '--prompt=a', '--max_tokens=0']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPTS / 'generate.py')!r}, run_name='__main__')\n"
        "except SystemExit as e:\n"
        "    print(e.code, 'jax' in sys.modules, 'flax' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)},
    )
    assert result.stdout.split() == ["2", "False", "False"], result.stderr
