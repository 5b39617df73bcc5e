"""Speculation over weights in int8 and bfloat16 gives their plain decoding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.engine.support import build, run
from tests.oracles import Ties
from treespec_jax import pairs
from treespec_jax.checkpoints.placement import parameters_of
from treespec_jax.config import SamplingParams
from treespec_jax.llm import LLM
from treespec_jax.models import product_choice
from treespec_jax.models.linear import weight_of
from treespec_jax.models.transformer import Transformer

PARAMS = {
    "greedy": SamplingParams(max_tokens=32),
    "t0.7": SamplingParams(max_tokens=32, temperature=0.7),
}
BUNDLED, DRAFT = "treespec_jax/bundled/target", "treespec_jax/bundled/draft"


def in_type(model: Transformer, weights: str) -> Transformer:
    """A float32 model with its matrices in another type."""
    made = Transformer(model.config, weights=weights, rngs=nnx.Rngs(0))
    theirs = parameters_of(model)
    for path, leaf in parameters_of(made).items():
        value = theirs[path][...]
        if value.ndim > 1:
            inputs = 2 if path.endswith("attention.out") else 1
            value = weight_of(jnp.asarray(value), made.types, inputs)
        leaf.set_value(value)
    return made


@pytest.fixture(scope="module", params=["int8", "int8:16", "bfloat16"])
def models(request, tiny_target, tiny_draft):
    return [in_type(model, request.param) for model in (tiny_target, tiny_draft)]


# Near ties are wider than in float32: a last bit of an activation, summed in another
# order, may move it by a whole step of the grid that products round it to.
TIES = {"int8": 0.3, "int8:16": 0.3, "bfloat16": 0.1}


@pytest.mark.slow
def test_tokens_equal_plain_decoding(models, ragged_prompts, monkeypatch, capsys):
    target, draft = models
    weights = target.types.weights
    monkeypatch.setattr("tests.oracles.TIE", TIES[weights])
    ties, plain = Ties(target), build(target, None, "none")
    tree = build(target, draft, "dynamic:9@4", 5, 16, 8)
    steps = tokens = 0
    for params in PARAMS.values():
        want = run(plain, ragged_prompts, params)
        found = run(tree, ragged_prompts, params)
        for i, (one, other) in enumerate(zip(want, found, strict=True)):
            seeded = dataclasses.replace(params, seed=i)
            ties.check(ragged_prompts[i], one.tokens, other.tokens, seeded)
            steps, tokens = steps + other.stats.steps, tokens + other.stats.tokens
    with capsys.disabled():
        print(f"\n{weights}: {ties.seen} near ties in {ties.tokens} tokens")
    assert ties.seen <= 2
    assert tokens / steps > 1.2, "the drafter is never right: a dead test"


def test_an_llm_says_what_its_weights_are():
    llm = LLM(BUNDLED, weights="int8:64", speculative=None)
    assert (llm.dtype, llm.weights) == ("float32", "int8:64")
    assert any("int8:64, rounded (LOSSY" in note for note in llm.notes)


@pytest.mark.parametrize("has_offset", [False, True])
def test_a_drafter_has_the_form_of_its_target(has_offset):
    """However small it is: the target's products were measured. No bit changes."""
    target = pairs.loaded(pairs.described(BUNDLED), "float32", None, "int8")
    if has_offset:
        product_choice.add_offset(target.model)
    draft = pairs.loaded_draft(pairs.described(DRAFT), target, None)
    types = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(draft.model))}
    assert types == {np.dtype("uint8" if has_offset else "int8"), np.dtype("float32")}
    tokens, positions = jnp.asarray([[5, 6]]), jnp.asarray([[0, 1]])
    seen = jnp.asarray([[[True, False], [True, True]]])

    @jax.jit
    def logits(model):
        return model.logit_columns(model(tokens, positions, seen).hidden)

    other = pairs.loaded(pairs.described(DRAFT), "float32", None, "int8")
    want, found = logits(other.model), logits(draft.model)
    np.testing.assert_array_equal(found, want)
