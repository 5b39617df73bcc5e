"""Every lossless rule gives the target's own distribution, to rounding, by enumeration.

The rules as the papers have them (`enumeration`), and the shipped, jitted ones driven
through the same enumeration (`driving`): float64, error below 1e-10.
"""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from tests.acceptance import enumeration as ref
from tests.acceptance.driving import arrays, judge, shipped_distribution
from tests.acceptance.shapes import (
    ALLOTTED,
    EXACT,
    RULES,
    TOPOLOGIES,
    best_tree,
    depth_of,
    meta_of,
    tempered,
    trees_of,
)
from treespec_jax.acceptance.block import BlockRule
from treespec_jax.acceptance.exact import exact_match
from treespec_jax.acceptance.terminal import TerminalRule
from treespec_jax.acceptance.token import TokenRule
from treespec_jax.acceptance.traversal import TraversalRule
from treespec_jax.acceptance.typical import TypicalRule

pytestmark = pytest.mark.slow

SAMPLED = [
    (rule, name)
    for rule, name in itertools.product(RULES, (*TOPOLOGIES, *ALLOTTED))
    if rule != "block" or name.startswith("chain")
]


@pytest.mark.parametrize("rule, name", SAMPLED)
def test_sampled_trees(rule, name):
    """Both the papers' rule and the shipped one, and as many tokens accepted."""
    shipped, paper = RULES[rule]
    for world in ref.worlds(depth_of(name)):
        trees = trees_of(name, world)
        assert sum(t.probability for t in trees) == pytest.approx(1.0, abs=1e-12)
        want = world.distribution()
        assert np.abs(ref.text_distribution(world, trees, paper) - want).max() < EXACT
        with jax.enable_x64(True):
            distribution, mean = shipped_distribution(
                shipped, world, trees, meta_of(name)
            )
        assert np.abs(distribution - want).max() < EXACT
        own = sum(t.probability * ref.accepted(paper(world, t)) for t in trees)
        assert mean == pytest.approx(own, abs=EXACT)


@pytest.mark.parametrize("rule, name", [("token", "late"), ("traversal", "tapered")])
@pytest.mark.parametrize(
    "temperature", [("depth", 0.5), ("siblings", 1.0), ("entropy", 1.0)]
)
def test_a_drafter_of_another_temperature(rule, name, temperature):
    """Colder or hotter from depth to depth; `test_sampled` grows these very trees."""
    meta = meta_of(name)
    for world in ref.worlds(depth_of(name))[1::4]:
        other = tempered(world, *temperature, meta["max_children"])
        with jax.enable_x64(True):
            distribution, _ = shipped_distribution(
                RULES[rule][0], other, trees_of(name, other), meta
            )
        assert np.abs(distribution - world.distribution()).max() < EXACT


@pytest.mark.parametrize("name", ["chain2", "late", "full"])
def test_siblings_drawn_with_replacement(name):
    """Equal siblings among them; only the token rule has a form for these."""
    for world in ref.worlds(2)[1::3]:
        trees = trees_of(name, world, replacement=True)
        want = world.distribution()
        own = ref.text_distribution(world, trees, ref.token, replacement=True)
        assert np.abs(own - want).max() < EXACT
        with jax.enable_x64(True):
            distribution, _ = shipped_distribution(
                TokenRule(), world, trees, meta_of(name, True)
            )
        assert np.abs(distribution - want).max() < EXACT


@pytest.mark.parametrize("name", ["chain3", "full", "tapered", "lopsided"])
def test_the_terminal_form_is_exact_match_in_distribution(name):
    """The distribution of p, node by node; E = sum of p(path)."""
    for world in ref.worlds(depth_of(name)):
        tree = best_tree(world, TOPOLOGIES[name])
        with jax.enable_x64(True):
            distribution, mean = shipped_distribution(
                TerminalRule(), world, [tree], one_draw=True
            )
        assert np.abs(distribution - world.distribution()).max() < EXACT
        followed = ref.accepted(ref.follow(world, tree))
        probabilities = sum(world.probability(path) for path in tree.paths[1:])
        assert mean == pytest.approx(followed, abs=EXACT)
        assert mean == pytest.approx(probabilities, abs=EXACT)


@pytest.mark.parametrize("name", ["chain3", "full", "tapered", "lopsided"])
def test_exact_match_gives_the_distribution_whatever_the_tree(name):
    """Every token that could be chosen after every node, with its probability.

    The distribution is p's tree by tree, not on the whole: a tree may depend on the
    noise.
    """
    follow = jax.jit(exact_match, static_argnums=2)
    for world in ref.worlds(depth_of(name))[1::4]:
        drawn = trees_of(name, world)
        for tree in [best_tree(world, TOPOLOGIES[name]), drawn[0], drawn[-1]]:
            count = len(tree.parents)
            choice = np.array(list(itertools.product(range(3), repeat=count)))
            weight = np.prod(
                [world.p[path][choice[:, n]] for n, path in enumerate(tree.paths)],
                axis=0,
            )
            nodes, _ = arrays(world, [tree] * len(choice), None)
            got = follow(nodes, choice.astype(np.int32), world.depth)
            emitted, kept = np.asarray(got.emitted), np.asarray(got.count)
            distribution = np.zeros((3,) * (world.depth + 1))
            for row in range(len(choice)):
                path = tuple(int(x) for x in emitted[row, : kept[row] + 1])
                world.fill(distribution, path, weight[row])
            assert np.abs(distribution - world.distribution()).max() < EXACT
            probabilities = sum(world.probability(path) for path in tree.paths[1:])
            assert (weight * kept).sum() == pytest.approx(probabilities, abs=EXACT)


