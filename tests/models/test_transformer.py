"""The one forward pass: trees, prefixes and scratch all give the causal answer."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import TINY
from tests.oracles import full_logits
from treespec_jax.cache import pages as paging
from treespec_jax.models.flat import FlatModule
from treespec_jax.models.transformer import parameter_count
from treespec_jax.models.views import CacheView

PAGE = 8


@functools.cache
def _forward(model):
    flat = FlatModule(model)

    @jax.jit
    def run(leaves, tokens, positions, mask, view, scratch):
        bound = flat.bind(leaves)
        done = bound(tokens, positions, mask, view, scratch)
        return bound.logits(done.hidden), done.kv

    return functools.partial(run, flat.leaves)


def forward(model, tokens, positions, mask, view=None, scratch=None):
    """Logits [T, V] of one slot, and its new rows."""
    as_row = [jnp.asarray(x, jnp.int32)[None] for x in (tokens, positions)]
    logits, kv = _forward(model)(*as_row, jnp.asarray(mask)[None], view, scratch)
    return np.asarray(logits), kv


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(0).integers(3, TINY.vocab_size, 24).tolist()


@pytest.fixture(scope="module")
def prefix(tiny_target, text):
    """A cache that holds the first 13 tokens, on pages out of order."""
    table = jnp.array([[3, 1, 2]], jnp.int32)
    pages = paging.empty_pages(TINY, paging.CacheLayout(4, PAGE))
    _, kv = forward(tiny_target, text[:13], range(13), np.tril(np.ones((13, 13), bool)))
    pages = paging.commit(
        pages,
        paging.Destination(table, jnp.zeros(1, jnp.int32), jnp.full(1, 13, jnp.int32)),
        kv,
        jnp.arange(13, dtype=jnp.int32)[None],
        jnp.bool_(True),
    )
    return CacheView(pages, table, jnp.full(1, 13, jnp.int32))


def test_a_chain_is_causal(tiny_target, text):
    """A later token changes no earlier row, and does change its own."""
    logits = full_logits(tiny_target, text)
    other = full_logits(tiny_target, [*text[:20], *(t - 1 for t in text[20:])])
    np.testing.assert_array_equal(logits[:20], other[:20])
    assert (np.abs(logits[20:] - other[20:]).max(axis=-1) > 1e-2).all()


def test_behind_a_cache_the_logits_are_those_of_the_full_pass(
    tiny_target, text, prefix
):
    """I1 to I3 for a chain: 13 cached tokens, then five more in one pass."""
    mask = np.tril(np.ones((5, 5), bool))
    got, _ = forward(tiny_target, text[13:18], range(13, 18), mask, prefix)
    np.testing.assert_allclose(got, full_logits(tiny_target, text)[13:18], atol=2e-5)


#  0 ─┬─ 1 ─┬─ 3 ─── 6
#     │     └─ 4
#     └─ 2 ─── 5 ─── 7
PARENTS = [-1, 0, 0, 1, 1, 2, 3, 5]


def ancestry(parents):
    mask = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


TOKENS = [11, 40, 7, 7, 90, 23, 5, 61]


def test_every_path_of_a_tree_is_a_text_of_its_own(tiny_target, text, prefix):
    """Each node's logits are those after its own path, without the tree or cache."""
    mask = ancestry(PARENTS)
    depth = mask.sum(axis=1) - 1
    got, _ = forward(tiny_target, TOKENS, 13 + depth, mask, prefix)
    for node in range(len(PARENTS)):
        path = [TOKENS[n] for n in np.flatnonzero(mask[node])]
        want = full_logits(tiny_target, text[:13] + path)[-1]
        np.testing.assert_allclose(got[node], want, atol=2e-5)


def test_positions_go_by_depth_not_by_index(tiny_target, prefix):
    """Exchanging two sibling subtrees exchanges their rows, bit for bit nearly."""
    order = [0, 2, 1, 5, 3, 4, 7, 6]
    mask = ancestry(PARENTS)
    depth = mask.sum(axis=1) - 1
    swapped = mask[np.ix_(order, order)]
    assert ([swapped[n, :n].any() for n in range(1, 8)]) == [True] * 7
    first, kv = forward(tiny_target, TOKENS, 13 + depth, mask, prefix)
    tokens = [TOKENS[n] for n in order]
    second, moved = forward(tiny_target, tokens, 13 + depth[order], swapped, prefix)
    np.testing.assert_allclose(second, first[order], atol=2e-5)
    np.testing.assert_allclose(moved[1], kv[1][:, :, :, order], atol=2e-5)
    # By index the rows would differ.
    wrong, _ = forward(tiny_target, tokens, 13 + np.arange(8), swapped, prefix)
    assert np.abs(wrong - first[order]).max() > 1e-2


def test_rows_of_earlier_calls_are_tree_rows(tiny_target, prefix):
    """A tree in two passes, the first one's rows as scratch, equals one pass."""
    mask = ancestry(PARENTS)
    depth = mask.sum(axis=1) - 1
    whole, kv = forward(tiny_target, TOKENS, 13 + depth, mask, prefix)
    top, scratch = forward(
        tiny_target, TOKENS[:3], 13 + depth[:3], mask[:3, :3], prefix
    )
    rest, own = forward(tiny_target, TOKENS[3:], 13 + depth, mask[3:], prefix, scratch)
    np.testing.assert_allclose(np.concatenate([top, rest]), whole, atol=2e-5)
    np.testing.assert_allclose(own[1], kv[1][:, :, :, 3:], atol=2e-5)


def test_parameters_are_counted():
    """By hand: table, head, per layer q, k, v, out, three of the MLP, two norms."""
    V, D, F, L, N, K, H = 97, 32, 48, 2, 4, 2, 8
    layer = D * H * (N + 2 * K) + N * H * D + 3 * D * F + 2 * D
    assert parameter_count(TINY) == 2 * V * D + L * layer + D
    tied = dataclasses.replace(TINY, tied_embeddings=True)
    assert parameter_count(tied) == V * D + L * layer + D


def test_flat_module_round_trip(tiny_target):
    """The same leaves give the same model; others take their place."""
    flat = FlatModule(tiny_target)
    assert sum(x.size for x in flat.leaves) == parameter_count(TINY)
    again = flat.bind(flat.leaves)
    assert again is not tiny_target
    rows = FlatModule(again).leaves
    assert all(a is b for a, b in zip(flat.leaves, rows, strict=True))
    zeros = flat.bind(tuple(jnp.zeros_like(x) for x in flat.leaves))
    assert not zeros.embedding[...].any() and tiny_target.embedding[...].any()


def test_no_module_has_no_leaves():
    empty = FlatModule(None)
    assert empty.leaves == () and empty.bind(()) is None
