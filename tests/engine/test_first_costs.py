"""What steps cost is learnt before texts come, and leaves nothing else behind."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.drafting.heads import eagle
from tests.engine.conftest import SIZES
from tests.engine.simulated import LADDER, STEPS, Machine
from tests.engine.support import serve
from treespec_jax import cost_file, speculation
from treespec_jax.config import EngineConfig, SamplingParams, SpeculativeConfig
from treespec_jax.engine import first_costs
from treespec_jax.engine.chooser import Chooser
from treespec_jax.engine.costs import (
    CATCH_UP,
    COMPARISONS,
    HOST,
    REHEARSAL,
    SWITCH,
    Costs,
    Load,
    usual_curve,
)
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.executor import Executor
from treespec_jax.engine.first_costs import Prescribed
from treespec_jax.engine.request import Request
from treespec_jax.llm import LLM
from treespec_jax.speculation import PLAIN
from treespec_jax.trees.shapes import ROOT_ONLY

# As in test_ladder.py.
CONFIG = EngineConfig(
    max_batch=4, max_len=96, page_size=16, steps_per_dispatch=4, prefill_chunks=(16,)
)
LOAD = Load.of(CONFIG.max_batch, 0)
PARAMS = SamplingParams(max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module", params=["ngram", "eagle"])
def made(request, tiny_target):
    """Without a model, and one that plain steps wait for."""
    if request.param == "ngram":
        return speculation.make(SpeculativeConfig(method="ngram", tree="auto:2@2"))
    model = eagle(tiny_target, 3, few=True)
    settings = SpeculativeConfig(method="eagle", tree="auto:4@2+2@1", model="tiny")
    return speculation.make(settings, model)


@pytest.fixture(scope="module")
def compiled(tiny_target, made):
    engine = Engine(tiny_target, CONFIG, made)
    engine.compile((16,))
    return engine


@pytest.fixture
def engine(compiled):
    """One that knows nothing of costs."""
    costs = Costs(usual_curve(True, True), CONFIG.max_batch)
    shapes = compiled.speculation.shapes
    compiled._chooser = Chooser(shapes, costs, True, CONFIG.steps_per_dispatch)
    compiled.reset()
    return compiled


def answers(engine, prompts):
    """Texts and steps; of one shape, so that no clock decides how many there are."""
    requests = [Request(list(prompt), PARAMS) for prompt in prompts]
    for request in requests:
        engine.submit(request)
    while engine.busy:
        engine.advance(shape=engine.speculation.shape)
    return [(r.tokens, r.stats.steps, r.stats.prefix_hits) for r in requests]


def test_every_tree_is_compared_and_nothing_compiled(engine):
    before = dict(engine.compilations)
    pages, seconds = engine.free_pages, engine.compile_seconds
    decode, prefill = engine.decode_seconds, engine.prefill_seconds
    took = engine.measure_costs()
    assert took > 0 and engine.compile_seconds == seconds + took
    assert dict(engine.compilations) == before
    for shape in engine.speculation.shapes[:-1]:
        assert engine.costs.count(shape, LOAD)
    assert engine.costs.count(REHEARSAL, LOAD) and engine.costs.count(SWITCH, LOAD)
    assert (engine.decode_seconds, engine.prefill_seconds) == (decode, prefill)
    assert engine.free_pages == pages and engine.is_new and not engine.busy
    known = engine.costs.known
    assert engine.measure_costs() == 0.0 and engine.costs.known == known


def test_the_engine_is_as_new(engine, ragged_prompts):
    cold = answers(engine, ragged_prompts)
    assert not any(hits for _, _, hits in cold)
    with pytest.raises(ValueError, match="under way"):
        engine.submit(Request([5, 6], PARAMS))
        engine.measure_costs()
    serve(engine, [])
    assert not engine.is_new
    assert engine.measure_costs() > 0
    assert answers(engine, ragged_prompts) == cold


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("number", [1, 2, 9])
def test_whatever_fails_leaves_nothing_behind(
    engine, tiny_target, ragged_prompts, monkeypatch, kind, number
):
    dispatch, left = Executor.dispatch, [number]

    def failing(executor, plan, name):
        left[0] -= 1
        outbox = dispatch(executor, plan, name)
        if not left[0]:
            raise kind("in the middle")
        return outbox

    pages, cold = engine.free_pages, answers(engine, ragged_prompts)
    engine.reset()
    chooser, seconds = engine._chooser, engine.decode_seconds
    monkeypatch.setattr(Executor, "dispatch", failing)
    with pytest.raises(kind, match="in the middle"):
        engine.measure_costs()
    monkeypatch.undo()
    assert engine._chooser is chooser and not engine._flights
    assert engine.decode_seconds == seconds
    assert engine.free_pages == pages and engine.is_new and not engine.busy
    assert answers(engine, ragged_prompts) == cold


def test_nothing_runs_that_is_not_compiled(tiny_target, made, monkeypatch):
    engine = Engine(tiny_target, CONFIG, made)
    assert engine.measure_costs() == 0.0
    plain = Engine(tiny_target, CONFIG, PLAIN)
    assert plain.measure_costs() == 0.0
    for one in (engine, plain):
        assert set(one.compilations) == {"begin"}


def llm_of(target) -> LLM:
    return LLM(target, speculative={"method": "ngram", "tree": "auto:2@2"}, **SIZES)


@pytest.mark.slow
def test_costs_are_kept_for_the_next_process(scripted_target, tmp_path, monkeypatch):
    monkeypatch.setattr(cost_file, "cache_folder", lambda: tmp_path)
    first = llm_of(scripted_target)
    assert first.warm_up() > 0
    (tree, _), load = first.engine.speculation.shapes, Load.of(SIZES["max_batch"], 0)
    found = first.engine.costs.count(tree, load)
    second = llm_of(scripted_target)
    assert second.engine.costs.count(tree, load) == found > 0
    monkeypatch.setattr(first_costs, "run", None)
    second.warm_up()
    with second.exclusive() as engine:
        assert engine.measure_costs() == 0.0
    kept, known = second.engine.costs.known, first.engine.costs.known
    assert kept.as_dict() == known.as_dict()


def test_a_warm_up_disturbs_no_text(scripted_target, script, monkeypatch, tmp_path):
    """Beside a stream that runs, and where texts have taught the drafter."""
    monkeypatch.setattr(cost_file, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(first_costs, "run", None)
    llm = llm_of(scripted_target)
    stream = llm.stream(script.prompt)
    begun = next(stream)
    llm.warm_up()
    assert begun + "".join(stream) == llm.generate(script.prompt)[0].text
    llm.warm_up()


class Room:
    """Texts without an end."""

    begun, room = True, 10**9


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    "machine",
    [
        Machine(dispatch=0.02, noise=0.02),
        Machine(seconds=0.001, dispatch=0.8, switch=1.6, noise=0.02),
    ],
    ids=["long", "short"],
)
def test_costs_are_those_of_the_machine(machine, waits):
    """Of noisy dispatches, some of which are not timed, as in the engine."""
    slots, rng = 4, np.random.default_rng(0)
    config = dataclasses.replace(CONFIG, steps_per_dispatch=STEPS)
    costs = Costs(usual_curve(True, True), slots)
    chooser = Chooser(LADDER, costs, True, STEPS)
    ready = {*LADDER, REHEARSAL, CATCH_UP}
    told = Prescribed(chooser, LADDER, config, ready, waits)
    assert told.is_needed
    requests = [Request([1], SamplingParams()) for _ in range(slots)]
    flying, before, ran = [], ROOT_ONLY, set()
    told.begin(Room(), float("inf"))
    while flying or not told.ended:
        while len(flying) < 2 and not told.ended:
            choice = told.choose(None, requests, ready, ())
            # A pass for the drafter's model, before which a dispatch is waited for.
            if waits and choice.shape.depth and flying:
                flying[-1][1] &= bool(flying[-1][0].shape.depth)
            flying.append([choice, True])
            told.started(choice, requests)
        choice, timed = flying.pop(0)
        steps = choice.max_steps or STEPS
        seconds = machine.seconds * machine.time(choice, steps, before)
        seconds *= np.exp(machine.noise * rng.normal())
        if (choice.shape, choice.rehearse) not in ran:
            # Whatever a first run takes besides.
            seconds *= 50
        ran.add((choice.shape, choice.rehearse))
        before, load = choice.shape, told.load(requests)
        told.record(choice, [], steps, load, seconds if timed else None)
    told.tell(requests)
    load = Load.of(slots, 0)
    host = 0.0 if machine.seconds > 0.01 else machine.dispatch
    for shape, cost in zip(LADDER, machine.trees, strict=False):
        assert costs.count(shape, load) >= COMPARISONS
        expected = (cost * STEPS + host) / (STEPS + host)
        assert costs.relative(shape, load) == pytest.approx(expected, rel=0.08)
    assert costs.count(REHEARSAL, load) >= COMPARISONS
    if host:
        assert costs.is_known(HOST, load)
        assert costs.host(load) == pytest.approx(host, rel=0.4)
        assert costs.switch(load) == pytest.approx(machine.switch, rel=0.4)


def test_what_there_was_no_time_for_is_measured_the_next_time():
    costs = Costs(usual_curve(True, True), CONFIG.max_batch)
    chooser = Chooser(LADDER, costs, True, STEPS)
    for number in range(COMPARISONS):
        assert Prescribed(chooser, LADDER, CONFIG, {*LADDER}, False).is_needed
        for shape in LADDER[:-1]:
            costs.compare(shape, LOAD, 1.5 + number / 10)
    assert not Prescribed(chooser, LADDER, CONFIG, {*LADDER}, False).is_needed
