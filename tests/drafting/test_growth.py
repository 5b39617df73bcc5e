"""Trees grown from a known conditional, against numpy that knows the whole tree.

The drafter is a table: the logits after a path are those of the root plus a vector per
(depth, token) of the path. `expand` may use only what it is given, the mask and the
rows before, so that a wrong mask gives other tokens than the true paths do.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracles import sampling
from treespec_jax.config import SamplingParams
from treespec_jax.drafting.children import NORMALISED
from treespec_jax.drafting.growth import grow
from treespec_jax.drafting.protocol import DraftContext
from treespec_jax.sampling.noise import Noise
from treespec_jax.sampling.randomness import Given
from treespec_jax.trees import shapes
from treespec_jax.trees.shapes import BestFirstShape
from treespec_jax.trees.topology import Topology

TAU = 0.5
B = 2
DEPTHS = 5
ROOTS = np.array([3, 1], np.int32)
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, seed=11)


def expander(root, step):
    """`expand` of a table: sums what the mask shows; the scratch is earlier rows."""

    def expand(level, scratch):
        rows = step[level.depth - 1][level.tokens]
        held = rows if scratch is None else jnp.concatenate([scratch, rows], axis=1)
        assert level.mask.shape == (*level.tokens.shape, held.shape[1])
        seen = jnp.where(level.mask[..., None], held[:, None], 0.0).sum(axis=2)
        logits_BWV = root.T[:, None] + seen
        return logits_BWV.reshape(-1, root.shape[0]).T, held

    return expand


@functools.cache
def _compiled(shape):
    """One compilation per shape and vocabulary, whatever the tables hold."""
    return jax.jit(
        lambda root, step, noise, settings: grow(
            shape,
            context_of(noise, settings),
            root,
            expander(root, step),
            TAU,
        )
    )


def context_of(noise, settings) -> DraftContext:
    """Two slots that share their noise with the target."""
    return DraftContext(
        target=None,
        vocab=noise.vocab,
        active=jnp.ones(B, bool),
        root=ROOTS % noise.vocab,
        lengths=jnp.arange(B) * 7,
        page_table=jnp.zeros((B, 1), jnp.int32),
        sampling=settings,
        randomness=Given(shared=noise),
        proposal="shared",
    )


class Table:
    """Logits of a path as a sum over its (depth, token) pairs."""

    def __init__(self, vocab, params, seed=0):
        rng = np.random.default_rng(seed)
        self.vocab, self.params = vocab, params
        self.root = 2 * rng.normal(size=(vocab, B)).astype(np.float32)
        self.step = 2 * rng.normal(size=(DEPTHS, vocab, vocab)).astype(np.float32)
        self.settings = sampling(params, B)
        shared = Noise(self.settings.seed, jnp.arange(B) * 7 + 1, vocab)
        self.shared = shared.with_rows(DEPTHS, quiet=params.temperature == 0)
        self.noise = np.asarray(self.shared.rows)

    @property
    def arrays(self):
        """What a growth is called with."""
        tables = jnp.asarray(self.root), jnp.asarray(self.step)
        return *tables, self.shared, self.settings

    def grow(self, shape):
        return jax.tree.map(np.asarray, _compiled(shape)(*self.arrays))

    def scores(self, b, path) -> np.ndarray:
        """float64 [V]: what the children of a path are ranked by."""
        logits = self.root[:, b].astype(np.float64)
        for depth, token in enumerate(path):
            logits = logits + self.step[depth, token]
        if self.params.temperature == 0:
            return logits
        scaled = logits / self.params.temperature
        if self.params.top_k:
            scaled[scaled < np.sort(scaled)[-self.params.top_k]] = -np.inf
        return scaled + self.noise[len(path), :, b]

    def children(self, b, path, count):
        """(token, log probability) of the best children, best first."""
        scores = self.scores(b, path)
        order = np.argsort(-scores, kind="stable")
        with np.errstate(divide="ignore"):
            best = scores[order[: max(count, NORMALISED)]] / TAU
            probability = best - best.max()
            probability = probability - np.log(np.exp(probability).sum())
        return list(zip(order[:count].tolist(), probability[:count], strict=True))


def paths_of(tree, b) -> list[tuple[int, ...]]:
    """The tokens below the root of every node, by climbing parents."""
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, tree.tokens.shape[1]):
        parent = int(tree.parents[b, node])
        assert parent < node
        paths.append((*paths[parent], int(tree.tokens[b, node])))
    return paths


def check_consistent(tree, b) -> None:
    """Depth and ancestors follow from parents; siblings differ."""
    T = tree.tokens.shape[1]
    siblings = set()
    for node in range(T):
        climb, at = {node}, node
        while at:
            at = int(tree.parents[b, at])
            climb.add(at)
        assert set(np.flatnonzero(tree.ancestors[b, node])) == climb
        assert tree.depth[b, node] == len(climb) - 1
        if node and tree.valid[b, node]:
            siblings.add((int(tree.parents[b, node]), int(tree.tokens[b, node])))
    assert len(siblings) == tree.valid[b, 1:].sum()


STATIC = {
    "chain": shapes.parse("chain:4"),
    "regular": shapes.parse("regular:3x2x2"),
    "ragged": shapes.StaticShape(Topology((-1, 0, 0, 0, 1, 1, 3, 4, 6, 6, 9))),
}


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", STATIC)
def test_a_static_node_is_the_child_of_its_rank(name, params):
    """Token and probability of every node, from the conditional of its true path."""
    shape, table = STATIC[name], Table(23, params)
    tree = table.grow(shape)
    ranks = shape.topology.ranks
    for b in range(B):
        check_consistent(tree, b)
        assert tree.tokens[b, 0] == ROOTS[b]
        assert tree.draft_logprob[b, 0] == 0
        paths = paths_of(tree, b)
        for node in range(1, shape.num_nodes):
            above = paths[tree.parents[b, node]]
            best = table.children(b, above, int(ranks[node]) + 1)
            token, probability = best[ranks[node]]
            assert tree.tokens[b, node] == token
            assert tree.draft_logprob[b, node] == pytest.approx(probability, abs=1e-4)
    assert tree.valid.all()
    np.testing.assert_array_equal(tree.parents[0, 1:], shape.topology.parents[1:])


def beam(table, b, shape) -> dict[tuple[int, ...], float]:
    """Best-first within a beam: path to log probability, the `nodes` best."""
    seen = {}
    level = {
        (token,): probability
        for token, probability in table.children(
            b, (), min(shape.root_children, table.vocab)
        )
    }
    for depth in range(1, shape.depth + 1):
        likeliest = sorted(level, key=level.get, reverse=True)[: shape.level]
        level = {path: level[path] for path in likeliest}
        seen |= level
        if depth == shape.depth:
            break
        frontier = sorted(level, key=level.get, reverse=True)[: shape.width]
        count = min(shape.children, table.vocab)
        level = {
            (*path, token): level[path] + probability
            for path in frontier
            if level[path] >= np.log(shape.threshold or 1e-30)
            for token, probability in table.children(b, path, count)
        }
    best = sorted(seen, key=seen.get, reverse=True)[: shape.nodes]
    return {path: seen[path] for path in best}


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "shape",
    [
        shapes.parse("dynamic:9@4"),
        BestFirstShape(12, 3, 3, 5),
        BestFirstShape(4, 1, 4, 2),
        shapes.parse("dynamic:9@4/3"),
        shapes.parse("dynamic:12@4~0.1"),
    ],
    ids=lambda s: f"{shapes.text_of(s)}w{s.width}c{s.children}",
)
def test_a_dynamic_tree_is_the_beams_best(shape, params):
    """The same paths as a beam search in numpy, in order of topology."""
    table = Table(23, params)
    tree = table.grow(shape)
    for b in range(B):
        check_consistent(tree, b)
        want = beam(table, b, shape)
        paths = paths_of(tree, b)
        there = {paths[node] for node in np.flatnonzero(tree.valid[b])}
        assert there == {(), *want} and len(paths) == shape.num_nodes
        for node, path in enumerate(paths[1:], 1):
            if not tree.valid[b, node]:
                continue
            on_path = np.flatnonzero(tree.ancestors[b, node])
            assert tree.valid[b, on_path].all()
            total = tree.draft_logprob[b, on_path].sum()
            assert total == pytest.approx(want[path], abs=1e-4)
        assert np.bincount(tree.depth[b])[1:].max() <= (shape.level or 23)


@pytest.mark.parametrize(
    ("threshold", "active", "passes"),
    [(0, [True, True], 3), (1, [True, True], 0), (0.01, [False, False], 0)],
)
def test_the_drafter_runs_no_further_than_a_path_is_worth(threshold, active, passes):
    """Passes are counted as they run, not as they are compiled."""
    table, ran = Table(23, GREEDY), []
    expand = expander(jnp.asarray(table.root), jnp.asarray(table.step))

    def counted(level, scratch):
        jax.debug.callback(lambda: ran.append(level.depth))
        return expand(level, scratch)

    shape = shapes.parse(f"dynamic:9@4~{threshold}")
    context = context_of(table.shared, table.settings)
    context = dataclasses.replace(context, active=jnp.array(active))
    tree = jax.jit(lambda root: grow(shape, context, root, counted, TAU))(table.root)
    jax.block_until_ready(tree.tokens)
    jax.effects_barrier()
    assert sorted(ran) == list(range(1, passes + 1))
    if all(active):
        assert np.asarray(tree.valid & (tree.depth > 1)).any() == (passes > 0)


def test_with_room_for_all_it_is_best_first_over_every_path():
    """No beam in the oracle: all 155 paths of five tokens, the likeliest 20."""
    vocab, depth, nodes = 5, 3, 20
    table = Table(vocab, SAMPLED, seed=4)
    tree = table.grow(BestFirstShape(nodes, depth, width=vocab**2, children=vocab))
    for b in range(B):
        probabilities = {}
        for size in range(1, depth + 1):
            for path in itertools.product(range(vocab), repeat=size):
                probabilities[path] = sum(
                    dict(table.children(b, path[:at], vocab))[path[at]]
                    for at in range(size)
                )
        best = sorted(probabilities, key=probabilities.get, reverse=True)[:nodes]
        assert set(paths_of(tree, b)[1:]) == set(best)
        assert tree.depth[b].max() > 1


def test_path_probabilities_never_rise():
    """A node's own probability is at most one, so no path beats its parent's."""
    tree = Table(23, SAMPLED).grow(shapes.parse("dynamic:9@4"))
    assert (tree.draft_logprob <= 0).all()
    # The kept ones are the best: nothing below a node that was left out.
    probability = (tree.ancestors * tree.draft_logprob[:, None, :]).sum(axis=-1)
    parents = np.take_along_axis(probability, tree.parents, axis=1)
    assert (probability[:, 1:] <= parents[:, 1:]).all()


@pytest.mark.parametrize("name", ["dynamic:15@2", "regular:5x1", "regular:2x4"])
def test_a_tiny_vocabulary_pads_with_invalid_nodes(name):
    """Three tokens cannot fill the tree; what there is is right."""
    shape, table = shapes.parse(name), Table(3, GREEDY)
    tree = table.grow(shape)
    assert tree.tokens.shape == (B, shape.num_nodes)
    assert ((tree.tokens >= 0) & (tree.tokens < 3)).all()
    for b in range(B):
        check_consistent(tree, b)
        paths = paths_of(tree, b)
        reachable = [tree.valid[b, row].all() for row in tree.ancestors[b]]
        valid = [p for p, ok in zip(paths, reachable, strict=True) if ok]
        assert not tree.valid[b].all()
        if isinstance(shape, BestFirstShape):
            every = [(t,) for t in range(3)]
            every += list(itertools.product(range(3), repeat=2))
            assert sorted(valid[1:]) == sorted(every)
        else:
            levels = [3, 3] if name == "regular:5x1" else [2, 6]
            sizes = [sum(len(p) == depth for p in valid) for depth in (1, 2)]
            assert sizes == levels


@pytest.mark.parametrize("name", ["dynamic:9@3", "regular:4x2"])
def test_tokens_that_the_policy_cuts_are_invalid(name):
    """Under top-k 2 the target never emits a third token: such guesses are void."""
    params = SamplingParams(temperature=0.8, top_k=2, seed=11)
    table = Table(23, params)
    tree = table.grow(shapes.parse(name))
    for b in range(B):
        check_consistent(tree, b)
        paths = paths_of(tree, b)
        assert tree.valid[b].sum() >= 5
        for node in range(1, len(paths)):
            if tree.valid[b, node]:
                allowed = [t for t, _ in table.children(b, paths[node][:-1], 2)]
                assert paths[node][-1] in allowed
        assert (tree.valid[b] == (tree.draft_logprob[b] > -np.inf)).all() or (
            name == "regular:4x2"
        )


def test_each_slot_has_its_own_tree():
    """A slot's tree does not depend on its neighbour's logits or noise."""
    table = Table(23, SAMPLED)
    shape = shapes.parse("dynamic:9@4")
    tree = table.grow(shape)
    assert (tree.tokens[0] != tree.tokens[1]).any()
    table.root[:, 1] = -table.root[:, 1]
    other = table.grow(shape)
    for name in ("tokens", "parents", "draft_logprob"):
        np.testing.assert_array_equal(getattr(tree, name)[0], getattr(other, name)[0])
    assert (tree.tokens[1] != other.tokens[1]).any()


def grow_and_watch(shape):
    """The tree, and tokens, parents and masks that `expand` was given."""
    table = Table(23, SAMPLED)

    def run(root, step, noise, settings):
        levels, inner = [], expander(root, step)

        def watched(level, scratch):
            levels.append((level.tokens, level.parents, level.mask))
            return inner(level, scratch)

        context = context_of(noise, settings)
        return grow(shape, context, root, watched, TAU), levels

    return jax.tree.map(np.asarray, jax.jit(run)(*table.arrays))


@pytest.mark.parametrize("name", ["regular:3x2x2", "dynamic:9@4", "allotted:9@4"])
def test_masks_and_parents_are_true_ancestry(name):
    """Each row sees itself and one row per level above, the last of them its parent."""
    shape = shapes.parse(name)
    tree, calls = grow_and_watch(shape)
    assert len(calls) == shape.depth - 1
    tokens = np.concatenate([call[0] for call in calls], axis=1)
    level = np.repeat(np.arange(len(calls)), [call[0].shape[1] for call in calls])
    for b in range(B):
        grown = set(paths_of(tree, b))
        known, first = [], 0
        for depth, (own, parents, mask) in enumerate(calls):
            for w in range(own.shape[1]):
                seen = np.flatnonzero(mask[b, w])
                assert level[seen].tolist() == list(range(depth + 1))
                assert seen[-1] == first + w
                # Number 0 is the root, which no mask shows.
                assert parents[b, w] == (seen[-2] + 1 if depth else 0)
                # What it sees is what its parent saw, and itself.
                assert depth == 0 or known[seen[-2]] == seen[:-1].tolist()
                known.append(seen.tolist())
                if not name.startswith("dynamic"):
                    assert tuple(tokens[b, seen]) in grown
            first += own.shape[1]
