"""Programs without conditionals, as a GPU wants them: their form, and their tokens.

A GPU's programs are lowered here, which takes none. Run on this machine, they emit what
those emit that decide on the device.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from tests.conftest import TINY
from tests.drafting import heads
from tests.engine.support import serve
from treespec_jax import speculation
from treespec_jax.config import EngineConfig, SamplingParams, SpeculativeConfig
from treespec_jax.drafting import METHODS
from treespec_jax.engine import executor
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import Request
from treespec_jax.measurement import lowered
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import Transformer
from treespec_jax.sampling import select

# More tokens than the short list of truncation has.
SIZES = dataclasses.replace(TINY, vocab_size=300, num_layers=1)
CONFIG = EngineConfig(
    max_batch=2, max_len=48, page_size=16, steps_per_dispatch=2, prefill_chunks=(8,)
)
GREEDY = SamplingParams(max_tokens=12)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0)
CUT = dataclasses.replace(GREEDY, temperature=1.5, top_k=280, top_p=0.97)

RULES = [
    ("token", "regular:2x1", ""),
    ("token", "chain:2", ""),
    ("token", "allotted:4@2", "with_replacement"),
    ("block", "chain:3", ""),
    ("traversal", "regular:2x1", ""),
    ("terminal", "regular:2x1", ""),
    ("typical", "dynamic:4@2", ""),
    ("exact", "dynamic:5@3~0.1", ""),
    ("exact", "dynamic:5@3~cost", ""),
]


@pytest.fixture(scope="module")
def target():
    return Transformer(SIZES, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def models(target):
    """By method; None: without one."""
    draft = Transformer(SIZES, rngs=nnx.Rngs(1))
    draft.embedding[...] = target.embedding[...]
    draft.head[...] = target.head[...]
    return {
        "draft_model": draft,
        "auto": draft,
        "eagle": heads.eagle(target, 3),
        "medusa": heads.medusa(target),
    }


def engine_of(target, model, **settings) -> Engine:
    made = speculation.make(SpeculativeConfig(**settings), model, 0.7)
    return Engine(target, CONFIG, made)


def abstract(module):
    """Shapes in place of parameters: on no device, so that a kernel is for any."""
    if module is None:
        return None
    flat = FlatModule(module)
    leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat.leaves]
    return flat.bind(tuple(leaves))


def check_form(target, model, params, **settings) -> None:
    engine = engine_of(abstract(target), abstract(model), **settings)
    function, arguments = engine.program(params, straight=True)
    found = lowered.counts(lowered.lower(function, arguments, "cuda"))
    assert (found.loops, found.inner_loops, found.conditionals) == (1, 0, 0)
    assert found.calls and found.operations > 100


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_for_a_gpu_has_no_loop_and_no_conditional(
    target, models, method, params
):
    """But for the loop over steps."""
    shapes = {"none": "none", "medusa": "dynamic:5@3"}
    tree = shapes.get(method, "dynamic:5@2")
    check_form(target, models.get(method), params, method=method, tree=tree)


@pytest.mark.parametrize(("rule", "tree", "proposal"), RULES)
def test_no_rule_brings_one(target, models, rule, tree, proposal):
    """With tokens cut, so that all there is to truncation is there."""
    settings = {"rule": rule, "tree": tree, "proposal": proposal}
    check_form(target, models["draft_model"], CUT, **settings)


def test_temperatures_that_follow_the_tree_bring_none(target, models):
    """Neither the drafter's nor the policy's."""
    params = dataclasses.replace(SAMPLED, adaptive_temperature="entropy:1")
    settings = {"method": "draft_model", "rule": "token", "tree": "regular:2x1"}
    draft = models["draft_model"]
    check_form(target, draft, params, adaptive_temperature="siblings:0.2", **settings)


def test_an_undecided_program_has_conditionals(target, models):
    """What the form is checked by sees them, in loops and functions too."""
    function, arguments = engine_of(
        target, models["draft_model"], tree="dynamic:5@2"
    ).program(SAMPLED)
    found = lowered.counts(lowered.lower(function, arguments, "cuda"))
    assert found.inner_loops and found.conditionals


@pytest.mark.parametrize(
    ("rule", "tree", "turns"),
    [
        ("exact", "dynamic:5@2", [(GREEDY, GREEDY), (SAMPLED, SAMPLED)]),
        ("block", "chain:3", [(SAMPLED, SAMPLED)]),
    ],
)
def test_tokens_are_those_of_the_undecided_program(
    target, models, monkeypatch, rule, tree, turns
):
    """And one program serves requests that ask for the same."""

    def tokens_of(engine) -> list[list[int]]:
        found = []
        for turn in turns:
            given = [dataclasses.replace(p, seed=seed) for seed, p in enumerate(turn)]
            found += serve(engine, [Request([5, 6, 7], p) for p in given])
        return [request.tokens for request in found]

    want = tokens_of(engine_of(target, models["draft_model"], rule=rule, tree=tree))
    monkeypatch.setattr(executor, "is_straight", lambda device: True)
    engine = engine_of(target, models["draft_model"], rule=rule, tree=tree)
    assert tokens_of(engine) == want
    assert engine.compilations["dispatch"] == len(turns)


def test_best_entries_by_counting():
    """Of rows with ties and infinities; where a GPU counts, a CPU sorts."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, (3, 40)).astype(np.float32)
    x[0, ::3] = -np.inf
    for count in (1, 7, 40):
        want = jax.lax.top_k(x, count)
        got = select.top_k_by_counting(x, count)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
    rows = np.stack([rng.permutation(50)[:20] for _ in range(3)]).astype(np.int32)
    np.testing.assert_array_equal(
        select.ascending_by_counting(rows), np.sort(rows, axis=1)
    )
