"""Temperatures that follow a tree: how they are written, and where they are refused."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from treespec_jax import adaptive, limits
from treespec_jax.adaptive import AdaptiveTemperature
from treespec_jax.config import SpeculativeConfig
from treespec_jax.errors import UserError
from treespec_jax.sampling.temperature import LEAST, Adaptive, entropy


def test_texts_are_read():
    assert adaptive.parse("x", "") is None
    assert adaptive.parse("x", "depth:0.9") == AdaptiveTemperature("depth", 0.9)
    assert adaptive.parse("x", "siblings:-0.5").strength == -0.5


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("depth", "malformed"),
        ("depth:", "malformed"),
        ("depth:0.9.1", "malformed"),
        ("depth:nan", "malformed"),
        ("breadth:1", "malformed"),
        ("depth:0", "above 0"),
        ("depth:3", "at most 2"),
        ("siblings:-3", "at least -2"),
        ("entropy:11", "at most 10"),
        (0.9, "must be a text"),
        (None, "must be a text"),
    ],
)
def test_mistakes_are_named(text, why):
    with pytest.raises(UserError, match=why):
        SpeculativeConfig(adaptive_temperature=text)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (dict(method="ngram"), "drafter with probabilities"),
        (dict(method="auto", model="x"), "drafter with probabilities"),
        (dict(rule="terminal", tree="chain:3"), "changes nothing"),
        (dict(rule="token", tree="chain:3", cascade="chow"), "policy of cascade"),
    ],
)
def test_a_drafters_is_refused_where_it_cannot_work(settings, why):
    given = {"method": "draft_model", "model": "x", "adaptive_temperature": "depth:0.9"}
    limits.check_speculation(SpeculativeConfig(**given))
    with pytest.raises(UserError, match=why):
        limits.check_speculation(SpeculativeConfig(**given | settings))


def test_factors_by_slot():
    """Of three nodes in each of four slots, the last without a form."""
    logits = 2 * np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32)
    depth, children = np.array([[0, 1, 2]] * 4), np.array([[3, 2, 0]] * 4)
    given = Adaptive(
        jnp.array([0, 1, 2, -1]),
        jnp.array([0.5, 1.0, 2.0, 0.0]),
        ("depth", "siblings", "entropy"),
    )
    found = np.asarray(given.temper(jnp.asarray(logits), depth, children))
    p = np.exp(logits) / np.exp(logits).sum(axis=0)
    surprise = -(p * np.log(p)).sum(axis=0)
    np.testing.assert_allclose(entropy(jnp.asarray(logits)), surprise, rtol=1e-5)
    factors = np.concatenate(
        [[1, 0.5, 0.25], [3, 2, 1], 0.8 ** (2 / surprise[6:9]), [1, 1, 1]]
    )
    np.testing.assert_allclose(found, logits / factors, rtol=1e-5)
    # Untouched to the bit.
    np.testing.assert_array_equal(found[:, 9:], logits[:, 9:])


def test_a_sure_node_is_not_divided_by_nothing():
    logits = jnp.array([[0.0], [-jnp.inf], [-200.0]])
    given = Adaptive(jnp.array([2]), jnp.array([1.0]), ("entropy",))
    found = np.asarray(given.temper(logits, jnp.zeros((1, 1)), jnp.zeros((1, 1))))
    np.testing.assert_allclose(found[:, 0], [0.0, -np.inf, -200 / LEAST])
