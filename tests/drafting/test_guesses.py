"""Trees grown on guesses, whatever they come from, against plain Python.

The sources here read theirs from tables that are given with the state, so that one
compiled program serves many tables.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.drafting import host, streams
from tests.drafting.streams import B, V
from treespec_jax.drafting.children import REST
from treespec_jax.drafting.protocol import Needs
from treespec_jax.drafting.sources import SourceDrafter, SourcesState
from treespec_jax.trees import shapes

K, DEPTH = 4, 3
LENGTHS = np.array([0, 5, 9], np.int32)
ROOTS = np.array([1, 7, 1], np.int32)


class Listed:
    """A source whose guesses depend on a node's depth and token."""

    needs, history = Needs(), 0

    def __init__(self, name):
        self.name = name

    def look(self, state, outlook):
        return state

    def guess(self, state, nodes, scratch):
        tokens, log = state
        return tokens[nodes.depth][nodes.tokens], log[nodes.depth][nodes.tokens], None


def tables(seed: int, few: float = 0.2):
    """Tokens and logarithms [DEPTH, V, K]: eighths, so that their sums are exact.

    Many are equal; a row's probabilities sum to less than 1. A share `few` of the
    guesses is none.
    """
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((DEPTH, V, V)), axis=2)
    log = -rng.integers(12, 20, (DEPTH, V, K)) / 8
    log[rng.random(log.shape) < few] = -np.inf
    return order[:, :, :K].astype(np.int32), log.astype(np.float32)


def grown(propose, parts, temperatures=(0.0,) * B):
    """A tree per slot, of tables for each source."""
    state = SourcesState(None, tuple(jax.tree.map(jnp.asarray, part) for part in parts))
    heat = np.array(temperatures, np.float32)
    tree, _ = propose(state, ROOTS, LENGTHS, np.ones(B, bool), heat)
    return jax.tree.map(np.asarray, tree)


def guesses_of(table, slot: int):
    tokens, log = table

    def guesses(path):
        row = len(path), int((ROOTS[slot], *path)[-1])
        pairs = zip(tokens[row].tolist(), log[row].tolist(), strict=True)
        return [host.Guess(token, x) for token, x in pairs if x > -math.inf]

    return guesses


@pytest.mark.parametrize("name", ["regular:3x2x1", "dynamic:9@3"])
def test_trees_are_the_best_paths_of_plain_python(name):
    """Greedy slots beside sampled ones; ties go to what was guessed first."""
    drafter, shape = SourceDrafter((Listed("list"),)), shapes.parse(name)
    propose, noise = streams.proposing(drafter, name), np.asarray(streams.noise())
    doubtful = nodes = 0
    for seed in range(12):
        table = tables(seed)
        heat = np.array([0.0, 1.0, seed % 2]) * (seed % 3 > 0)
        tree = grown(propose, [table], heat)
        for slot in range(B):
            exact = guesses = guesses_of(table, slot)
            if heat[slot]:
                rows = noise[slot, LENGTHS[slot] + 1 :]

                def guesses(path, exact=exact, rows=rows):
                    return host.leaning(exact(path), rows[len(path)], drafter.tau)

            try:
                want = host.grow(shape, guesses, host.NEAR if heat[slot] else 0.0)
            except host.Doubt:
                doubtful += 1
                continue
            nodes += streams.compare(shape, tree, slot, want)
    assert doubtful <= 2 and nodes > 12 * B


def test_two_sources_are_one_list():
    """Each token once, named for the more confident, no more than 1 together."""
    drafter = SourceDrafter((Listed("one"), Listed("two")))
    assert drafter.sources == ("one", "two")
    propose = streams.proposing(drafter, f"regular:{2 * K}")
    shared = crowded = 0
    for seed in range(20):
        parts = [tables(2 * seed + number) for number in range(2)]
        if seed % 2:
            # More confident ones, which promise more than 1 together.
            parts = [(tokens, log + np.float32(0.75)) for tokens, log in parts]
        tree = grown(propose, parts)
        for slot in range(B):
            real = np.flatnonzero(tree.valid[slot, 1:]) + 1
            tokens = tree.tokens[slot, real].tolist()
            log = tree.draft_logprob[slot, real]
            assert len(set(tokens)) == len(tokens)
            assert (np.diff(log) <= 0).all() and np.exp(log).sum() < 1 + 1e-5
            best: dict[int, tuple[float, int]] = {}
            for source, part in enumerate(parts):
                for guess in guesses_of(part, slot)(()):
                    known = best.get(guess.token, (-math.inf, 0))
                    shared += known[0] > -math.inf
                    if guess.log > known[0]:
                        best[guess.token] = guess.log, source
            assert set(tokens) == set(best)
            sources = tree.source[slot, real].tolist()
            assert sources == [best[token][1] for token in tokens]
            total = sum(math.exp(log) for log, _ in best.values())
            crowded += total > 1
            if total <= 1:
                wanted = [best[token][0] for token in tokens]
                np.testing.assert_allclose(log, wanted, atol=1e-5)
    assert shared > 20 and crowded > 10


def test_a_sampled_tree_has_a_distribution_that_holds_the_guesses():
    """q of every expanded node: the guesses, and the rest spread over all tokens."""
    drafter = SourceDrafter((Listed("even"), Listed("odd")))
    propose = streams.proposing(drafter, "regular:2x1", "sampled")
    named = set()
    for seed in range(6):
        parts = []
        for number in range(2):
            tokens, log = tables(seed + 10 * number, few=0.6)
            # Other tokens than those of the other source, and less sure.
            log = np.where(tokens % 2 == number, log - 0.5, -np.inf)
            parts.append((tokens, log.astype(np.float32)))
        tree = grown(propose, parts, (0.0, 1.0, 1.0))
        for slot in range(B):
            for column, node in enumerate(tree.proposal.nodes):
                row = tree.depth[slot, node], tree.tokens[slot, node]
                q = np.exp(tree.proposal.log_q[:, slot, column].astype(np.float64))
                assert abs(q.sum() - 1) < 1e-5 and (q > 0).all()
                want, source = np.zeros(V), np.zeros(V, int)
                for number, (tokens, log) in enumerate(parts):
                    want[tokens[row]] += np.exp(log[row].astype(np.float64))
                    source[tokens[row][log[row] > -np.inf]] = number
                want += max(1 - want.sum(), REST) / V
                np.testing.assert_allclose(q, want / want.sum(), atol=1e-5)
                below = tree.valid[slot] & (tree.parents[slot] == node)
                below[0] = False
                found = source[tree.tokens[slot, below]]
                assert tree.source[slot, below].tolist() == found.tolist()
                named |= set(found.tolist())
    assert named == {0, 1}
