"""Well-known ways to get a rule wrong: the enumeration refuses each of them.

An error of more than WRONG for at least one of the worlds, against less than 1e-10 for
the right form (test_distributions).
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.acceptance import enumeration as ref
from tests.acceptance.driving import arrays, judge, last_tokens, shipped_distribution
from tests.acceptance.shapes import EXACT, RULES, meta_of, tempered, trees_of
from treespec_jax.sampling import draw

pytestmark = pytest.mark.slow

WRONG = 5e-3
WORLDS = (1, 5)


def error(distribution, world) -> float:
    return float(np.abs(distribution - world.distribution()).max())


def shipped_error(rule, world, trees, meta) -> float:
    with jax.enable_x64(True):
        distribution, _ = shipped_distribution(RULES[rule][0], world, trees, meta)
    return error(distribution, world)


def by_falling_q(world, tree, a, b):
    """Two siblings in order of q, as if they had been drawn so."""
    q = world.q[tree.paths[a][:-1]]
    if q[tree.paths[a][-1]] >= q[tree.paths[b][-1]]:
        return tree
    tree = tree.swapped(a, b)
    left = list(tree.left)
    left[b] = 1.0 - q[tree.paths[a][-1]]
    return dataclasses.replace(tree, left=left)


@pytest.mark.parametrize("rule", ["token", "traversal"])
def test_siblings_sorted_by_q(rule):
    errors = []
    for world in (ref.worlds(2)[i] for i in WORLDS):
        trees = [by_falling_q(world, t, 3, 4) for t in trees_of("late", world)]
        errors.append(shipped_error(rule, world, trees, meta_of("late")))
        paper = ref.text_distribution(world, trees, RULES[rule][1])
        assert error(paper, world) == pytest.approx(errors[-1], abs=EXACT)
    assert max(errors) > WRONG


@pytest.mark.parametrize("rule", ["token", "traversal"])
def test_a_sampled_node_pruned(rule):
    """The less likely of two siblings is dropped after it was drawn."""
    errors = []
    for world in (ref.worlds(2)[i] for i in WORLDS):
        pruned = []
        for tree in trees_of("late", world):
            q = world.q[tree.paths[3][:-1]]
            worst = min((3, 4), key=lambda n: q[tree.paths[n][-1]])
            pruned.append(tree.without(worst))
        errors.append(shipped_error(rule, world, pruned, meta_of("late")))
    assert max(errors) > WRONG


@pytest.mark.parametrize("rule", ["token", "traversal"])
def test_judged_by_another_temperature_than_sampled_by(rule):
    """Trees of a drafter that cools with depth, compared with its q as it was."""
    errors, meta = [], meta_of("late")
    for world in (ref.worlds(2)[i] for i in WORLDS):
        other = tempered(world, "depth", 0.5, meta["max_children"])
        trees = trees_of("late", other)
        errors.append(shipped_error(rule, world, trees, meta))
    assert max(errors) > WRONG


@pytest.mark.parametrize("rule", ["token", "traversal"])
def test_q_not_updated(rule):
    """Judged as if siblings had been drawn with replacement."""
    errors = []
    for world in (ref.worlds(2)[i] for i in WORLDS):
        trees = [
            dataclasses.replace(t, left=[1.0] * len(t.left))
            for t in trees_of("late", world)
        ]
        errors.append(shipped_error(rule, world, trees, meta_of("late", True)))
        paper = ref.text_distribution(world, trees, RULES[rule][1], update=False)
        assert error(paper, world) == pytest.approx(errors[-1], abs=EXACT)
    assert max(errors) > WRONG


@pytest.mark.parametrize("mutation", ["stop", "product"])
def test_the_block_rule_must_try_every_node_by_itself(mutation):
    errors = []
    for world in (ref.worlds(3)[i] for i in WORLDS):
        trees = trees_of("chain3", world)
        distribution = ref.text_distribution(
            world, trees, ref.block, **{mutation: True}
        )
        assert distribution.sum() == pytest.approx(1.0)
        errors.append(error(distribution, world))
    assert max(errors) > WRONG


def test_proposal_and_last_token_from_one_stream():
    """One draft, one uniform for its draw and for the token after a rejection.

    The middle of every piece of [0, 1) between the ends of q's and the residual's
    cumulative sums stands for the piece.
    """
    errors = {"shared": 0.0, "own": 0.0}
    for world in (ref.World(1, 1.0, 0.0, seed) for seed in range(4)):
        trees = trees_of_chain(world)
        meta = dict(nodes=(0,), level_sizes=(1, 1), max_children=(1,))
        with jax.enable_x64(True):
            tree, scores = arrays(world, trees, meta)
            # The root's residual, whichever token was drafted.
            node, mass, probability = judge(
                RULES["token"][0], tree, scores, np.ones(tree.tokens.shape)
            )
            assert not np.asarray(node).any()
            mass, probability = np.asarray(mass)[:, 0], np.asarray(probability)[:, 1]
            q = world.q[()]
            ends = np.unique(np.concatenate([[0], np.cumsum(q), np.cumsum(mass), [1]]))
            middle = (ends[1:] + ends[:-1]) / 2
            pairs = np.stack([middle, middle], axis=1)
            columns = np.log(np.broadcast_to(q[:, None], (3, len(middle))))
            drafted = np.asarray(draw.siblings(columns, pairs[:, None])[0])[:, 0]
            last = last_tokens(mass, pairs)
        first = {"shared": np.zeros(3), "own": np.zeros(3)}
        for length, x, y in zip(np.diff(ends), drafted, last, strict=True):
            for distribution in first.values():
                distribution[x] += length * probability[x]
            first["shared"][y] += length * (1 - probability[x])
            first["own"] += length * (1 - probability[x]) * mass
        for name, distribution in first.items():
            wrong = np.abs(distribution - world.p[()]).max()
            errors[name] = max(errors[name], float(wrong))
    assert errors["own"] < EXACT
    assert errors["shared"] > WRONG


def trees_of_chain(world):
    """Chains of one node, in order of their token."""
    return ref.draw(world, ref.static((-1, 0)), 1)
