"""Inversion against numpy; streams that share nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treespec_jax.sampling import draw, noise, select, streams

one = jax.jit(draw.one)
siblings = jax.jit(draw.siblings, static_argnames="replacement")
EDGES = np.array([0.0, 0.5, 1 - 2.0**-24])


def log(x):
    with np.errstate(divide="ignore"):
        return np.log(x)


def by_hand(mass, pair):
    """Token of one column: block by the first uniform, place by the second."""
    size = select.block_size(len(mass)) or len(mass)
    blocks = mass.reshape(-1, size)
    sums = blocks.sum(axis=1)

    def invert(x, u):
        if len(x) == 1:
            return 0
        some = np.flatnonzero(x > 0)
        passed = [i for i in some if np.cumsum(x)[i] > u * x.sum()]
        return min(passed, default=some[-1] if len(some) else 0)

    block = invert(sums, pair[0])
    return block * size + invert(blocks[block], pair[1])


@pytest.mark.parametrize("vocab", [3, 97, 4096])
def test_one_inverts_the_running_sum(vocab):
    """Columns full of zeros among them; the second uniform alone for few tokens."""
    rng = np.random.default_rng(vocab)
    mass = rng.dirichlet([0.3] * vocab, size=64).T
    mass[rng.random(mass.shape) < 0.4] = 0.0
    mass[0] += 0.01
    pairs = rng.random((64, 2))
    with jax.enable_x64(True):
        got = np.asarray(one(mass, pairs))
    want = [by_hand(mass[:, r], pairs[r]) for r in range(64)]
    np.testing.assert_array_equal(got, want)


def test_the_parts_of_a_column_have_the_length_of_its_masses():
    """Every token's interval of the uniform, from end to end."""
    mass = np.array([0.2, 0.0, 0.5, 0.3])
    ends = np.cumsum(mass)
    inner = [ends[i] - mass[i] + t * mass[i] for i in (0, 2, 3) for t in (1e-9, 0.999)]
    pairs = np.stack([np.zeros(6), inner], axis=1)
    with jax.enable_x64(True):
        got = one(np.repeat(mass[:, None], 6, axis=1), pairs)
    assert got.tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("vocab", [5, 2048])
def test_a_token_without_mass_is_never_drawn(vocab):
    """At the ends of [0, 1), in float32, wherever the mass is."""
    for at in ([0], [vocab - 1], [1, vocab // 2], [vocab - 2]):
        mass = np.zeros((vocab, 9), np.float32)
        mass[at] = (np.float32(1e-30),)
        pairs = np.array([(a, b) for a in EDGES for b in EDGES], np.float32)
        assert set(np.asarray(one(mass, pairs)).tolist()) <= set(at)


@pytest.mark.parametrize("vocab", [6, 2048])
@pytest.mark.parametrize("replacement", [False, True])
def test_siblings_are_draws_one_after_the_other(vocab, replacement):
    """Tokens, shares and what was left, from the plain definition."""
    rng = np.random.default_rng(1)
    R, K = 40, 5
    mass = rng.dirichlet([0.2] * vocab, size=R).T * 7
    mass[rng.random(mass.shape) < 0.3] = 0.0
    mass[:, 0] = 0.0
    mass[[1, vocab - 1], 0] = 2.0, 1.0
    pairs = rng.random((R, K, 2))
    with jax.enable_x64(True):
        got = siblings(log(mass), pairs, replacement=replacement)
    tokens, shares, left = (np.asarray(x) for x in got)
    for r in range(R):
        rest, whole = mass[:, r].copy(), mass[:, r].sum()
        for k in range(K):
            assert left[r, k] == pytest.approx(rest.sum() / whole, abs=1e-14)
            if rest.sum() == 0:
                assert shares[r, k] == 0
                continue
            token = by_hand(rest, pairs[r, k])
            assert tokens[r, k] == token
            assert shares[r, k] == pytest.approx(rest[token] / whole, rel=1e-12)
            if not replacement:
                rest[token] = 0.0


def test_what_little_is_left_is_right():
    """One minus the share of the first would be 0 or noise in float32.

    A float32 log q of -20 stands for a q with a relative error of about 1e-6.
    """
    mass = np.array([[1.0], [2e-9], [6e-9]], np.float32)
    pairs = np.full((1, 3, 2), 0.5, np.float32)
    tokens, shares, left = siblings(log(mass), pairs)
    assert tokens[0].tolist() == [0, 2, 1]
    np.testing.assert_allclose(shares[0], [1, 6e-9, 2e-9], rtol=3e-6)
    np.testing.assert_allclose(left[0], [1, 8e-9, 2e-9], rtol=3e-6)


PROPOSALS = 4096


def test_streams_are_independent_and_uniform():
    """Chi-square over 16 x 16 cells of two streams at equal keys, level 0.001.

    255 degrees of freedom: 330.5. Power: streams that are one, or shifted by a
    position, must be refused.
    """
    seed, at = jnp.full(PROPOSALS, 3, jnp.uint32), jnp.arange(PROPOSALS)
    names = streams.PROPOSAL, streams.ACCEPT, streams.LAST
    drawn = [np.asarray(streams.uniforms(seed, at, s, (1,)))[:, 0] for s in names]
    shared = np.asarray(noise.gumbel(seed, at, 1))[0]
    drawn.append(np.exp(-np.exp(-shared)))

    def statistic(a, b):
        cell = (a * 16).astype(int) * 16 + (b * 16).astype(int)
        seen = np.bincount(cell, minlength=256)
        return float(((seen - PROPOSALS / 256) ** 2 / (PROPOSALS / 256)).sum())

    for i, a in enumerate(drawn):
        assert a.min() >= 0 and a.max() < 1
        for b in drawn[:i]:
            assert statistic(a, b) < 330.5
            assert statistic(a[1:], b[:-1]) < 345
    assert statistic(drawn[0], drawn[0]) > 330.5


def test_uniforms_depend_on_seed_position_and_stream_alone():
    seeds = jnp.array([7, 9], jnp.uint32)
    first = streams.of_verdict(seeds, jnp.array([4, 4]), 5)
    again = streams.of_verdict(seeds[::-1], jnp.array([4, 4]), 5)
    np.testing.assert_array_equal(first.accept, np.asarray(again.accept)[::-1])
    np.testing.assert_array_equal(first.last, np.asarray(again.last)[::-1])
    proposal = np.asarray(streams.of_proposal(seeds, jnp.array([4, 4]), 5))
    everything = [*np.ravel(first.accept), *np.ravel(first.last), *proposal.ravel()]
    moved = streams.of_verdict(seeds, jnp.array([5, 4]), 5)
    everything += np.ravel(moved.accept)[:5].tolist()
    assert len(set(np.float32(everything).tolist())) == len(everything)
