"""Drafting without a model changes no token, whatever the source.

All sources share one drafter, and each can be turned off while it runs, so that every
source and every mixture of them is the same few programs.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.support import serve
from treespec_jax import speculation
from treespec_jax.config import EngineConfig, SamplingParams, SpeculativeConfig
from treespec_jax.drafting.last_logits import LastLogits
from treespec_jax.drafting.ngram import Matching
from treespec_jax.drafting.recycle import Recycling
from treespec_jax.drafting.sources import SourceDrafter
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import Request
from treespec_jax.speculation import Speculation
from treespec_jax.trees import shapes
from treespec_jax.trees.shapes import ROOT_ONLY

pytestmark = pytest.mark.slow

MAX_LEN, ENDS = 64, (23, 71)
SHAPES = ("chain:2", "static:0.0.0+0.1+1+2.0", "dynamic:7@3")
SOURCES = {
    "ngram": ("ngram",),
    "suffix": ("suffix",),
    "recycle": ("recycle",),
    "last_logits": ("last logits",),
    "auto": ("suffix", "recycle", "last logits"),
}
PENALTIES = dict(
    repetition_penalty=1.2, presence_penalty=0.4, logit_bias={5: 2.0, 11: -100.0}
)
# A bias of nothing, so that no dispatch is without penalties: one program for all.
NOTHING = dict(logit_bias={0: 0.0})
SETTINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.0, top_p=0.9),
)
# Of the prompts: one goes on to the end of its slot.
LIMITS = (20, 9, 30, 100, 1)


class Switched:
    """A source that can be turned off; see `sources.Source`."""

    def __init__(self, part):
        self.name, self.needs, self.history = part.name, part.needs, part.history
        self._part = part

    def init(self, sizes):
        return jnp.array(True), self._part.init(sizes)

    def ingest(self, state, committed):
        return state[0], self._part.ingest(state[1], committed)

    def copy_slot(self, state, source, destination):
        return state[0], self._part.copy_slot(state[1], source, destination)

    def copy_pages(self, state, copies):
        return state[0], self._part.copy_pages(state[1], copies)

    def resume(self, state, committed):
        return state[0], self._part.resume(state[1], committed)

    def look(self, state, outlook):
        return state[0], self._part.look(state[1], outlook)

    def guess(self, state, nodes, scratch):
        tokens, log_prob, scratch = self._part.guess(state[1], nodes, scratch)
        return tokens, jnp.where(state[0], log_prob, -jnp.inf), scratch


PARTS = (
    Matching("ngram", 2, 80),
    Matching("suffix", 5, 0),
    Recycling(3, "engine"),
    LastLogits(2),
)


class Bench:
    """An engine of five slots, and what it was when it began."""

    def __init__(self, target):
        drafter = SourceDrafter(tuple(map(Switched, PARTS)))
        asked = (*map(shapes.parse, SHAPES), ROOT_ONLY)
        config = EngineConfig(
            max_batch=5,
            max_len=MAX_LEN,
            page_size=16,
            # Too few for five texts to their end: some are computed anew.
            num_pages=10,
            steps_per_dispatch=4,
            prefill_chunks=(16,),
            # `begin` empties tables that cached pages would go with.
            prefix_cache=False,
        )
        self.engine = Engine(target, config, Speculation(drafter, asked), ENDS)
        self._first = jax.tree.map(np.array, self.engine.draft_state)

    def begin(self, names) -> None:
        """Empties the tables, and turns on some sources."""
        parts = tuple(
            (np.bool_(part.name in names), state[1])
            for part, state in zip(PARTS, self._first.parts, strict=True)
        )
        state = dataclasses.replace(self._first, parts=parts)
        where = jax.tree.leaves(self.engine.draft_state)[0].sharding
        self.engine.draft_state = jax.device_put(state, where)

    def serve(self, requests, choose) -> list[Request]:
        """Runs requests in shapes and steps that `choose` gives for every dispatch."""
        for request in requests:
            self.engine.submit(request)
        while self.engine.busy:
            shape, steps = choose()
            self.engine.advance(steps, shape)
        return requests


@pytest.fixture(scope="module")
def bench(tiny_draft):
    """Its model has one layer: that much less to compile."""
    return Bench(tiny_draft)


@pytest.fixture(scope="module")
def asked(ragged_prompts):
    """Prompts and settings, every second one with penalties; thrice the batch."""
    prompts = [*ragged_prompts[:3], [*ragged_prompts[1] * 5], ragged_prompts[4]]
    pairs = itertools.product(SETTINGS, zip(prompts, LIMITS, strict=True))
    return [
        (
            prompt,
            dataclasses.replace(
                params,
                seed=number,
                max_tokens=limit,
                **(PENALTIES if number % 2 else NOTHING),
            ),
        )
        for number, (params, (prompt, limit)) in enumerate(pairs)
    ]


@pytest.fixture(scope="module")
def plain(tiny_draft, asked):
    """Tokens of plain decoding, one prompt at a time."""
    config = EngineConfig(max_batch=1, max_len=MAX_LEN, prefill_chunks=(16,))
    engine = Engine(tiny_draft, config, eos_ids=ENDS)
    return [r.tokens for r in serve(engine, [Request(*each) for each in asked])]


def accepted(requests) -> dict[str, int]:
    """Accepted nodes by source."""
    counts = [request.stats.accepted_by_source for request in requests]
    return {name: sum(c[name] for c in counts) for name in counts[0]}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_source_gives_the_text_of_plain_decoding(
    shape, source, bench, asked, plain
):
    """All settings beside each other, and a greedy request alone."""
    names, grown = SOURCES[source], shapes.parse(shape)
    numbers = np.random.default_rng(len(source)).permutation(len(asked))
    bench.begin(names)
    requests = []
    for some in (numbers, [3]):
        served = [Request(*asked[n]) for n in some]
        bench.serve(served, lambda: (grown, None))
        assert [r.tokens for r in served] == [plain[n] for n in some]
        requests += served
    counts = accepted(requests)
    assert sum(request.stats.restarts for request in requests)
    for name, count in counts.items():
        assert (count > 0) == (name in names), counts


def test_shapes_may_change_at_every_dispatch(bench, asked, plain):
    """Plain steps among them, which nothing is drafted in."""
    rng = np.random.default_rng(3)
    grown = bench.engine.speculation.shapes
    bench.begin(SOURCES["auto"])
    requests = [Request(*each) for each in asked]
    bench.serve(requests, lambda: (grown[rng.integers(0, 4)], int(rng.integers(1, 5))))
    assert [r.tokens for r in requests] == plain
    nodes = {step.nodes for request in requests for step in request.steps}
    assert nodes == {shape.num_nodes - 1 for shape in grown}


def test_what_is_remembered_depends_on_the_texts_alone(bench, asked):
    states = []
    for _ in range(2):
        bench.begin([part.name for part in PARTS])
        requests = [Request(*each) for each in asked]
        bench.serve(requests, lambda: (shapes.parse(SHAPES[1]), None))
        states.append(jax.tree.map(np.array, bench.engine.draft_state))
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert np.isfinite(states[0].parts[2][1].logits).any()


def test_nothing_is_compiled_for_a_prompt(bench):
    """After all of the tests above: a program a shape."""
    programs = {"begin": 1, "prefill": 1, "dispatch": len(SHAPES) + 1}
    assert bench.engine.compilations == programs


def test_an_engine_of_one_slot_with_the_default(tiny_draft, asked, plain):
    """No penalties are compiled in; one page is as long as a text."""
    options = dict(longest=4, history=50, successors=3, candidates=2)
    cls, found = speculation.find(SpeculativeConfig(method="auto", options=options))
    made = Speculation(cls.make(None, 1.0, found), (shapes.parse("dynamic:5@2"),))
    engine = Engine(
        tiny_draft,
        EngineConfig(
            max_batch=1,
            max_len=MAX_LEN,
            page_size=64,
            prefill_chunks=(16,),
            record=True,
        ),
        made,
        ENDS,
    )
    numbers = [n for n, (_, params) in enumerate(asked) if params.logit_bias[0][0] == 0]
    requests = [
        Request(prompt, dataclasses.replace(params, logit_bias=()))
        for prompt, params in (asked[n] for n in numbers)
    ]
    serve(engine, requests)
    assert [r.tokens for r in requests] == [plain[n] for n in numbers]
    assert engine.compilations == {"begin": 1, "prefill": 1, "dispatch": 1}
    counts = accepted(requests)
    assert all(counts.values()), counts
    _check_sources(requests)


def _check_sources(requests) -> None:
    """Steps count the sources of the nodes that their records say were accepted."""
    for request in requests:
        for step, record in zip(request.steps, request.records, strict=True):
            path = record.path[1 : len(step.sources) + 1]
            assert record.sources[path].tolist() == list(step.sources)
