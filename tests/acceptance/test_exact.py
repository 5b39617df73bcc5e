"""The exact-match rule against a walk down the tree in Python."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from treespec_jax.acceptance.exact import exact_match, walk
from treespec_jax.trees.token_tree import TokenTree, ancestors_of

B, T, VOCAB = 2, 9, 4


@jax.jit
def run(tree, choice_BT):
    """The verdict of both forms, which must be one up to the bonus."""

    def choose(depth, node_B):
        at_depth = jnp.take_along_axis(tree.depth, node_B[:, None], axis=1)[:, 0]
        choice_B = jnp.take_along_axis(choice_BT, node_B[:, None], axis=1)[:, 0]
        # A slot whose walk has ended is asked for again, and what comes is dropped.
        return jnp.where(at_depth == depth, choice_B, VOCAB + 1)

    return exact_match(tree, choice_BT, T - 1), walk(tree, choose, T - 1)


@st.composite
def slots(draw):
    """A tree whose siblings differ, with a token chosen after every node."""
    parents, tokens = [0], [draw(st.integers(0, VOCAB - 1))]
    for node in range(1, T):
        taken = {}
        for parent, token in zip(parents[1:], tokens[1:], strict=True):
            taken.setdefault(parent, set()).add(token)
        free = [n for n in range(node) if len(taken.get(n, ())) < VOCAB]
        # Deep trees are rare by probability alone.
        parent = draw(st.sampled_from([free[-1], *free]))
        left = sorted(set(range(VOCAB)) - taken.get(parent, set()))
        parents.append(parent)
        tokens.append(draw(st.sampled_from(left)))
    valid = [True, *(draw(st.sampled_from([True] * 5 + [False])) for _ in range(T - 1))]
    choice = [draw(st.integers(0, VOCAB - 1)) for _ in range(T)]
    for node in range(1, T):
        if draw(st.booleans()):
            choice[parents[node]] = tokens[node]
    return parents, tokens, valid, choice


def by_hand(parents, tokens, valid, choice):
    """Path and emitted tokens of one slot."""
    at, path, emitted = 0, [0], []
    while True:
        emitted.append(choice[at])
        found = [
            n
            for n in range(1, T)
            if parents[n] == at and tokens[n] == choice[at] and valid[n]
        ]
        if not found:
            return path, emitted
        (at,) = found
        path.append(at)


def verdict_of(cases):
    parents, tokens, valid, choice = (
        jnp.asarray(x) for x in map(list, zip(*cases, strict=True))
    )
    parents = parents.astype(jnp.int32)
    ancestors = ancestors_of(parents, T - 1)
    tree = TokenTree(
        tokens=tokens.astype(jnp.int32),
        parents=parents,
        depth=ancestors.sum(axis=2, dtype=jnp.int32) - 1,
        ancestors=ancestors,
        valid=valid,
        draft_logprob=jnp.zeros((B, T)),
    )
    both = run(tree, choice.astype(jnp.int32))
    got, walked = jax.tree.map(np.asarray, both)
    np.testing.assert_array_equal(walked.path, got.path)
    np.testing.assert_array_equal(walked.count, got.count)
    emitted = np.arange(T) <= got.count[:, None]
    np.testing.assert_array_equal(walked.emitted[emitted], got.emitted[emitted])
    return got


@settings(deadline=None, derandomize=True, max_examples=150)
@given(slots(), slots())
def test_equals_the_walk(first, second):
    """Path, count and emitted tokens of two slots that know nothing of each other."""
    got = verdict_of([first, second])
    for b, case in enumerate([first, second]):
        path, emitted = by_hand(*case)
        assert got.count[b] == len(path) - 1
        assert got.path[b, : len(path)].tolist() == path
        assert not got.path[b, len(path) :].any()
        assert got.emitted[b, : len(emitted)].tolist() == emitted


def chain(valid=()):
    """A chain that carries 1, 2, 3, 0, 1, … and is chosen throughout."""
    tokens = [n % VOCAB for n in range(T)]
    ok = [n not in valid for n in range(T)]
    return [0, *range(T - 1)], tokens, ok, [(n + 1) % VOCAB for n in range(T)]


def test_all_right_gives_the_whole_chain_and_a_bonus():
    got = verdict_of([chain(), chain({1})])
    assert got.count.tolist() == [T - 1, 0]
    assert got.path[0].tolist() == list(range(T))
    assert got.emitted[0].tolist() == [(n + 1) % VOCAB for n in range(T)]


def test_nothing_below_an_invalid_node_is_accepted():
    """Though every token of it is right."""
    got = verdict_of([chain({4}), chain({T - 1})])
    assert got.count.tolist() == [3, T - 2]
    assert got.path[0].tolist() == [0, 1, 2, 3] + [0] * (T - 4)


def test_a_right_node_below_a_wrong_one_is_not_accepted():
    parents, tokens, valid, choice = chain()
    wrong = [*tokens[:2], (tokens[2] + 1) % VOCAB, *tokens[3:]]
    got = verdict_of([(parents, wrong, valid, choice), chain()])
    assert got.count.tolist() == [1, T - 1]
    assert got.emitted[0, :2].tolist() == [1, 2]
