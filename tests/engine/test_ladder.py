"""A ladder of shapes changes no token, and compiles what it says."""

from __future__ import annotations

import dataclasses
import random

import pytest

from tests.drafting.heads import eagle
from tests.engine.support import serve
from tests.engine.told import Told
from treespec_jax import speculation
from treespec_jax.config import EngineConfig, SamplingParams, SpeculativeConfig
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import Request
from treespec_jax.engine.timing import Choice
from treespec_jax.speculation import PLAIN
from treespec_jax.trees.shapes import ROOT_ONLY

LADDER = "auto:4@2+2@1"
CONFIG = EngineConfig(
    max_batch=4, max_len=96, page_size=16, steps_per_dispatch=4, prefill_chunks=(16,)
)


class Random(Told):
    """Chooses whatever it may, by a seed; see `engine.chooser.Chooser`."""

    def __init__(self, shapes, seed):
        super().__init__()
        self._shapes, self._random = shapes, random.Random(seed)
        self.chosen = []

    def choose(self, max_steps, requests, ready, under_way):
        shape = self._random.choice(self._shapes)
        rehearse = not shape.depth and self._random.random() < 0.5
        self.chosen.append(Choice(shape, self._random.randint(1, 4), rehearse))
        return self.chosen[-1]


@pytest.fixture(scope="module")
def engine(tiny_target):
    """A layer over the target's rows, which has to be told of plain steps."""
    model = eagle(tiny_target, 3, few=True)
    settings = SpeculativeConfig(method="eagle", tree=LADDER, model="tiny")
    return Engine(tiny_target, CONFIG, speculation.make(settings, model))


@pytest.fixture(scope="module")
def asked(ragged_prompts):
    """Twice the batch, greedy and sampled; every fourth text without trees."""
    prompts = [*ragged_prompts[:4], *ragged_prompts[:4]]
    return [
        (
            prompt,
            SamplingParams(
                max_tokens=40,
                temperature=(0.0, 0.8)[number % 2],
                seed=number,
                ignore_eos=True,
                speculate=number % 4 != 3,
            ),
        )
        for number, prompt in enumerate(prompts)
    ]


def answers(engine, asked) -> list[Request]:
    return serve(engine, [Request(list(p), params) for p, params in asked])


@pytest.fixture(scope="module")
def plain(tiny_target, asked):
    return [r.tokens for r in answers(Engine(tiny_target, CONFIG, PLAIN), asked)]


def test_random_shapes_at_every_dispatch_change_no_token(engine, asked, plain):
    chooser, shapes = engine._chooser, engine.speculation.shapes
    assert len(shapes) == 3 and shapes[-1] == ROOT_ONLY
    for seed in range(3):
        engine._chooser = Random(shapes, seed)
        found = answers(engine, asked)
        assert [r.tokens for r in found] == plain
        chosen = engine._chooser.chosen
        assert {c.shape for c in chosen} == set(shapes)
        assert any(c.rehearse for c in chosen)
        for request in found:
            if not request.params.speculate:
                assert request.stats.steps == request.stats.tokens
                assert request.stats.drafted == 0
        assert any(r.stats.accepted for r in found)
    engine._chooser = chooser
    assert engine.compilations["dispatch"] == len(shapes)
    assert engine.compilations["rehearsal"] == 1


def test_nothing_compiles_after_warming_up(engine, asked, plain):
    """And no more than the ladder and two further programs before."""
    engine.compile((16,))
    before = dict(engine.compilations)
    programs = before["dispatch"] + before["rehearsal"]
    assert programs <= len(engine.speculation.shapes) + 2
    for _ in range(2):
        engine.reset()
        assert [r.tokens for r in answers(engine, asked)] == plain
    assert dict(engine.compilations) == before


def test_trees_are_compiled_beside_plain_decoding(tiny_target, asked, plain):
    """The first dispatch needs the plain program alone."""
    settings = SpeculativeConfig(method="ngram", tree="auto:2@2")
    engine = Engine(tiny_target, CONFIG, speculation.make(settings))
    engine.submit(Request([5, 6], dataclasses.replace(asked[0][1], max_tokens=4)))
    while engine.busy:
        engine.advance()
    assert engine.compilations["dispatch"] == 1 and not engine.compiling
    for _ in range(20):
        assert [r.tokens for r in answers(engine, asked)] == plain
        engine.wait()
        if engine.compilations["dispatch"] == 2 and engine.compilations["rehearsal"]:
            break
    traced = dict(engine.compilations)
    assert traced["dispatch"] == 2 and traced["rehearsal"] == 1
    # What was compiled aside is what runs: nothing is traced again.
    engine.advance()
    for shape in engine.speculation.shapes:
        engine.submit(Request([5, 6], asked[0][1]))
        while engine.busy:
            engine.advance(shape=shape)
    assert dict(engine.compilations) == traced
