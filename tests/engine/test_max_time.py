"""Requests whose time ends: within one dispatch, and nobody else is concerned."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treespec_jax.config import SamplingParams
from treespec_jax.engine import engine as engines
from treespec_jax.engine import scheduler
from treespec_jax.engine.request import Request
from treespec_jax.errors import UserError
from treespec_jax.exploration import explore
from treespec_jax.texts import Reader


class Clock:
    """A second for every dispatch whose results come in."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock, fetch = Clock(), engines.fetch

    def tick(outbox):
        clock.now += 1
        return fetch(outbox)

    monkeypatch.setattr(engines, "fetch", tick)
    monkeypatch.setattr(scheduler, "time", clock)
    return clock


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    limits=st.lists(st.none() | st.floats(0.1, 12), min_size=1, max_size=4),
    steps=st.integers(1, 2),
)
def test_no_request_outlasts_its_time_by_more_than_a_dispatch(
    scripted_llm, script, clock, limits, steps
):
    params = [SamplingParams(max_time=limit) for limit in limits]
    requests = [Request(script.prompt_ids, one) for one in params]
    ended = {}
    with scripted_llm.exclusive() as engine:
        began = clock.now
        for request in requests:
            engine.submit(request)
        while engine.busy:
            for request in engine.advance(steps):
                if request.finish_reason:
                    ended.setdefault(requests.index(request), clock.now - began)
        engine.drain()
        assert engine.free_pages == 8
    for number, request in enumerate(requests):
        count, limit = len(request.tokens), request.params.max_time
        assert request.tokens == script.ids[:count]
        assert request.stats.tokens == count
        if limit is not None:
            assert ended[number] < limit + 1
        if request.finish_reason == "time":
            assert ended[number] >= limit and count < len(script.ids)
            assert request.stats.bound_by == ("max_time",)
        else:
            assert request.tokens == script.ids and request.finish_reason == "stop"
            assert request.stats.bound_by == ()


def test_a_stop_text_before_the_end_of_time_counts(scripted_llm, script):
    """The engine does not know of it when it ends the request."""
    params = SamplingParams(stop_token_ids=(script.ids[2],), max_time=9)
    request = Request(script.prompt_ids, params)
    with scripted_llm.exclusive() as engine:
        reader = Reader(script.prompt, request, None, ())
        engine.submit(request)
        while len(request.tokens) < 4:
            engine.advance(1)
        request.submitted -= 10
        engine.advance(1)
        assert request.finish_reason == "time"
        reader.read(engine)
        engine.drain()
    assert request.tokens == script.ids[:3] and request.finish_reason == "stop"
    assert request.stats.bound_by == ()


def test_callers_get_what_there_was(scripted_llm, script):
    (found,) = scripted_llm.generate([script.prompt], SamplingParams(max_time=1e-6))
    assert (found.finish_reason, found.token_ids) == ("time", [])
    assert found.text == "" and found.stats.as_dict()["bound_by"] == ["max_time"]


@pytest.mark.parametrize("limit", [0, -1, float("nan"), "soon"])
def test_only_times_are_taken(limit):
    with pytest.raises(UserError, match="max_time must be"):
        SamplingParams(max_time=limit)


def test_explore_within_budgets(scripted_target, scripted_draft, script):
    found = explore(
        script.prompt,
        scripted_target,
        scripted_draft,
        tree="dynamic:9@3",
        max_tokens=9,
        max_nodes_per_level=2,
        max_total_nodes=5,
        max_time=1000,
    )
    stats, trace = found.stats, found.trace
    assert stats.tokens == 9
    assert stats.bound_by == ("max_nodes_per_level", "max_total_nodes")
    assert stats.drafted == 5 * stats.steps
    for step in trace.steps:
        depths = [0]
        for parent in step.parents[1:]:
            depths.append(depths[parent] + 1)
        assert len(depths) <= 6 and max(map(depths.count, depths)) <= 2
