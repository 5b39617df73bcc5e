"""Every example runs, says what it promises, and is short."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from treespec_jax import LLM, Branch

FOLDER = Path(__file__).resolve().parents[1] / "examples"
PROMPT = "once upon a time"
# Arguments of `main`, and what it prints besides the text.
RUNS = {
    "beams_against_greedy": (["8", "2"], "levels in"),
    "best_of_n": (["8", "2"], "-0."),
    "speculate": (["12"], "accept rate"),
    "tree_of_thought": (["2"], "round 2"),
}


def test_all_are_here_and_short():
    found = {path.stem: path.read_text() for path in FOLDER.glob("*.py")}
    assert set(found) == set(RUNS)
    assert max(len(text.splitlines()) for text in found.values()) < 60


@pytest.mark.parametrize("name", RUNS)
def test_example_runs(name, capsys):
    args, said = RUNS[name]
    runpy.run_path(str(FOLDER / f"{name}.py"))["main"](PROMPT, *args)
    printed = capsys.readouterr().out
    assert said in printed
    if name == "speculate":
        # The text is the target's own, whatever was drafted.
        llm = LLM("tinystories-5m", speculative=None, max_batch=1)
        with Branch.create(llm).prefill(PROMPT) as plain:
            for _ in range(int(args[0])):
                plain.commit(plain.produce().token)
            assert printed.startswith(PROMPT + plain.text)