@pytest.mark.parametrize("name", ["chain3", "full", "lopsided"])
def test_typical_acceptance_is_medusas(name):
    """Lossy, so that it is held to the paper's rule, and shown to be lossy."""
    wrong = 0.0
    for world in ref.worlds(depth_of(name))[::3]:
        trees = trees_of(name, world)
        with jax.enable_x64(True):
            distribution, _ = shipped_distribution(TypicalRule(), world, trees)
        assert (
            np.abs(
                distribution - ref.text_distribution(world, trees, ref.typical)
            ).max()
            < EXACT
        )
        wrong = max(wrong, np.abs(distribution - world.distribution()).max())
    assert wrong > 0.01


def test_traversal_on_a_chain_is_the_block_rule():
    """The same nodes, distributions of the last token, and sides of every threshold.

    The block rule gives a bound of a threshold where the uniform is no lower than the
    bound, or a deeper node has passed.
    """
    for world in ref.worlds(3):
        tree, scores = arrays(world, trees_of("chain3", world), meta_of("chain3"))
        rng = np.random.default_rng(0)
        accept = rng.random(tree.tokens.shape)
        with jax.enable_x64(True):
            node, distribution, ours = judge(TraversalRule(), tree, scores, accept)
            same, own, theirs = judge(BlockRule(), tree, scores, accept)
        np.testing.assert_array_equal(node, same)
        np.testing.assert_allclose(distribution, own, atol=1e-12)
        ours, theirs, accept = (np.asarray(x)[:, 1:] for x in (ours, theirs, accept))
        assert (theirs >= ours - 1e-12).all()
        decided = np.arange(1, tree.tokens.shape[1]) >= np.asarray(node)[:, None]
        assert ((accept < ours) == (accept < theirs))[decided].all()


def test_what_the_block_rule_accepts():
    """E[k] = sum of E[w_i], and never less than the token rule."""
    for world in ref.worlds(3):
        trees = trees_of("chain3", world)
        with jax.enable_x64(True):
            _, block = shipped_distribution(
                BlockRule(), world, trees, meta_of("chain3")
            )
            _, token = shipped_distribution(
                TokenRule(), world, trees, meta_of("chain3")
            )
        total = 0.0
        for tree in trees:
            w = 1.0
            for path in tree.paths[1:]:
                ratio = world.p[path[:-1]][path[-1]] / world.q[path[:-1]][path[-1]]
                w = min(1.0, w * ratio)
                total += tree.probability * w
        assert block == pytest.approx(total, abs=EXACT)
        assert block >= token - EXACT


def one_hot(x):
    return np.eye(len(x))[x.argmax()]


def without_first(x):
    """No probability for token 0."""
    return np.array([0.0, *x[1:]]) / x[1:].sum()


EDGES = {
    "q = p": lambda w: w.replace(),
    "q lacks a token": lambda w: w.replace(q=without_first),
    "p lacks a token": lambda w: w.replace(p=without_first),
    "p one-hot": lambda w: w.replace(p=one_hot),
    "q one-hot": lambda w: w.replace(q=one_hot),
    "both one-hot": lambda w: w.replace(p=one_hot, q=one_hot),
    "q nearly one-hot": lambda w: w.replace(
        q=lambda x: (one_hot(x) + 1e-9 * x) / (1 + 1e-9)
    ),
}


def edge_world(name, depth):
    mix = 1.0 if name == "q = p" else 0.3
    return EDGES[name](ref.World(depth, 1.0, mix, seed=5))


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(
    "rule, name", [("token", "full"), ("block", "chain3"), ("traversal", "full")]
)
def test_degenerate_distributions(rule, name, edge):
    """Exact in float64; in float32, what the engine runs, to a few roundings."""
    world = edge_world(edge, depth_of(name))
    trees, want = trees_of(name, world), world.distribution()
    with jax.enable_x64(True):
        distribution, _ = shipped_distribution(
            RULES[rule][0], world, trees, meta_of(name)
        )
    assert np.abs(distribution - want).max() < EXACT
    distribution, _ = shipped_distribution(
        RULES[rule][0], world, trees, meta_of(name), tolerance=1e-6
    )
    assert np.abs(distribution - want).max() < 2e-6


@pytest.mark.parametrize("edge", EDGES)
def test_degenerate_distributions_without_samples(edge):
    """Terminal form and typical acceptance, all nodes valid and one of them not."""
    world = edge_world(edge, 2)
    whole = best_tree(world, TOPOLOGIES["full"])
    for tree in (whole, whole.without(1), whole.without(4)):
        want = world.distribution()
        paper = ref.text_distribution(world, [tree], ref.typical)
        for x64, bar in ((True, EXACT), (False, 2e-6)):
            with jax.enable_x64(x64):
                distribution, _ = shipped_distribution(
                    TerminalRule(), world, [tree], one_draw=True
                )
                lossy, _ = shipped_distribution(TypicalRule(), world, [tree])
            assert np.abs(distribution - want).max() < bar
            assert np.abs(lossy - paper).max() < bar


@pytest.mark.parametrize(
    "rule, name", [("token", "full"), ("block", "chain3"), ("traversal", "full")]
)
def test_a_drafter_of_fewer_tokens(rule, name):
    """Its columns are shorter than the target's; the last token is never drafted."""
    base = ref.World(depth_of(name), 1.0, 0.3, seed=7)
    world = base.replace(q=lambda x: np.array([*x[:-1], 0.0]) / x[:-1].sum())
    trees = trees_of(name, world)
    with jax.enable_x64(True):
        distribution, _ = shipped_distribution(
            RULES[rule][0], world, trees, meta_of(name), draft_vocab=2
        )
    assert np.abs(distribution - world.distribution()).max() < EXACT
