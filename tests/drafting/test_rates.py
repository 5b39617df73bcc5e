"""How often guesses came true: properties, and the same in plain Python."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.drafting import host
from treespec_jax.drafting.rates import MEMORY, PRIOR, Rates

CELLS, SEEN = 5, 16
START = np.array([0.0, 0.1, 0.5, 0.9, 1.0])


@jax.jit
def after(rates, cell, hit, tried):
    return rates.after(cell, hit, tried)


@jax.jit
def log_of(rates):
    return rates.log(np.arange(CELLS))


def observe(rates, cells, hits):
    """Takes in up to SEEN observations; the rest of the arrays says nothing."""
    tried = np.arange(SEEN) < len(cells)
    cell = np.resize(np.array([*cells, 0], np.int32), SEEN)
    hit = np.resize(np.array([*hits, True]), SEEN) | ~tried
    shape = 2, SEEN // 2
    return after(rates, *(x.reshape(shape) for x in (cell, hit, tried)))


def rates_of(rates):
    return np.asarray(rates.hits) / np.asarray(rates.tries)


def test_they_begin_with_their_prior():
    start = Rates.start(START)
    np.testing.assert_allclose(rates_of(start), START)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(log_of(start), np.log(START), rtol=1e-6)


def test_a_prior_counts_as_much_as_some_observations():
    rates = Rates.start(START)
    for number in range(1, 9):
        rates = observe(rates, [1, 1, 3], [True, True, False])
        found = rates_of(rates)
        hits, tries = START * PRIOR, np.full(CELLS, PRIOR)
        hits[1] += 2 * number
        tries[1] += 2 * number
        tries[3] += number
        np.testing.assert_allclose(found, hits / tries, rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_they_are_shares_whatever_is_seen(seed):
    """Never below 0 or above 1, of no more than MEMORY observations."""
    rng = np.random.default_rng(seed)
    rates = Rates.start(START)
    plain = host.Rates(rates)
    chance = rng.random(CELLS)
    for _ in range(200):
        cells = rng.integers(0, CELLS - 1, rng.integers(0, SEEN + 1))
        came_true = rng.random(len(cells)) < chance[cells]
        rates = observe(rates, cells, came_true)
        plain.observe(list(zip(cells.tolist(), came_true.tolist(), strict=True)))
        hits, tries = np.asarray(rates.hits), np.asarray(rates.tries)
        assert (hits >= 0).all() and (hits <= tries).all()
        assert (tries <= MEMORY * (1 + 1e-6)).all() and (tries >= PRIOR).all()
        np.testing.assert_allclose(hits, plain.hits, rtol=1e-4)
        np.testing.assert_allclose(tries, plain.tries, rtol=1e-4)
    # Nobody looked at the last cell.
    assert (hits[-1], tries[-1]) == (PRIOR * START[-1], PRIOR)
    assert abs(rates_of(rates)[:-1] - chance[:-1]).max() < 0.15


def test_the_order_of_observations_does_not_matter():
    rng = np.random.default_rng(0)
    cells, hits = rng.integers(0, CELLS, SEEN), rng.random(SEEN) < 0.5
    order = rng.permutation(SEEN)
    one = observe(Rates.start(START), cells, hits)
    other = observe(Rates.start(START), cells[order], hits[order])
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_old_observations_are_forgotten():
    """A cell that was wrong for ever is as good as its last MEMORY observations."""
    found, turns = [], int(MEMORY) // SEEN
    for wrong in (2 * turns, 8 * turns):
        rates = Rates.start(START)
        for _ in range(wrong):
            rates = observe(rates, [2] * SEEN, [False] * SEEN)
        for _ in range(turns):
            rates = observe(rates, [2] * SEEN, [True] * SEEN)
        found.append(rates_of(rates)[2])
    assert found[0] == pytest.approx(found[1], abs=1e-2)
    assert 0.5 < found[1] < 0.75
