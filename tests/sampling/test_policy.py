"""Truncation against plain numpy; noise that is a function of seed and position."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treespec_jax.config import SamplingParams
from treespec_jax.sampling import noise, policy
from treespec_jax.sampling.policy import SHORT_LIST, Sampling

truncate = jax.jit(policy.truncate)
choose = jax.jit(policy.choose)


@functools.partial(jax.jit, static_argnums=2)
def noise_of(seed_B, positions_BC, vocab):
    return noise.gumbel(seed_B[:, None], positions_BC, vocab)


def settings(*params: SamplingParams, straight: bool = False) -> Sampling:
    """One slot per request; `straight` as in a program without conditionals."""
    dtypes = {
        "temperature": np.float32,
        "top_k": np.int32,
        "top_p": np.float32,
        "min_p": np.float32,
        "seed": np.uint32,
    }
    values = {
        name: np.array([getattr(p, name) for p in params], dtype)
        for name, dtype in dtypes.items()
    }
    return jax.tree.map(jnp.asarray, policy.from_host(values, straight))


def kept_by_hand(logits, params: SamplingParams) -> np.ndarray:
    """bool [V]: temperature, top-k, top-p, min-p one after the other, ties kept."""
    scaled = logits.astype(np.float64) / params.temperature
    kept = np.ones(len(scaled), bool)
    if params.top_k:
        kept &= scaled >= np.sort(scaled)[::-1][min(params.top_k, len(scaled)) - 1]
    p = np.where(kept, np.exp(scaled - scaled.max()), 0.0)
    p /= p.sum()
    if params.top_p < 1:
        falling = np.sort(p)[::-1]
        needed = np.argmax(np.cumsum(falling) >= params.top_p)
        kept &= p >= falling[needed]
    return kept & (p >= params.min_p * p.max())


SETTINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_k=10_000),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=2.0, top_p=0.05),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=1.0, min_p=1.0),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.8, min_p=0.02),
    SamplingParams(temperature=1.3, top_k=300, top_p=0.97),
    SamplingParams(temperature=1.0, top_k=200, top_p=0.5, min_p=0.001),
]


def check(logits, params) -> None:
    """Columns go slot by slot; each slot follows its own settings."""
    for straight in (False, True):
        given = settings(*params, straight=straight)
        got = np.asarray(truncate(jnp.asarray(logits), given))
        compare(got, logits, params)


def compare(got, logits, params) -> None:
    nodes = logits.shape[1] // len(params)
    for column in range(logits.shape[1]):
        own = params[column // nodes]
        want = kept_by_hand(logits[:, column], own)
        np.testing.assert_array_equal(got[:, column] > -np.inf, want, err_msg=str(own))
        np.testing.assert_allclose(
            got[want, column], logits[want, column] / own.temperature, rtol=1e-6
        )


@pytest.mark.parametrize("vocab", [97, 2048])
@pytest.mark.parametrize("spread", [0.1, 3.0], ids=["flat", "peaked"])
def test_truncation_equals_numpy(vocab, spread):
    """All settings in one batch: a flat one sends all past the short list."""
    rng = np.random.default_rng(vocab)
    logits = spread * rng.normal(size=(vocab, 2 * len(SETTINGS)))
    check(logits.astype(np.float32), SETTINGS)


@pytest.mark.parametrize("params", SETTINGS[2:], ids=lambda p: f"{p.top_k}-{p.top_p}")
def test_each_setting_alone_equals_numpy(params):
    """So that no other slot chooses the slow path for it."""
    logits = 2.5 * np.random.default_rng(1).normal(size=(600, 2)).astype(np.float32)
    check(logits, [params])


def test_the_short_list_and_the_whole_vocabulary_agree():
    """Just decided by the short list, and just not."""
    for peaked in range(SHORT_LIST - 2, SHORT_LIST + 3):
        logits = np.full((600, 1), -4.0, np.float32)
        logits[:, 0] -= np.arange(600) * 1e-3
        logits[:peaked] += 4.0
        p = np.exp(logits[:, 0].astype(np.float64))
        top_p = float(p[:peaked].sum() / p.sum()) - 1e-4
        check(logits, [SamplingParams(temperature=1.0, top_p=top_p)])
        check(logits, [SamplingParams(temperature=1.0, top_k=peaked)])


def test_top_p_counts_the_mass_that_a_long_top_k_left():
    """Top-k past the short list: the rest of the vocabulary must not count."""
    logits = -1e-3 * np.arange(600, dtype=np.float32)[:, None]
    check(logits, [SamplingParams(temperature=1.0, top_k=300, top_p=0.4)])


@pytest.mark.parametrize("top_k", [2, SHORT_LIST])
def test_tokens_tied_with_the_last_kept_are_kept(top_k):
    """Coarse logits, as bfloat16 gives them, tie at the threshold all the time."""
    for vocab in (40, 400):
        logits = np.random.default_rng(vocab).integers(0, 3, (vocab, 2)) / 2.0
        logits[0], logits[1:] = 3.0, np.minimum(logits[1:], 0.5)
        for top_p in (1.0, 0.5, 0.9):
            params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p)
            check(logits.astype(np.float32), [params])


def halves(count: int) -> np.ndarray:
    """Logits whose exponentials, as jax computes them, are 1, 1/2, 1/4, …"""
    exp, found = jax.jit(jnp.exp), [0.0]
    for number in range(1, count):
        near = np.float32(-number * np.log(2.0))
        steps = np.arange(-64, 65, dtype=np.int32)
        close = (near.view(np.int32) + steps).view(np.float32)
        exact = close[np.asarray(exp(close)) == np.float32(2.0**-number)]
        assert len(exact), f"no float32 has the exponential 2^-{number}"
        found.append(exact[0])
    return np.array(found, np.float32)


@pytest.mark.parametrize("path", ["whole", "short list", "top-k", "search"])
def test_the_nucleus_ends_where_its_probability_is_reached(path):
    """Exactly there: sums of halves are exact, so that no rounding moves the edge.

    It is the least set of likeliest tokens whose probability is at least top_p.
    """
    vocab = 6 if path == "whole" else 2 * SHORT_LIST
    # All of the others have a probability of 0.
    logits = np.full(vocab, -300.0, np.float32)
    logits[-6:] = halves(5)[[4, 4, 3, 2, 1, 0]]
    # A flat column needs more of the vocabulary than the short list has.
    flat = -1e-4 * np.arange(vocab, dtype=np.float32)
    columns = jnp.asarray(np.stack([logits, flat], axis=1))
    other = SamplingParams(temperature=1.0, top_p=0.99 if path == "search" else 1.0)
    top_k = SHORT_LIST - 9 if path == "top-k" else 0
    for tokens, edge in enumerate(np.float32([1 / 2, 3 / 4, 7 / 8]), 1):
        below, above = (np.nextafter(edge, np.float32(end)) for end in (0, 1))
        for top_p, wanted in ((below, tokens), (edge, tokens), (above, tokens + 1)):
            own = SamplingParams(temperature=1.0, top_p=float(top_p), top_k=top_k)
            kept = np.isfinite(truncate(columns, settings(own, other))[:, 0])
            assert np.flatnonzero(kept).tolist() == list(range(vocab - wanted, vocab))


def test_a_greedy_slot_is_not_cut():
    """Its other settings mean nothing; its column comes back as it was."""
    logits = np.random.default_rng(2).normal(size=(97, 4)).astype(np.float32)
    greedy = SamplingParams(temperature=0.0, top_k=2, top_p=0.1, min_p=0.5)
    sampled = SamplingParams(temperature=0.7, top_k=2)
    got = np.asarray(truncate(jnp.asarray(logits), settings(greedy, sampled)))
    np.testing.assert_array_equal(got[:, :2], logits[:, :2])
    assert ((got[:, 2:] > -np.inf).sum(axis=0) == 2).all()


def test_noise_depends_on_seed_and_position_alone():
    """Not on the slot, the neighbours, or how many positions are asked for."""
    vocab = 37
    whole = np.asarray(
        noise_of(jnp.array([7, 9, 7], jnp.uint32), jnp.arange(12).reshape(3, 4), vocab)
    )
    assert whole.shape == (vocab, 3, 4) and whole.dtype == np.float32
    moved = np.asarray(
        noise_of(jnp.array([5, 9], jnp.uint32), jnp.array([[9, 5], [5, 4]]), vocab)
    )
    np.testing.assert_array_equal(moved[:, 1], whole[:, 1, [1, 0]])
    again = np.asarray(
        noise_of(jnp.array([8, 7], jnp.uint32), jnp.array([[3, 4], [9, 2]]), vocab)
    )
    np.testing.assert_array_equal(
        again[:, 1], np.stack([whole[:, 2, 1], whole[:, 0, 2]], axis=1)
    )
    # Neither the same position of another seed nor a neighbour is alike.
    everything = np.concatenate([whole.reshape(vocab, -1), moved[:, 0]], axis=1).T
    near = np.abs(everything[:, None] - everything[None]).max(axis=-1) < 0.5
    assert near.sum() == len(everything)


@pytest.mark.parametrize("vocab", [1, 1001])
def test_noise_is_that_of_jax_bit_for_bit(vocab):
    """The generator that it writes out, in a form that is quick."""
    seeds = jnp.array([0, 9, 2**32 - 1], jnp.uint32)
    positions = jnp.array([0, 77, 2**31 - 1])

    @jax.jit
    def theirs(seed, position):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (vocab,), jnp.float32)

    want = np.stack([theirs(*pair) for pair in zip(seeds, positions, strict=True)])
    got = jax.jit(noise.gumbel, static_argnums=2)(seeds, positions, vocab)
    np.testing.assert_array_equal(np.asarray(got).T, want)


def test_a_step_has_the_noise_of_the_next_positions():
    """Position p + d after depth d, kept or not; nothing is drawn if all is quiet."""
    own = noise.Noise(jnp.array([3, 4], jnp.uint32), jnp.array([5, 0]), 11)
    want = noise_of(own.seed, jnp.array([[5, 6, 7], [0, 1, 2]]), 11)
    kept = own.with_rows(2, quiet=jnp.bool_(False))
    assert kept.rows.shape == (2, 11, 2)
    for depth in range(3):
        for one in own, kept:
            got = jax.jit(noise.Noise.after)(one, depth)
            np.testing.assert_array_equal(got, want[:, :, depth])
    assert not np.asarray(own.with_rows(2, quiet=jnp.bool_(True)).rows).any()
    # Of a tree of a root alone.
    none = own.with_rows(0, quiet=jnp.bool_(False))
    np.testing.assert_array_equal(none.after(jnp.int32(0)), own.after(jnp.int32(0)))


P = np.array([0.35, 0.25, 0.15, 0.1, 0.06, 0.05, 0.03, 0.01])
PROPOSALS = 4000
# Quantile 0.999 of chi-square with 7 degrees of freedom.
CRITICAL = 24.32


def chi_square(noise) -> float:
    """Of argmax(log p + g) over the draws against P."""
    token = np.argmax(np.log(P)[:, None] + noise, axis=0)
    seen, expected = np.bincount(token, minlength=len(P)), PROPOSALS * P
    return float(((seen - expected) ** 2 / expected).sum())


@pytest.fixture(scope="module")
def one_seed():
    """Noise [V, 2 PROPOSALS] of one seed over neighbouring positions."""
    positions = jnp.arange(2 * PROPOSALS)[None]
    return np.asarray(noise_of(jnp.array([5], jnp.uint32), positions, len(P)))[:, 0]


def test_choices_follow_the_distribution_over_positions(one_seed):
    """Chi-square over 4000 positions of one seed, at level 0.001.

    Power: noise 15 % too wide, and noise shared by two neighbouring tokens (each
    shifts the distribution by about 0.03 in total variation), must both be refused.
    """
    g = one_seed[:, :PROPOSALS]
    assert chi_square(g) < CRITICAL
    assert chi_square(1.15 * g) > CRITICAL
    shared = g.copy()
    shared[1] = g[0]
    assert chi_square(shared) > CRITICAL


def test_choices_follow_the_distribution_over_seeds():
    seeds = jnp.arange(PROPOSALS, dtype=jnp.uint32)
    g = np.asarray(noise_of(seeds, jnp.full((PROPOSALS, 1), 17), len(P)))[:, :, 0]
    assert chi_square(g) < CRITICAL


def test_neighbouring_positions_are_independent(one_seed):
    """Chi-square of pairs of tokens, 63 degrees of freedom, level 0.001 (103.4)."""
    token = np.argmax(one_seed, axis=0)
    pairs = np.bincount(8 * token[::2] + token[1::2], minlength=64)
    expected = PROPOSALS / 64
    assert ((pairs - expected) ** 2 / expected).sum() < 103.4


def test_a_greedy_slot_in_a_mixed_batch_ignores_noise():
    """It takes the first maximum of its logits; its neighbour does not."""
    rng = np.random.default_rng(3)
    V, T = 97, 4
    logits = rng.normal(size=(V, 2 * T)).astype(np.float32)
    own = 20 * rng.gumbel(size=(V, 2)).astype(np.float32)
    mixed = settings(SamplingParams(), SamplingParams(temperature=1.0))
    got = np.asarray(choose(jnp.asarray(logits), jnp.asarray(own), mixed))
    np.testing.assert_array_equal(got[:T], logits[:, :T].argmax(axis=0))
    scores = logits[:, T:] + own[:, 1:]
    np.testing.assert_array_equal(got[T:], scores.argmax(axis=0))
    assert (got[T:] != logits[:, T:].argmax(axis=0)).any()


def test_a_nearly_zero_temperature_is_greedy():
    logits = np.random.default_rng(4).normal(size=(97, 1)).astype(np.float32)
    own = jnp.full((97, 1), 1e6).at[5].set(2e6)
    for temperature in (0.0, 1e-6, 1e-30):
        params = settings(SamplingParams(temperature=temperature))
        got = choose(jnp.asarray(logits), own, params)
        assert int(got[0]) == logits[:, 0].argmax()
