"""Ctrl-C while a command starts, and in a conversation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.scripts.support import SCRIPTS
from treespec_jax.commands import dialogue

# An interrupt while a module is imported, by code that swallows every exception.
INTERRUPTED = """
import os, runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(self, name, *_):
        if name == "{module}":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except BaseException:
                pass
sys.meta_path.insert(0, Finder())
sys.argv = ["generate.py", "--prompt=a", "--tree=none", "--max_tokens=1"]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    "module", ["absl", "treespec_jax.commands.generate", "jax", "treespec_jax.llm"]
)
def test_an_interrupt_of_an_import_is_never_swallowed(module):
    code = INTERRUPTED.format(module=module, script=str(SCRIPTS / "generate.py"))
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)},
    )
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


class Terminal:
    """Somebody who types some lines; an exception among them is raised."""

    def __init__(self, monkeypatch, lines):
        self._lines = iter(lines)
        monkeypatch.setattr("sys.stdin", self)
        monkeypatch.setattr("sys.stdout", self)
        monkeypatch.setattr("builtins.input", self.input)

    def isatty(self):
        return True

    def write(self, text):
        pass

    def flush(self):
        pass

    def input(self, _):
        line = next(self._lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line


def test_an_interrupt_ends_a_line_and_two_the_conversation(monkeypatch):
    stop = KeyboardInterrupt()
    Terminal(monkeypatch, ["a", stop, "b", stop, stop, "never"])

    def answer(messages, talks):
        assert talks
        if messages[-1]["content"] == "a":
            return None  # interrupted before its first word
        return SimpleNamespace(text="so")

    asked, answers = dialogue.hold(answer, [])
    assert [m[-1]["content"] for m in asked] == ["b"] and len(answers) == 1
    assert len(asked[0]) == 1, "what was not answered is forgotten"


def test_sigint_is_restored_after_the_start(monkeypatch):
    from treespec_jax import interrupts

    before = signal.getsignal(signal.SIGINT)
    for handler in (signal.SIG_IGN, signal.default_int_handler):
        signal.signal(signal.SIGINT, handler)
        try:
            with interrupts.ends_at_once():
                ignored = handler is signal.SIG_IGN
                assert (signal.getsignal(signal.SIGINT) is handler) == ignored
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, before)
