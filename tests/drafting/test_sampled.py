"""Sampled trees: every tree is grown with the probability that it should have.

`tests.acceptance.enumeration` lists all trees of a toy world with the piece of [0, 1)
that draws each node; the middle of these pieces, fed as uniforms, must give that very
tree. All of them in one batch.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.acceptance import enumeration as ref
from tests.acceptance.shapes import (
    ALLOTTED,
    TOPOLOGIES,
    depth_of,
    meta_of,
    tempered,
    trees_of,
)
from tests.oracles import sampling
from treespec_jax.adaptive import AdaptiveTemperature
from treespec_jax.config import SamplingParams
from treespec_jax.drafting.growth import grow
from treespec_jax.drafting.protocol import DraftContext
from treespec_jax.sampling.randomness import Given
from treespec_jax.trees import shapes
from treespec_jax.trees.topology import Topology

pytestmark = pytest.mark.slow


def expander(tables):
    """`expand` of a world: logits by the path that the mask shows."""

    def expand(level, scratch):
        digits = level.tokens * 3 ** (level.depth - 1)
        held = digits if scratch is None else jnp.concatenate([scratch, digits], axis=1)
        code_BW = jnp.sum(jnp.where(level.mask, held[:, None], 0), axis=2)
        return tables[level.depth][:, code_BW.ravel()], held

    return expand


def tables_of(world):
    """log q [V, 3**depth] of every depth, a path as digits, the first the smallest."""
    tables = []
    for depth in range(world.depth):
        table = np.zeros((world.vocab, 3**depth))
        for path, q in world.q.items():
            if len(path) == depth:
                code = sum(x * 3**i for i, x in enumerate(path))
                with np.errstate(divide="ignore"):
                    table[:, code] = np.log(q) + 1.5
        tables.append(table)
    return tables


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def grown(shape, proposal, tables, uniforms, params, temperature=None):
    B = uniforms.shape[0]
    context = DraftContext(
        target=None,
        vocab=tables[0].shape[0],
        active=jnp.ones(B, bool),
        root=jnp.zeros(B, jnp.int32),
        lengths=jnp.zeros(B, jnp.int32),
        page_table=jnp.zeros((B, 1), jnp.int32),
        sampling=params,
        randomness=Given(uniforms=uniforms),
        proposal=proposal,
        temperature=temperature,
    )
    root = jnp.broadcast_to(tables[0], (tables[0].shape[0], B))
    return grow(shape, context, root, expander(tables), tau=1.0)


def shape_of(name):
    if name in ALLOTTED:
        return ALLOTTED[name]
    return shapes.StaticShape(Topology(TOPOLOGIES[name]))


CASES = [(n, False) for n in ("chain3", "lopsided", "overfull", *ALLOTTED)]


@pytest.mark.parametrize("name, replacement", [*CASES, ("late", True)])
def test_every_tree_is_drawn_by_its_piece_of_the_uniforms(name, replacement):
    for world in ref.worlds(depth_of(name))[2::3]:
        check_trees(name, world, world, replacement)


@pytest.mark.parametrize("name", ["lopsided", "allotted6@3"])
@pytest.mark.parametrize(
    ("form", "strength"), [("depth", 0.5), ("siblings", -0.5), ("entropy", 1.0)]
)
def test_a_drafter_of_another_temperature_samples_what_it_keeps(name, form, strength):
    """Trees are those of the changed q, and the rule is told of that q."""
    given = AdaptiveTemperature(form, strength)
    for world in ref.worlds(depth_of(name))[2::6]:
        other = tempered(world, form, strength, meta_of(name)["max_children"])
        check_trees(name, world, other, temperature=given)
        changed = [np.abs(world.q[p] - other.q[p]).max() for p in world.q]
        assert max(changed) > 0.05, "a dead test"


def check_trees(name, drafter, world, replacement=False, temperature=None):
    """Every tree of a world, grown from the logits of a drafter."""
    trees = trees_of(name, world, replacement)
    pieces = [np.add(t.before, np.multiply(t.shares, 0.5)) for t in trees]
    uniforms = np.stack([np.zeros_like(pieces), pieces], axis=2)
    shape = shape_of(name)
    proposal = "with_replacement" if replacement else "sampled"
    with jax.enable_x64(True):
        params = sampling(SamplingParams(temperature=1.0), len(trees))
        tables = tables_of(drafter)
        got = grown(shape, proposal, tables, uniforms, params, temperature)
        got = jax.tree.map(np.asarray, got)
    meta = meta_of(name, replacement)
    for key, value in meta.items():
        assert getattr(got.proposal, key) == value
    check_nodes(trees, world, got, meta)


def check_nodes(trees, world, got, meta):
    """Nodes, their probabilities and what of q is kept, tree by tree."""
    for b, tree in enumerate(trees):
        assert got.valid[b].tolist() == tree.valid
        for n, path in enumerate(tree.paths):
            if path is None or n == 0:
                continue
            assert got.parents[b, n] == tree.parents[n]
            assert got.tokens[b, n] == path[-1]
            assert got.proposal.remaining[b, n] == pytest.approx(tree.left[n])
            probability = world.q[path[:-1]][path[-1]]
            assert got.draft_logprob[b, n] == pytest.approx(np.log(probability))
        for e, n in enumerate(meta["nodes"]):
            if tree.paths[n] is not None:
                q = np.exp(got.proposal.log_q[:, b, e])
                np.testing.assert_allclose(q, world.q[tree.paths[n]], atol=1e-7)


def test_a_greedy_slot_gets_the_likeliest_tokens():
    """Whatever its uniforms are, alone or beside a sampled slot."""
    world, shape = ref.World(2, 1.0, 0.0, seed=2), shape_of("full")
    uniforms = np.random.default_rng(0).random((2, 7, 2)).astype(np.float32)
    tables = [t.astype(np.float32) for t in tables_of(world)]
    greedy, hot = SamplingParams(), SamplingParams(temperature=1.0)
    for second in (greedy, hot):
        pair = [sampling(p) for p in (greedy, second)]
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *pair)
        got = jax.tree.map(np.asarray, grown(shape, "sampled", tables, uniforms, both))
        paths = [()]
        for n in range(1, 7):
            above = paths[got.parents[0, n]]
            paths.append((*above, int(got.tokens[0, n])))
            order = np.argsort(-world.q[above])
            assert paths[n][-1] == order[(n - 1) % 2]
    assert np.isfinite(got.proposal.remaining).all()


def test_q_follows_the_requests_own_settings():
    """Under top-k 1 every node is the likeliest token and its siblings are void."""
    world, shape = ref.World(2, 1.0, 0.0, seed=2), shape_of("full")
    uniforms = np.random.default_rng(0).random((1, 7, 2)).astype(np.float32)
    tables = [t.astype(np.float32) for t in tables_of(world)]
    params = sampling(SamplingParams(temperature=0.7, top_k=1))
    got = jax.tree.map(np.asarray, grown(shape, "sampled", tables, uniforms, params))
    assert got.valid[0].tolist() == [True, True, False, True, False, False, False]
    assert got.tokens[0, 1] == world.q[()].argmax()


@pytest.mark.parametrize("nodes, depth", [(7, 4), (15, 5), (4, 4), (9, 1), (63, 8)])
def test_levels_of_an_allotted_tree_add_up(nodes, depth):
    sizes = shapes.AllottedShape(nodes, depth).level_sizes
    assert len(sizes) == depth + 1 and sum(sizes) == nodes + 1 and min(sizes) >= 1
    assert sorted(sizes[1:], reverse=True) == list(sizes[1:])


@pytest.mark.parametrize("name", ["lopsided", "allotted5@2"])
def test_likeliest_tokens_with_q_kept(name):
    """No draw: siblings by falling q, those without a probability empty, q as it is."""
    lacking = ref.World(depth_of(name), 1.0, 0.0, seed=2).replace(
        q=lambda x: np.where(x == x.min(), 0.0, x) / (x.sum() - x.min())
    )
    tables = [t.astype(np.float32) for t in tables_of(lacking)]
    params = sampling(SamplingParams(temperature=1.0))
    nobody = np.zeros((1, 1, 2), np.float32)
    got = jax.tree.map(
        np.asarray, grown(shape_of(name), "best_kept", tables, nobody, params)
    )
    paths = {0: ()}
    for n in range(1, got.tokens.shape[1]):
        siblings = np.flatnonzero(got.parents[0] == got.parents[0, n])
        rank = int((siblings[siblings > 0] < n).sum())
        above = paths.get(got.parents[0, n])
        if above is None or rank > 1:
            assert not got.valid[0, n]
            continue
        assert got.valid[0, n]
        paths[n] = (*above, int(got.tokens[0, n]))
        assert paths[n][-1] == np.argsort(-lacking.q[above])[rank]
    for e, n in enumerate(got.proposal.nodes):
        if n in paths:
            q = np.exp(got.proposal.log_q[:, 0, e])
            np.testing.assert_allclose(q, lacking.q[paths[n]], atol=1e-6)
