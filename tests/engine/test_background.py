"""Programs that are compiled in a thread: no thread outlives its process badly."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from treespec_jax.engine.background import Background, compiling

# A job that takes a while without Python's lock, as XLA does, and ends in Python.
JOB = """
import signal, sys, time
# As in a terminal, also where the tests run behind a shell that ignores Control-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
from treespec_jax import cli
from treespec_jax.engine.background import Background
background = Background()
def job():
    for _ in range({seconds} * 100):
        time.sleep(0.01)
    print("compiled", flush=True)
# Before the job, which else would have ended when it comes about.
import jax
background.start("program", job)
print("begun", flush=True)
"""


def python(code: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_one_program_at_a_time():
    background, go = Background(), threading.Event()
    background.start("first", go.wait)
    background.start("second", go.wait)
    assert background.busy and compiling() and not background.done
    go.set()
    background.wait()
    assert not background.busy and background.done == {"first"}


def test_a_program_that_cannot_be_compiled_is_named():
    def fail():
        raise RuntimeError("no room\nfor it")

    background = Background()
    with pytest.warns(RuntimeWarning, match="is not used: no room$"):
        background.start("program", fail)
        background.wait()
    assert background.failed == {"program"} and not background.done


def test_a_process_that_ends_waits():
    process = python(JOB.format(seconds=1))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.split() == ["begun", "compiled"]


@pytest.mark.parametrize(("end", "code"), [("main(['x'])", 3), ("interrupt()", 130)])
def test_a_command_that_ends_does_not_wait(end, code):
    """Nor one that is interrupted."""
    body = """
def main(argv):
    sys.exit(3)
def wait(argv):
    print("waiting", flush=True)
    time.sleep(600)
def interrupt():
    cli.run(wait, ["x"])
with cli.ending(True):
    """
    process = python(JOB.format(seconds=600) + body + end)
    assert process.stdout.readline() == "begun\n"
    if code == 130:
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert (out, err) == ("", "interrupted\n" if code == 130 else "")


@pytest.mark.parametrize(("kept", "code"), [(True, 0), (False, 0), (True, 3)])
def test_a_first_program_is_kept_for_next_time(tmp_path, kept, code):
    """If there is a place on disk for it, and the command did its work."""
    body = f"""
jax.config.update("jax_compilation_cache_dir", {str(tmp_path) if kept else ""!r})
with cli.ending(True):
    sys.exit({code})
"""
    seconds = 1 if kept and not code else 600
    out, err = python(JOB.format(seconds=seconds) + body).communicate(timeout=60)
    assert ("compiled" in out) == ("Ctrl-C ends this" in err) == (seconds == 1)
