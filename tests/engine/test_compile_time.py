"""Seconds of compiling stand apart from those of prefill and decoding."""

from __future__ import annotations

import threading

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest

from tests.engine.support import build, serve
from treespec_jax.config import SamplingParams
from treespec_jax.engine import compile_time
from treespec_jax.engine.clock import SteadyClock
from treespec_jax.engine.request import Request
from treespec_jax.engine.stats import total

STAGE = "/jax/core/compile/some_stage"
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


def compile_something(number: float) -> None:
    jax.jit(lambda x: jnp.sin(x) * number)(jnp.ones(3)).block_until_ready()


def test_a_clock_stops_for_what_its_thread_compiles(stages):
    clock = SteadyClock()
    with compile_time.measured(clock):
        compile_something(1.25)
    assert len(stages) >= 3 and clock.compile_seconds > 0
    assert clock.compile_seconds == pytest.approx(sum(s for _, s in stages), rel=0.05)
    before = clock.compile_seconds
    # Outside nobody measures, and what other threads compile is not waited for.
    compile_something(1.5)
    with compile_time.measured(clock):
        other = threading.Thread(target=compile_something, args=(1.75,))
        other.start()
        other.join()
    assert clock.compile_seconds == before


def test_stages_within_a_stage_count_once():
    """And one that began before the last ended counts from there."""
    clock = SteadyClock()
    with compile_time.measured(clock):
        for seconds in (1.0, 0.25, 10.0, 0.0):
            jax.monitoring.record_event_duration_secs(STAGE, seconds)
        jax.monitoring.record_event_duration_secs("/jax/other/stage", 90.0)
        with compile_time.measured(SteadyClock()):
            jax.monitoring.record_event_duration_secs(STAGE, 70.0)
    assert clock.compile_seconds == pytest.approx(10.0, abs=0.5)


def test_compiling_is_neither_prefill_nor_decoding(tiny_draft, stages):
    """The first text pays for it, and its statistics say so; the second does not."""
    engine = build(tiny_draft, tiny_draft, "chain:1", steps=2)
    stages.clear()
    before = engine.compile_seconds
    (first,) = serve(engine, [Request([5, 6, 7], PARAMS)])
    spent = engine.compile_seconds - before
    assert spent == pytest.approx(sum(seconds for _, seconds in stages), rel=0.1)
    assert first.stats.compile_seconds == pytest.approx(spent)
    # All that passed until the last token is one of the three.
    parts = ("prefill_seconds", "decode_seconds", "compile_seconds")
    summed = sum(getattr(first.stats, name) for name in parts)
    assert summed <= first.arrivals[-1][0]
    (second,) = serve(engine, [Request([5, 6, 7], PARAMS)])
    assert second.tokens == first.tokens and second.stats.compile_seconds == 0
    assert engine.compile_seconds - before == spent
    both = total([first.stats, second.stats], 1.0, 2.0, 3.0)
    assert both.compile_seconds == both.as_dict()["compile_seconds"] == 3.0
