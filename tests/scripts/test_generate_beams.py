"""generate --beams: texts with their scores, and the check against plain search."""

from __future__ import annotations

import dataclasses
import json

import pytest

from treespec_jax import LLM
from treespec_jax.config import SamplingParams
from treespec_jax.measurement import exactness

ARGS = ("--prompt=a cat", "--beams=2", "--n_best=2", "--max_tokens=6", "--max_len=32")


@pytest.mark.slow
def test_beams_are_verified_by_the_search_without_trees(generate, monkeypatch):
    """Each rank with its own; the flag changes no text."""
    plainly = generate(*ARGS)
    asked = []
    true = LLM.beam_search

    def search(llm, *given, **fields):
        asked.append(llm.engine.speculation.depth)
        return true(llm, *given, **fields)

    monkeypatch.setattr(LLM, "beam_search", search)
    result = generate(*ARGS, "--verify_lossless")
    assert result.out == plainly.out and len(result.out.splitlines()) == 2
    assert asked == [2, 0]
    last = result.err.splitlines()[-1]
    assert last == "Lossless: 12 of 12 tokens equal plain decoding; near ties: 0."
    report = json.loads(generate(*ARGS, "--verify_lossless", "--json").out)
    assert report["exactness"]["texts"] == 2 and report["exactness"]["lossless"]


@pytest.mark.slow
def test_another_text_than_the_plain_search_finds_is_code_1(
    run_script, files, monkeypatch
):
    def search(llm, *given, **fields):
        found = true(llm, *given, **fields)
        if not llm.engine.speculation.depth:
            first, _ = found[0].texts
            ids = [*first.token_ids[:3], 9]
            found[0].texts[0] = dataclasses.replace(first, token_ids=ids, score=-99.0)
        return found

    true = LLM.beam_search
    monkeypatch.setattr(LLM, "beam_search", search)
    pair = [f"--target={files.target}", f"--draft={files.draft}", "--tree=chain:2"]
    told = run_script(
        "generate.py", *pair, *ARGS, "--ignore_eos", "--verify_lossless", "--quiet"
    )
    assert told.code == 1
    first, second = told.err.splitlines()
    assert first.startswith("NOT LOSSLESS: 1 of the texts") and "9 of 10" in first
    assert second.startswith("prompt 0 [1], token 3 is ")


@dataclasses.dataclass
class Text:
    token_ids: list[int]
    score: float


def test_scores_decide_what_is_a_near_tie():
    """By as much as log p of both texts may be off, over the power of the length."""
    probed = exactness.Probe(2, 1e-3, 0.0, False)
    near = probed.near(SamplingParams())
    apart = [[Text([1, 2], -1.0)]], [[Text([1, 3], -1.0 - 3 * near)]]
    mean = exactness.beam_verdict(*apart, 1.0, probed)
    assert (mean.equal, mean.tokens, mean.texts) == (1, 2, 1)
    assert mean.differences[0].near == pytest.approx(2 * near) and not mean.lossless
    whole = exactness.beam_verdict(*apart, 0.0, probed)
    assert whole.differences[0].near == pytest.approx(4 * near) and whole.lossless
    missing = exactness.beam_verdict([[]], [[Text([1, 3], -1.0)]], 0.0, probed)
    assert not missing.lossless and missing.differences[0].tree is None
