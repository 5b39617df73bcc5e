"""benchmark --verify_lossless: its answers beside those of plain decoding."""

from __future__ import annotations

import json

import pytest

from tests.scripts.fake_llm import FakeLLM
from treespec_jax.checkpoints import load_tokenizer
from treespec_jax.commands import verifying
from treespec_jax.config import SamplingParams
from treespec_jax.measurement import exactness, suite, suite_exactness, suite_run
from treespec_jax.measurement.grid import Combination, Task
from treespec_jax.measurement.journal import FILE, Journal


@pytest.fixture
def strays(fake, monkeypatch):
    """Sampled chains lie at the fourth token, by a gap that is returned by number."""
    gaps = {}

    def one(self, prompt, params):
        made = true(self, prompt, params)
        if self.size == 2 and params.temperature and params.max_tokens == 8:
            made.token_ids[3] = 6
        return made

    def gap(llm, pair, position, tokens):
        assert llm.size == 1 and pair.params.temperature == 1
        assert (position, tokens) == (3, [6, 5])
        gaps.setdefault("asked", []).append((pair.prompt, list(pair.prompt_ids)))
        return gaps["gap"]

    true = FakeLLM._one
    monkeypatch.setattr(FakeLLM, "_one", one)
    monkeypatch.setattr(exactness, "_gap", gap)
    probed = exactness.Probe(2, 1e-6, 0.0, False)
    monkeypatch.setattr(verifying, "probe", lambda llm, target: probed)
    return gaps


def test_answers_are_verified_by_the_plain_ones_of_the_run(bench, strays, fake, files):
    """Also later, of a run that is finished; every difference is told and kept."""
    given = "--rounds=2", "--latency_tokens=0", "--temperatures=0,1"
    strays["gap"] = 5e-5
    told = bench(*given)
    assert told.code == 0 and "### Exactness" not in told.out
    fake.asked.clear()
    told = bench(*given, "--verify_lossless")
    assert told.code == 0 and not fake.asked
    greedy, sampled = (
        line
        for line in told.out.splitlines()
        if line.startswith("| draft_model") and " of " in line
    )
    cells = [
        [cell.strip() for cell in row.split("|")[2:6]] for row in (greedy, sampled)
    ]
    assert cells[0] == ["0", "1", "48 of 48", "0 of 6"]
    assert cells[1] == ["1", "1", "18 of 48", "6 of 6"]
    assert "| 6 | 5.0e-05 | 1.0e-04 |" in " ".join(sampled.split())
    first = "prompt 1, turn 1, round 0, token 3 is 6 with the tree and 5 without"
    assert first in told.out and "a near tie" in told.out
    tokenizer = load_tokenizer(files.tokenizer)
    assert strays["asked"][0] == ("1, turn 1, round 0", tokenizer.encode("the cat"))
    again = bench(*given, "--verify_lossless")
    assert again.out == told.out and len(strays["asked"]) == 6, "all was there"


def test_a_difference_that_is_no_tie_ends_with_code_1(bench, strays, tmp_path):
    strays["gap"] = 0.5
    told = bench("--rounds=1", "--temperatures=0,1", "--verify_lossless")
    assert told.code == 1
    said = [line for line in told.err.splitlines() if "NOT LOSSLESS" in line]
    assert len(said) == 1
    assert said[0].startswith("draft_model chain:1, T=1, batch 1: NOT LOSSLESS: 3 of")
    report = json.loads((tmp_path / "results" / "results.json").read_text())
    greedy, sampled = report["exactness"]
    assert greedy["lossless"] and not sampled["lossless"]
    assert sampled["texts_that_differ"] == sampled["texts"] == 3
    assert (sampled["equal"], sampled["tokens"], sampled["near_ties"]) == (9, 24, 0)
    assert sampled["differences"][0]["gap"] == 0.5
    kept = (tmp_path / "results" / FILE).read_text().splitlines()
    assert [json.loads(line)["kind"] for line in kept[-2:]] == ["exactness"] * 2


def test_turns_behind_a_difference_are_left_out(tmp_path):
    question = suite.Question("7", "a", ("one", "two", "three"))
    chain = Combination("ngram", "chain:2", "exact", 0.0, 1)
    load = suite_run.Workload(
        suite.Suite("s", (question,)),
        SamplingParams(max_tokens=4, seed=3),
        0,
        False,
        lambda text: list(map(ord, text)),
        64,
    )
    journal = Journal(tmp_path, {})
    journal.begin({}, {})
    for combination, second in ((chain.baseline, [3, 4]), (chain, [3, 5])):
        cell = Task(combination, 0, (question,)).cell(question)
        ids, texts = [[1, 2], second, [6]], ["x", "y", "z"]
        journal.add("answer", [(cell, {"token_ids": ids, "texts": texts})])
    first, second = suite_exactness.pairs(chain, load, 1, journal)
    assert (first.tree, first.plain, first.params.seed) == ([1, 2], [1, 2], 3)
    assert (second.tree, second.plain) == ([3, 5], [3, 4])
    assert second.prompt == "7, turn 2, round 0"
    assert second.prompt_ids == list(map(ord, "onex\n\ntwo"))
