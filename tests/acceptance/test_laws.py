"""Every lossless rule gives the target's own law, to rounding, by enumeration.

The rules as the papers have them (`enumeration`), and the shipped, jitted ones driven
through the same enumeration (`driving`): float64, error below 1e-10.
"""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from tests.acceptance import enumeration as ref
from tests.acceptance.driving import arrays, judge, shipped_law
from treespec_jax.acceptance.block import BlockRule
from treespec_jax.acceptance.exact import exact_match
from treespec_jax.acceptance.terminal import TerminalRule
from treespec_jax.acceptance.token import TokenRule
from treespec_jax.acceptance.traversal import TraversalRule
from treespec_jax.acceptance.typical import TypicalRule
from treespec_jax.drafting import sampled
from treespec_jax.trees.shapes import DynamicShape
from treespec_jax.trees.topology import Topology

EXACT = 1e-10
RULES = {
    "token": (TokenRule(), ref.token),
    "traversal": (TraversalRule(), ref.traversal),
    "block": (BlockRule(), ref.block),
}
TOPOLOGIES = {
    "chain2": (-1, 0, 1),
    "chain3": (-1, 0, 1, 2),
    "full": (-1, 0, 0, 1, 1, 2, 2),
    "tapered": (-1, 0, 0, 0, 1, 2),
    "lopsided": (-1, 0, 0, 1, 1, 3),
    "late": (-1, 0, 0, 2, 2),
    "overfull": (-1, 0, 0, 0, 0, 4),
}
DYNAMIC = {
    "dynamic5@2": DynamicShape(5, 2, 0, 0),
    "dynamic6@3": DynamicShape(6, 3, 0, 0),
}


def depth_of(name) -> int:
    if name in DYNAMIC:
        return DYNAMIC[name].depth
    return Topology(TOPOLOGIES[name]).depth


def meta_of(name, replacement=False) -> dict:
    """Static fields of the tree's `Proposal`."""
    if name in DYNAMIC:
        levels = sampled.level_sizes(DYNAMIC[name])
        nodes = tuple(range(sum(levels[:-1])))
        most = tuple(min(n, 3) for n in levels[1:])
    else:
        topology = Topology(TOPOLOGIES[name])
        depths = range(topology.depth)
        nodes = tuple(int(n) for d in depths for n in topology.inner(d))
        levels = tuple(len(topology.level(d)) for d in range(topology.depth + 1))
        most = tuple(
            int(topology.ranks[topology.level(d + 1)].max()) + 1 for d in depths
        )
    return dict(nodes=nodes, levels=levels, most=most, replacement=replacement)


def allotted(world, sizes):
    """Parents of the next level of a dynamic tree: one child at a time."""

    def levels(tree, level):
        depth = list(np.cumsum(sizes) - sizes).index(level[0])
        budget = sizes[depth + 1]
        most = min(budget, world.vocab)
        worth = {}
        for node in level:
            path = tree.paths[node]
            if path is not None:
                steps = [world.q[path[:i]][x] for i, x in enumerate(path)]
                worth[node] = float(np.prod(steps))
        parents = []
        for _ in range(budget):
            open_ = [n for n in worth if parents.count(n) < most and worth[n] > 0]
            if open_:
                parents.append(max(open_, key=worth.get))
                worth[parents[-1]] *= sampled.DECAY
        # Places that nobody got stay empty.
        return sorted(parents) + [-1] * (budget - len(parents))

    return levels


def trees_of(name, world, replacement=False):
    """Every tree of a shape that q can draw."""
    if name in DYNAMIC:
        sizes = sampled.level_sizes(DYNAMIC[name])
        return ref.draw(world, allotted(world, sizes), world.depth)
    wish = ref.static(TOPOLOGIES[name])
    return ref.draw(world, wish, world.depth, replacement)


SAMPLED = [
    (rule, name)
    for rule, name in itertools.product(RULES, (*TOPOLOGIES, *DYNAMIC))
    if rule != "block" or name.startswith("chain")
]


@pytest.mark.parametrize("rule, name", SAMPLED)
def test_sampled_trees(rule, name):
    """Both the papers' rule and the shipped one, and as many tokens accepted."""
    shipped, paper = RULES[rule]
    for world in ref.worlds(depth_of(name)):
        trees = trees_of(name, world)
        assert sum(t.chance for t in trees) == pytest.approx(1.0, abs=1e-12)
        want = world.law()
        assert np.abs(ref.text_law(world, trees, paper) - want).max() < EXACT
        with jax.enable_x64(True):
            law, mean = shipped_law(shipped, world, trees, meta_of(name))
        assert np.abs(law - want).max() < EXACT
        own = sum(t.chance * ref.accepted(paper(world, t)) for t in trees)
        assert mean == pytest.approx(own, abs=EXACT)


@pytest.mark.parametrize("name", ["chain2", "late", "full"])
def test_siblings_drawn_with_replacement(name):
    """Equal siblings among them; only the token rule has a form for these."""
    for world in ref.worlds(2)[1::3]:
        trees = trees_of(name, world, replacement=True)
        want = world.law()
        own = ref.text_law(world, trees, ref.token, replacement=True)
        assert np.abs(own - want).max() < EXACT
        with jax.enable_x64(True):
            law, _ = shipped_law(TokenRule(), world, trees, meta_of(name, True))
        assert np.abs(law - want).max() < EXACT


