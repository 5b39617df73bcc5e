"""A prompt in chunks against one pass over all of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from treespec_jax.cache import pages as paging
from treespec_jax.cache.prefill import Chunk, run_chunk
from treespec_jax.models.views import CacheView

PAGE, SIZE = 8, 8
TABLE = np.array([[3, 1, 4, 0]], np.int32)
LAYOUT = paging.CacheLayout(6, PAGE)
TOKENS = np.random.default_rng(4).integers(3, 97, 19)


@pytest.fixture(scope="module")
def chunked(tiny_target):
    """Pages after some chunks, and the last layer's rows of the last one."""

    @jax.jit
    def run(pages, chunk):
        pages, forward = run_chunk(tiny_target, pages, chunk, (2,))
        return pages, forward.features[0]

    def all_of(ends):
        pages = paging.empty_pages(tiny_target.config, LAYOUT)
        for start, end in zip((0, *ends), ends, strict=False):
            tokens = np.zeros((1, SIZE), np.int32)
            tokens[0, : end - start] = TOKENS[start:end]
            start, count = (np.array([n], np.int32) for n in (start, end - start))
            pages, rows = run(pages, Chunk(tokens, start, count, TABLE))
        return pages, np.asarray(rows)[:, : int(count[0])]

    return all_of


@pytest.fixture(scope="module")
def whole(tiny_target):
    """Keys and values [K, 2, 19, H] of each layer, and the rows [D, 19]."""
    T = len(TOKENS)
    forward = tiny_target(
        jnp.asarray(TOKENS)[None],
        jnp.arange(T)[None],
        jnp.tril(jnp.ones((1, T, T), bool)),
        CacheView(
            paging.empty_pages(tiny_target.config, LAYOUT), TABLE, jnp.zeros(1, int)
        ),
        feature_layers=(2,),
    )
    return [np.asarray(rows)[0] for rows in forward.kv], np.asarray(forward.features[0])


@pytest.mark.parametrize("ends", [(8, 16, 19), (1, 9, 12, 19), (5, 6, 13, 19)])
def test_chunks_leave_the_rows_of_one_pass(ends, chunked, whole):
    """At the positions where the last chunk ended, over all that it left."""
    pages, rows = chunked(ends)
    kv, features = whole
    for layer, want in zip(pages.layers, kv, strict=True):
        held = np.asarray(layer)[TABLE[0]]
        # [pages, K, 2, page, H] to [K, 2, tokens, H].
        held = np.moveaxis(held, 0, 2).reshape(*held.shape[1:3], -1, held.shape[4])
        np.testing.assert_allclose(held[:, :, : len(TOKENS)], want, atol=1e-5)
    last = len(TOKENS) - rows.shape[1]
    np.testing.assert_allclose(rows, features[:, last:], atol=1e-4)
