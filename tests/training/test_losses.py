"""Losses against their definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from treespec_jax.models.flat import FlatModule
from treespec_jax.training.losses import cross_entropy, kl_divergence, row_logits


def test_cross_entropy_is_entropy_plus_divergence():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 7))
    p, q = jax.nn.softmax(logits[0]), jax.nn.log_softmax(logits[1])
    expected = jnp.mean(jnp.sum(p * (jnp.log(p) - q), axis=-1))
    np.testing.assert_allclose(kl_divergence(logits[0], logits[1]), expected, rtol=1e-5)
    assert kl_divergence(logits[0], logits[0]) == 0
    targets = jnp.array([0, 6, 3, 3, 1])
    expected = -jnp.mean(q[jnp.arange(5), targets])
    np.testing.assert_allclose(cross_entropy(logits[1], targets), expected, rtol=1e-6)


def test_rows_are_causal_and_apart(tiny_target):
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 3, 97)
    changed = tokens.at[0, 5].set(2)
    flat = FlatModule(tiny_target)
    logits = jax.jit(lambda leaves, tokens: row_logits(flat.bind(leaves), tokens))
    before = logits(flat.leaves, tokens).reshape(2, 8, -1)
    after = logits(flat.leaves, changed).reshape(2, 8, -1)
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    np.testing.assert_array_equal(before[1], after[1])
    assert jnp.abs(before[0, 5:] - after[0, 5:]).max() > 1e-3
