"""Streams run several steps per dispatch where nobody can see the difference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.conftest import TINY
from treespec_jax import LLM, SamplingParams, pace, worker
from treespec_jax.checkpoints import LoadedModel


@pytest.fixture(scope="module")
def llm(tiny_target):
    dtype = tiny_target.embedding[...].dtype
    loaded = LoadedModel(TINY, tiny_target, None, "tiny", dtype)
    return LLM(loaded, speculative=None, max_batch=1, max_len=64)


def test_steps_follow_the_time_of_a_dispatch():
    found = pace.Pace()
    assert found.steps == 1, "the first token comes at once"
    for expected in (2, 4, 8, 8):
        found.took(pace.UNSEEN / 3, longest=8)
        assert found.steps == expected
    found.took(pace.UNSEEN * 0.8, longest=8)
    assert found.steps == 8
    for expected in (4, 2, 1, 1):
        found.took(pace.UNSEEN * 2, longest=8)
        assert found.steps == expected


def test_a_stream_of_quick_steps_has_fewer_dispatches(llm, monkeypatch):
    """And the text of `generate`; one of slow steps goes step by step."""
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    prompt = [5, 6, 7]
    (expected,) = llm.generate([prompt], params)
    counts = {}
    for name, seconds in (("quick", 0.0), ("slow", 1.0)):
        clock = iter(seconds * turn for turn in range(10_000))
        monkeypatch.setattr(
            worker, "time", SimpleNamespace(perf_counter=lambda c=clock: next(c))
        )
        stream = llm.stream(prompt, params)
        list(stream)
        assert stream.completion.token_ids == expected.token_ids
        counts[name] = len(stream.completion.arrivals)
    assert counts["quick"] < counts["slow"] == expected.stats.steps
