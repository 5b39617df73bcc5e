"""Drafters that guess are told from those that cannot, when they are loaded."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from treespec_jax import LLM
from treespec_jax.checkpoints.drafters import LoadedDrafter
from treespec_jax.checkpoints.loading import LoadedModel
from treespec_jax.config import ModelConfig, SamplingParams
from treespec_jax.drafting import wiring
from treespec_jax.errors import UserError
from treespec_jax.models.drafter_config import EagleConfig, MedusaConfig
from treespec_jax.models.eagle import EagleModel
from treespec_jax.models.medusa import MedusaHeads
from treespec_jax.models.transformer import Transformer

V, D = 24, 32
CONFIG = ModelConfig(
    vocab_size=V,
    embed_dim=D,
    mlp_dim=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_positions=64,
)
NEXT = np.random.default_rng(0).permutation(V)
SIZES = dict(max_batch=2, max_len=32, page_size=16, prefill_chunks=(4,))


def silence(layer):
    """Adds nothing to the residual stream."""
    layer.attention.out[...] = jnp.zeros_like(layer.attention.out[...])
    layer.mlp.down[...] = jnp.zeros_like(layer.mlp.down[...])


def matrix(tokens):
    """A head that scores tokens[t] where the row is the embedding of t."""
    return jnp.zeros((V, D)).at[np.asarray(tokens), np.arange(V)].set(1.0)


@pytest.fixture(scope="module")
def target() -> LoadedModel:
    """Says NEXT[t] after t, most of the time."""
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    for layer in model.layers:
        silence(layer)
    model.embedding[...] = jnp.eye(V, D)
    model.head[...] = matrix(NEXT)
    return LoadedModel(CONFIG, model, None, "target", np.dtype("float32"))


def loaded(model, method) -> LoadedDrafter:
    dtype = np.dtype("float32")
    return LoadedDrafter(method, model.config, model, f"the {method}", dtype)


def eagle(target, of_token=True, few=False) -> LoadedDrafter:
    """Reads the token after the row, or, wired wrongly, the row."""
    ids = np.arange(0, V, 2) if few else np.arange(V)
    config = EagleConfig(
        generation=1,
        layer=dataclasses.replace(CONFIG, num_layers=1, vocab_size=len(ids)),
        target_vocab=V,
        target_dim=D,
        feature_layers=(2,),
    )
    model = EagleModel(config, rngs=nnx.Rngs(1))
    silence(model)
    model.embedding[...] = target.model.embedding[...]
    model.head[...] = target.model.head[...][ids]
    if few:
        model.token_ids[...] = jnp.asarray(ids, jnp.int32)
    parts = jnp.eye(D), jnp.zeros((D, D))
    model.fc[...] = jnp.concatenate(parts if of_token else parts[::-1], axis=1)
    return loaded(model, "eagle")


def medusa(ahead=2) -> LoadedDrafter:
    """Scores the token so many places after the row's own."""
    config = MedusaConfig(
        heads=2,
        blocks=1,
        target_dim=D,
        target_vocab=V,
        vocab_size=V,
        target_layers=2,
        shared_head=False,
    )
    model = MedusaHeads(config, rngs=nnx.Rngs(1))
    tokens = np.arange(V)
    for _ in range(ahead):
        tokens = NEXT[tokens]
    model.head[...] = jnp.stack([matrix(tokens)] * 2)
    return loaded(model, "medusa")


def test_agreement_is_of_the_row_that_decides(target):
    texts = np.random.default_rng(1).integers(0, V, (2, 30))
    found = wiring.agreement(target.model, eagle(target).model, texts)
    assert (found.drafter, found.rows) == (1.0, 58)
    _, counts = np.unique(NEXT[texts[:, 1:]], return_counts=True)
    assert found.commonest == counts.max() / 58
    # Of half the tokens it knows each.
    few = wiring.agreement(target.model, eagle(target, few=True).model, texts)
    assert few.drafter == np.mean(NEXT[texts[:, 1:]] % 2 == 0)
    # A head knows the token two places on where the one between is as expected.
    walk = [[3]]
    for _ in range(20):
        walk[0].append(int(NEXT[walk[0][-1]]))
    head = wiring.agreement(target.model, medusa().model, np.asarray(walk))
    assert head.drafter == 1.0
    head = wiring.agreement(target.model, medusa(ahead=1).model, np.asarray(walk))
    assert head.drafter == 0.0


@pytest.mark.parametrize("make", [eagle, lambda target: medusa()])
def test_good_drafters_are_taken(make, target):
    draft = make(target)
    llm = LLM(target, speculative={"model": draft, "tree": "chain:2"}, **SIZES)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    (done,) = llm.generate([[3]], params)
    text = [3]
    for _ in range(6):
        text.append(int(NEXT[text[-1]]))
    assert done.token_ids == text[1:]


def test_wrong_ones_are_refused_unless_wanted(target):
    wrong = eagle(target, of_token=False)
    speculative = {"model": wrong, "tree": "chain:2"}
    with pytest.raises(UserError) as told:
        LLM(target, speculative=speculative, **SIZES)
    message = str(told.value)
    assert message.startswith("the eagle guesses ")
    assert "% are one and the same token" in message
    assert message.endswith("or check_drafter=False to take it as it is")
    assert "\n" not in message
    LLM(target, speculative=speculative | {"check_drafter": False}, **SIZES)
    known = dataclasses.replace(wrong, known=True)
    LLM(target, speculative=speculative | {"model": known}, **SIZES)


@pytest.fixture(scope="module")
def drowning(target) -> Transformer:
    """Says the same, though its second layer drowns the token in that of number 0."""
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    nnx.update(model, nnx.state(target.model))
    mlp = model.layers[1].mlp
    mlp.gate_up[...] = jnp.zeros_like(mlp.gate_up[...]).at[:, 0].set(1.0)
    mlp.down[...] = jnp.zeros_like(mlp.down[...]).at[0, 0].set(1.0)
    model.head[...] = model.head[...].at[:, 0].set(0.0)
    return model


def third(layers) -> EagleModel:
    """Says what comes two places after the token that its first feature holds."""
    layer = dataclasses.replace(CONFIG, num_layers=1)
    model = EagleModel(
        EagleConfig(3, layer, V, D, feature_layers=layers), rngs=nnx.Rngs(1)
    )
    silence(model)
    model.fc[...] = jnp.concatenate([jnp.eye(D), jnp.zeros((D, D))], axis=1)
    model.head[...] = matrix(NEXT[NEXT])
    return model


def test_the_option_that_was_meant_is_named(drowning):
    walks = [np.arange(V)]
    for _ in range(9):
        walks.append(NEXT[walks[-1]])
    texts = np.stack(walks, axis=1)
    right = wiring.check(drowning, third((0, 2)), texts, "it")
    assert right.drafter > 0.9
    # Layers 3 and -1 there are not.
    assert right.others == {"norm_before_residual=true": right.drafter}
    found = wiring.agreement(drowning, third((1, 2)), texts)
    assert found.drafter < 0.1
    assert found.others["feature_layers=[0,1]"] == right.drafter
    wanted = f"{right.drafter:.0%} with feature_layers=.0,1.: it was trained to read"
    with pytest.raises(UserError, match=wanted):
        wiring.check(drowning, third((1, 2)), texts, "it")
