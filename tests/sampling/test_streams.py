"""Uniforms of proposals and verdicts: of seed and root alone, and never twice."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracles import sampling
from treespec_jax.config import SamplingParams
from treespec_jax.sampling.randomness import Randomness

NODES, DEPTH, VOCAB = 6, 2, 11


@jax.jit
def asked(settings, roots):
    """All that a drafter and a rule are given, float32 [B, n]."""
    randomness = Randomness(settings, roots, NODES, DEPTH, VOCAB)
    verdict = randomness.verdict()
    parts = randomness.proposal(), verdict.accept, verdict.last
    return jnp.concatenate([x.reshape(len(roots), -1) for x in parts], axis=1)


def uniforms(seeds, roots) -> np.ndarray:
    settings = sampling(SamplingParams(temperature=1.0), len(seeds))
    settings = dataclasses.replace(settings, seed=np.array(seeds, np.uint32))
    return np.asarray(asked(settings, np.array(roots, np.int32)))


def test_no_two_uniforms_are_one():
    """Of neighbouring roots, equal seeds, nodes, and the three streams of a step."""
    seeds, roots = np.divmod(np.arange(60), 20)
    found = uniforms(seeds, roots)
    assert found.shape == (60, 2 * NODES + NODES + 2)
    assert found.min() >= 0 and found.max() < 1
    # Of so many numbers of 23 bits some would meet by accident: at most a few.
    assert len(np.unique(found)) > found.size - 5
    # Rows of neighbours are no shifted copies either.
    order = np.argsort(found, axis=1)
    assert len(np.unique(order, axis=0)) == 60


def test_uniforms_are_of_seed_and_root_alone():
    """Not of the slot, nor of its neighbours."""
    one, other = uniforms([5, 9, 5], [7, 0, 8]), uniforms([9, 5, 5], [0, 8, 7])
    np.testing.assert_array_equal(one, other[[2, 0, 1]])


def test_every_uniform_is_uniform_over_roots():
    """Quarters of [0, 1) by chi-square with 3 degrees of freedom, level 1e-4."""
    roots = 4096
    found = uniforms(np.full(roots, 3), np.arange(roots))
    counts = np.stack(
        [np.sum(found // 0.25 == quarter, axis=0) for quarter in range(4)]
    )
    statistic = ((counts - roots / 4) ** 2 / (roots / 4)).sum(axis=0)
    assert statistic.max() < 21.1
