"""scripts/generate.py --trace and --show_tree."""

from __future__ import annotations

import json

import pytest

from treespec_jax.commands import runtime
from treespec_jax.tracing import trace

pytestmark = pytest.mark.slow


def test_a_trace_has_the_counts_of_the_report(generate, tmp_path):
    """With a comparison, which is timed without recording."""
    args = ["--prompt=the cat", "--max_tokens=9", "--json", "--compare"]
    report = json.loads(generate(*args, f"--trace={tmp_path / 'run.json'}").out)
    assert report["comparison"]["identical"] and report["reliability"] is None
    (found,) = trace.read(tmp_path / "run.json")
    assert found.stats == report["stats"]
    (completion,) = report["completions"]
    assert found.text == completion["text"] and found.prompt == (("", "the cat"),)
    emitted = [token for step in found.steps for token in step.emitted]
    assert emitted == completion["token_ids"]
    assert found.settings["tree"] == "chain:2"
    assert set(found.parts) == {"draft", "target", "rest"}
    for line in found.replay.values():
        assert sum(count for _, count in line.arrivals) == len(line.pieces) == 9
        assert "".join(line.pieces) == found.text
    assert set(found.replay) == {"tree", "plain"}


def test_trees_in_the_terminal_and_pages(generate, tmp_path):
    page = tmp_path / "run.html"
    args = ["--prompt=the cat", "--max_tokens=5"]
    result = generate(*args, "--show_tree", f"--trace={page}")
    out = result.out
    assert out.startswith("step 1: 2 nodes") and "  drafter " in out
    assert f"trace: {page}" in result.err
    text = json.loads(generate(*args, "--json").out)["completions"][0]["text"]
    assert f"\nthe cat{text}\n" in out
    assert page.read_text().startswith("<!doctype html>")
    (tmp_path / "p.txt").write_text("the cat\na\n")
    prompts = f"--prompts_file={tmp_path / 'p.txt'}"
    several = tmp_path / "two.json"
    args = [prompts, "--max_tokens=3", "--show_tree", f"--trace={several}"]
    assert generate(*args).out.count("step 1: ") == 2
    assert [t.prompt[0][1] for t in trace.read(several)] == ["the cat", "a"]


def test_pictures_that_cannot_be(refuses, monkeypatch):
    monkeypatch.setattr(runtime, "set_up", lambda _: pytest.fail("jax starts"))
    for flags, expected in (
        (["--trace=run.pdf"], "must end in .html"),
        (["--trace=/no/such/run.html"], "no such folder"),
        (["--show_tree", "--json"], "leave out --json"),
    ):
        refuses(expected, "generate.py", "--prompt=a", *flags)
