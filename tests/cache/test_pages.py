"""The only writer of the cache against a loop in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tree_attention import quantize_rows
from tests.conftest import TINY
from treespec_jax.cache import pages as paging
from treespec_jax.models.views import Pages

L, B, C, T, K, H, PAGE, MAX_PAGES = 2, 3, 4, 6, 2, 4, 8, 3
TABLE = np.array([[5, 2, 7], [1, 6, 3], [4, 0, 0]], np.int32)


def written(layers, table, lengths, kv, path, counts, after):
    destination = paging.Destination(table, lengths, counts)
    return paging.commit(Pages(layers), destination, kv, path, after).layers


write = jax.jit(written)


def make(dtype=np.float32, slots=B, columns=C):
    """Pages that are all different, and rows that are different again."""
    rng = np.random.default_rng(0)
    pages = tuple(
        jnp.asarray(rng.normal(size=(9, K, 2, PAGE, H)), dtype) for _ in range(L)
    )
    kv = tuple(
        jnp.asarray(rng.normal(size=(slots, K, 2, T, H)), np.float32) for _ in range(L)
    )
    path = np.stack([rng.permutation(T)[:columns] for _ in range(slots)])
    return pages, kv, path.astype(np.int32)


def by_hand(pages, table, lengths, kv, path, counts):
    """Copies row by row; the trash page is left out of the comparison."""
    out = [np.array(layer) for layer in pages]
    for layer, rows in zip(out, kv, strict=True):
        for b, count in enumerate(counts):
            for c in range(count):
                at = lengths[b] + c
                page = table[b, at // PAGE]
                layer[page, :, :, at % PAGE] = np.asarray(
                    rows[b, :, :, path[b, c]].astype(layer.dtype)
                )
    return [layer[1:] for layer in out]


def commit(pages, table, lengths, kv, path, counts, call=write):
    as_int = [np.asarray(x, np.int32) for x in (lengths, counts)]
    out = call(pages, table, as_int[0], kv, path, as_int[1], np.bool_(True))
    return [np.asarray(layer)[1:] for layer in out]


@pytest.mark.parametrize(
    "lengths, counts",
    [
        ((0, 0, 0), (4, 1, 0)),
        # Across one page's end and another's, and up to a page's end.
        ((6, 13, 4), (4, 3, 4)),
        # The last row of all; a slot that owns one page only.
        ((20, 23, 7), (4, 1, 1)),
        ((8, 16, 0), (0, 0, 0)),
    ],
)
def test_commit_equals_the_loop(lengths, counts):
    """Ragged counts; what is past a count touches no page that somebody owns."""
    pages, kv, path = make()
    want = by_hand(pages, TABLE, lengths, kv, path, counts)
    got = commit(pages, TABLE, lengths, kv, path, counts)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if not any(counts):
        np.testing.assert_array_equal(got[0], np.asarray(pages[0])[1:])


def test_rows_past_the_table_touch_no_owned_page():
    """A full slot: the rows not kept have no page of their own at all."""
    pages, kv, path = make()
    lengths, counts = (24, 22, 23), (0, 2, 0)
    want = by_hand(pages, TABLE, lengths, kv, path, counts)
    got = commit(pages, TABLE, lengths, kv, path, counts)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_rows_not_kept_go_to_the_trash_page():
    """Which shows that the pages of the others were left alone by design."""
    pages, kv, path = make()
    args = (np.zeros(B, np.int32), kv, path, np.zeros(B, np.int32))
    got = write(pages, TABLE, *args, np.bool_(True))
    changed = np.asarray(got[0]) != np.asarray(pages[0])
    assert changed[paging.TRASH_PAGE].any() and not changed[1:].any()


def test_values_are_cast_to_the_cache():
    pages, kv, path = make(jnp.bfloat16)
    lengths, counts = (6, 0, 3), (4, 2, 1)
    want = by_hand(pages, TABLE, lengths, kv, path, counts)
    got = commit(pages, TABLE, lengths, kv, path, counts)
    assert got[0].dtype == jnp.bfloat16
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("most", [paging.MAX_ROW_WRITES, 0], ids=["rows", "scatter"])
def test_int8_pages_take_rows_and_scales(most, monkeypatch):
    """What is written is the quantised row; wider pages keep their zeros."""
    monkeypatch.setattr(paging, "MAX_ROW_WRITES", most)
    pages, kv, path = make()
    empty = np.zeros((9, K, 2, PAGE, H + 4), np.int8), np.zeros((9, K, 2, PAGE + 8))
    before = tuple(
        tuple(jnp.asarray(x, t) for x, t in zip(empty, "bf", strict=True))
        for _ in range(L)
    )
    lengths, counts = (6, 13, 4), (4, 3, 2)
    call = jax.jit(lambda *args: written(*args))
    as_int = [np.asarray(x, np.int32) for x in (lengths, counts)]
    after = call(before, TABLE, as_int[0], kv, path, as_int[1], np.bool_(True))
    clean = [np.zeros_like(layer) for layer in pages]
    rows, scales = zip(*(quantize_rows(layer) for layer in kv), strict=True)
    want = by_hand(clean, TABLE, lengths, rows, path, counts)
    want_scales = by_hand(
        clean, TABLE, lengths, [s[..., None] for s in scales], path, counts
    )
    for (whole, scale), row, row_scale in zip(after, want, want_scales, strict=True):
        assert whole.dtype == jnp.int8 and scale.dtype == jnp.float32
        np.testing.assert_array_equal(whole[1:, ..., :H], row)
        assert not whole[..., H:].any() and not scale[..., PAGE:].any()
        np.testing.assert_allclose(scale[1:, ..., :PAGE], row_scale[..., 0], rtol=1e-6)


def test_the_scatter_equals_row_writes(monkeypatch):
    """Many rows take one scatter per layer: the same pages."""
    pages, kv, path = make()
    lengths, counts = (6, 13, 4), (4, 3, 2)
    monkeypatch.setattr(paging, "MAX_ROW_WRITES", 0)
    scatter = jax.jit(lambda *args: written(*args))
    assert "scatter" in str(
        jax.make_jaxpr(lambda *a: written(*a))(
            pages,
            TABLE,
            np.zeros(B, np.int32),
            kv,
            path,
            np.zeros(B, np.int32),
            np.bool_(True),
        )
    )
    got = commit(pages, TABLE, lengths, kv, path, counts, call=scatter)
    for ours, theirs in zip(
        got, by_hand(pages, TABLE, lengths, kv, path, counts), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [np.float32, np.int8], ids=["rows", "scales"])
def test_pages_are_copied_over_others_and_nothing_else_is(dtype):
    layers = make()[0]
    if dtype == np.int8:
        layers = tuple((x.astype(dtype), x[..., 0]) for x in layers)
    copies = paging.Copies(
        np.array([1, 5, 7, 2], np.int32), np.array([3, 4, 8, 6], np.int32), np.int32(3)
    )
    copied = jax.jit(paging.copy)(Pages(layers), copies)
    want = jax.tree.map(np.array, Pages(layers))
    for leaf in jax.tree.leaves(want):
        leaf[[3, 4, 8]] = leaf[[1, 5, 7]]
    jax.tree.map(np.testing.assert_array_equal, copied, want)


def test_pages_start_empty():
    pages = paging.empty_pages(TINY, paging.CacheLayout(3, PAGE, "bfloat16"))
    assert len(pages) == TINY.num_layers
    assert all(p.shape == (3, TINY.num_kv_heads, 2, PAGE, TINY.head_dim) for p in pages)
    assert all(p.dtype == jnp.bfloat16 and not p.any() for p in pages)
