"""What choosing loses against plain decoding and against the best fixed shape."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.simulated import LADDER, STEPS, Machine, Simulation, relative
from treespec_jax.engine.costs import Load
from treespec_jax.engine.timing import Choice
from treespec_jax.trees.shapes import ROOT_ONLY

# Like SmolLM2-135M with an EAGLE layer on two cores, and like guesses without a model;
# like an accelerator; and like a target so small that no tree pays.
LAYER = Machine()
GUESSES = Machine((1.6, 1.3, 2.4, 3.7), level=0.03, dispatch=0.05)
WIDE = Machine((1.25, 1.2, 1.4, 1.7), level=0.08, dispatch=0.3, cpu=False)
TINY = Machine((4.0, 2.9, 5.5, 8.0), level=0.4, dispatch=0.8)
# Like a model of 5M parameters: the host's share is large, and so is what a tree
# leaves behind in the processor's caches.
SMALL = Machine(
    (2.7, 2.2, 3.6, 5.5), level=0.55, dispatch=0.8, switch=1.6, seconds=0.002
)
GOOD, LONG, SHORT = 0.7, 128, 32


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("machine", [LAYER, GUESSES], ids=["a layer", "guesses"])
def test_hopeless_texts_lose_two_percent_behind_the_first_tokens(machine, rate):
    with_model, texts = machine is LAYER, [[rate] * 1500]
    plain = Simulation(machine, 1, with_model, fixed=ROOT_ONLY).run(texts)
    times = []
    for seed in range(4):
        one = Simulation(machine, seed, with_model)
        one.run([[rate] * 64])
        times.append(one.run(texts))
    assert np.mean(times) <= 1.02 * plain


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_hopeless_texts_in_turn_lose_three_percent(rate, seed):
    x_plain, _, _ = relative(LAYER, [[rate] * LONG] * 8, seed=seed)
    assert x_plain >= 0.97


def test_no_tree_is_grown_where_none_pays():
    x_plain, _, one = relative(TINY, [[0.4] * LONG] * 16)
    assert x_plain >= 0.97
    assert one.steps["none"] > 0.9 * one.steps.total()


def mean(machine, texts, **settings) -> tuple[float, float]:
    """`relative` of four seeds, of which a single one hangs on a few steps."""
    found = [relative(machine, texts, seed=n, **settings)[:2] for n in range(4)]
    return tuple(np.mean(found, axis=0))


@pytest.mark.parametrize("machine", [LAYER, WIDE], ids=["two cores", "a GPU"])
def test_good_texts_have_the_best_shape(machine):
    """And nearly from the first one on."""
    texts = [[GOOD] * LONG] * 24
    assert mean(machine, texts)[1] >= 0.96
    assert mean(machine, texts, earlier=texts)[1] >= 0.97


def test_a_text_that_turns_is_followed():
    """Both ways, quicker than plain decoding and than any one shape."""
    for first, second in ((0.05, GOOD), (GOOD, 0.05)):
        turning = [first] * 300 + [second] * 300
        x_plain, x_best = mean(LAYER, [turning])
        assert x_plain > 1.15 and x_best > 0.97


def test_short_and_mixed_texts_never_lose():
    hopeless, good = [0.05] * SHORT, [GOOD] * SHORT
    assert mean(LAYER, [hopeless] * 30)[0] >= 0.97
    assert mean(LAYER, [good, hopeless] * 15)[0] >= 0.97
    long = [[0.05] * LONG, [GOOD] * LONG] * 10
    assert min(mean(LAYER, long)) >= 0.97


def test_batches_lose_no_more():
    dear = Machine((3.2, 2.2, 5.0, 8.0), level=0.15)
    assert mean(dear, [[0.3] * LONG] * 24, slots=4)[0] >= 0.97
    mixed = [[rate] * LONG for rate in (0.05, 0.7, 0.3, 0.6)] * 8
    assert min(mean(LAYER, mixed, slots=4)) >= 0.97


def test_what_is_no_step_is_told_apart_from_steps():
    """Where plain decoding is in use, and trees are tried a few steps at a time."""
    load, off, hosts = Load.of(1, 0), [], []
    bare = SMALL.time(Choice(ROOT_ONLY, None), STEPS, ROOT_ONLY)
    for seed in range(6):
        _, _, one = relative(SMALL, [[0.2] * LONG] * 40, seed=seed)
        costs = one.chooser.costs
        hosts.append(costs.host(load))
        for shape in LADDER[:-1]:
            if costs.is_measured(shape, load, 2):
                true = SMALL.time(Choice(shape, None), STEPS, shape) / bare
                off.append(costs.relative(shape, load) / true)
    assert np.median(hosts) == pytest.approx(SMALL.dispatch, abs=0.3)
    assert len(off) >= 6 and abs(np.mean(off) - 1) < 0.08


@pytest.mark.parametrize("rate", [0.45, 0.6, GOOD])
def test_a_small_model_has_nearly_the_best_shape(rate):
    texts = [[rate] * LONG] * 24
    assert mean(SMALL, texts, earlier=texts)[1] > 0.9
    assert mean(SMALL, texts, earlier=texts, measured=True)[1] > 0.9


# Texts of a few dispatches: hopeless, hard, easy, and such as repeat themselves.
BRIEF = {
    "hopeless": [[0.05] * 96],
    "hard": [[0.3] * 96],
    "easy": [[GOOD] * 96],
    "mixed": [[rate] * 96 for rate in (0.3, GOOD, 0.5)],
    "repeating": [[0.3] * spared + [0.97] * (96 - spared) for spared in (24, 48, 36)],
}


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("texts", BRIEF.values(), ids=BRIEF)
def test_a_few_short_texts_lose_nothing_where_costs_are_measured(texts, slots):
    """And have nearly the best shape, where it is found out for little."""
    texts = (4 * texts)[: 4 if slots > 1 else 3]
    for machine in (LAYER, GUESSES, SMALL):
        settings = dict(slots=slots, measured=True, with_model=machine is not GUESSES)
        x_plain, x_best = mean(machine, texts, **settings)
        assert x_plain >= 0.965
        assert x_best >= 0.93 or machine is SMALL