def best_tree(world, topology):
    """The tree of q's likeliest tokens, rank by rank."""
    topology = Topology(topology)
    paths = [()]
    for node in range(1, topology.num_nodes):
        above = paths[topology.parents[node]]
        order = np.argsort(-world.q[above], kind="stable")
        paths.append((*above, int(order[topology.ranks[node]])))
    count = len(paths)
    parents = [max(p, 0) for p in topology.parents]
    return ref.Tree(parents, paths, [1.0] * count, [1.0] * count, [0.0] * count)


@pytest.mark.parametrize("name", ["chain3", "full", "tapered", "lopsided"])
def test_the_terminal_form_is_exact_match_in_law(name):
    """The law of p, node by node that of following samples; E = sum of p(path)."""
    for world in ref.worlds(depth_of(name)):
        tree = best_tree(world, TOPOLOGIES[name])
        with jax.enable_x64(True):
            law, mean = shipped_law(TerminalRule(), world, [tree], one_draw=True)
        assert np.abs(law - world.law()).max() < EXACT
        followed = ref.accepted(ref.follow(world, tree))
        chances = sum(world.chance(path) for path in tree.paths[1:])
        assert mean == pytest.approx(followed, abs=EXACT)
        assert mean == pytest.approx(chances, abs=EXACT)


@pytest.mark.parametrize("name", ["chain3", "full", "tapered", "lopsided"])
def test_exact_match_gives_the_law_whatever_the_tree(name):
    """Every token that could be chosen after every node, with its chance.

    The law is p's tree by tree, not on the whole: a tree may depend on the noise.
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
            law = np.zeros((3,) * (world.depth + 1))
            for row in range(len(choice)):
                path = tuple(int(x) for x in emitted[row, : kept[row] + 1])
                world.fill(law, path, weight[row])
            assert np.abs(law - world.law()).max() < EXACT
            chances = sum(world.chance(path) for path in tree.paths[1:])
            assert (weight * kept).sum() == pytest.approx(chances, abs=EXACT)


@pytest.mark.parametrize("name", ["chain3", "full", "lopsided"])
def test_typical_acceptance_is_medusas(name):
    """Lossy, so that it is held to the paper's rule, and shown to be lossy."""
    wrong = 0.0
    for world in ref.worlds(depth_of(name))[::3]:
        trees = trees_of(name, world)
        with jax.enable_x64(True):
            law, _ = shipped_law(TypicalRule(), world, trees)
        assert np.abs(law - ref.text_law(world, trees, ref.typical)).max() < EXACT
        wrong = max(wrong, np.abs(law - world.law()).max())
    assert wrong > 0.01


def test_traversal_on_a_chain_is_the_block_rule():
    """The same nodes, laws of the last token, and sides of every threshold.

    The block rule gives a bound of a threshold where the uniform is no lower than the
    bound, or a deeper node has passed.
    """
    for world in ref.worlds(3):
        tree, scores = arrays(world, trees_of("chain3", world), meta_of("chain3"))
        rng = np.random.default_rng(0)
        accept = rng.random(tree.tokens.shape)
        with jax.enable_x64(True):
            node, law, ours = judge(TraversalRule(), tree, scores, accept)
            same, own, theirs = judge(BlockRule(), tree, scores, accept)
        np.testing.assert_array_equal(node, same)
        np.testing.assert_allclose(law, own, atol=1e-12)
        ours, theirs, accept = (np.asarray(x)[:, 1:] for x in (ours, theirs, accept))
        assert (theirs >= ours - 1e-12).all()
        decided = np.arange(1, tree.tokens.shape[1]) >= np.asarray(node)[:, None]
        assert ((accept < ours) == (accept < theirs))[decided].all()


def test_what_the_block_rule_accepts():
    """E[k] = sum of E[w_i], and never less than the token rule."""
    for world in ref.worlds(3):
        trees = trees_of("chain3", world)
        with jax.enable_x64(True):
            _, block = shipped_law(BlockRule(), world, trees, meta_of("chain3"))
            _, token = shipped_law(TokenRule(), world, trees, meta_of("chain3"))
        total = 0.0
        for tree in trees:
            w = 1.0
            for path in tree.paths[1:]:
                ratio = world.p[path[:-1]][path[-1]] / world.q[path[:-1]][path[-1]]
                w = min(1.0, w * ratio)
                total += tree.chance * w
        assert block == pytest.approx(total, abs=EXACT)
        assert block >= token - EXACT


def one_hot(x):
    return np.eye(len(x))[x.argmax()]


def without_first(x):
    """No chance for token 0."""
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
    trees, want = trees_of(name, world), world.law()
    with jax.enable_x64(True):
        law, _ = shipped_law(RULES[rule][0], world, trees, meta_of(name))
    assert np.abs(law - want).max() < EXACT
    law, _ = shipped_law(RULES[rule][0], world, trees, meta_of(name), tolerance=1e-6)
    assert np.abs(law - want).max() < 2e-6


@pytest.mark.parametrize("edge", EDGES)
def test_degenerate_distributions_without_samples(edge):
    """Terminal form and typical acceptance, all nodes valid and one of them not."""
    world = edge_world(edge, 2)
    whole = best_tree(world, TOPOLOGIES["full"])
    for tree in (whole, whole.without(1), whole.without(4)):
        want = world.law()
        paper = ref.text_law(world, [tree], ref.typical)
        for x64, bar in ((True, EXACT), (False, 2e-6)):
            with jax.enable_x64(x64):
                law, _ = shipped_law(TerminalRule(), world, [tree], one_draw=True)
                lossy, _ = shipped_law(TypicalRule(), world, [tree])
            assert np.abs(law - want).max() < bar
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
        law, _ = shipped_law(RULES[rule][0], world, trees, meta_of(name), draft_vocab=2)
    assert np.abs(law - world.law()).max() < EXACT
