"""The reference of tree attention against float64 numpy, and its contract."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tree_attention import (
    AttentionSpec,
    Operands,
    reference,
    tree_attention,
)
from tests.kernels.oracle import attention, cast, make_case, random_tree

pytestmark = pytest.mark.slow

SCALE = 8**-0.5
SPEC = AttentionSpec(scale=SCALE)
attend = jax.jit(tree_attention, static_argnums=1)


def run(case, dtype=np.float32, **options) -> np.ndarray:
    """The shipped operation, compiled."""
    out = attend(cast(case, dtype), AttentionSpec(scale=SCALE, **options))
    assert out.dtype == dtype and out.shape == case.queries.shape
    return np.asarray(out, np.float64)


def check(case, **options) -> None:
    want = attention(case, scale=SCALE, **options)
    np.testing.assert_allclose(run(case, **options), want, atol=2e-5, rtol=2e-5)


def length_sets(page, B):
    """Ragged lengths of equal shape: empty, about a page, and several blocks."""
    several = 64 + page + 3
    pairs = [(0, 1), (page - 1, page), (page + 1, 0), (several, 1), (3 * page, several)]
    return [pair[:B] for pair in pairs] + [pair[::-1][:B] for pair in pairs]


@pytest.mark.parametrize("page", [8, 16])
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("B, G", [(1, 1), (1, 4), (2, 1), (2, 2)])
def test_equals_the_oracle(B, T, G, page):
    """Random trees over ragged, scattered prefixes, half of them behind scratch."""
    rng = np.random.default_rng([B, T, G, page])
    scratch = 3 if page == 16 else 0
    for lengths in length_sets(page, B):
        check(
            make_case(rng, B=B, T=T, G=G, page=page, lengths=lengths, scratch=scratch)
        )


@pytest.mark.parametrize("options", [{"soft_cap": 1.5}, {"window": 4}], ids=str)
@pytest.mark.parametrize("page", [8, 16])
def test_soft_cap_and_window_equal_the_oracle(options, page):
    """A window counts positions: prefix length plus depth, never the row's index."""
    rng = np.random.default_rng(page)
    for lengths in length_sets(page, 2):
        case = make_case(rng, B=2, T=5, G=2, page=page, lengths=lengths, scratch=3)
        check(case, **options)


@pytest.mark.parametrize("window", [1, 5, 40, 64, 100])
def test_windows_over_several_blocks_equal_the_oracle(window):
    """Shorter, as long as, and longer than a block; slots that see other blocks."""
    rng = np.random.default_rng(window)
    # The last pair sees one row of the first block.
    ends = 62 + window, 63 + window
    for lengths in [(150, 149), (3, 130), (0, 128), (64, 72), (127, 191), ends]:
        sizes = dict(B=2, T=5, G=2, page=8, max_pages=24, scratch=3)
        case = make_case(rng, lengths=lengths, **sizes)
        case.tree_depth[...] -= case.tree_depth[:, 3:].min(axis=1, keepdims=True)
        check(case, window=window)


def test_blocks_outside_every_window_are_not_read():
    """NaN values there would spoil any sum that they entered.

    Slot 0 sees rows from 150 + 1 - 20 + 1 = 132 on, slot 1 has no prefix, and slot 2
    stands so deep that its prefix is out of reach: blocks of 64 begin with the third.
    """
    rng = np.random.default_rng(10)
    sizes = dict(B=3, T=4, G=2, page=8, max_pages=24)
    case = make_case(rng, lengths=(150, 0, 30), **sizes)
    case.tree_depth[0] = [1, 2, 2, 3]
    case.tree_depth[2] = [19, 20, 21, 21]
    clean = run(case, window=20)
    np.testing.assert_allclose(
        clean, attention(case, scale=SCALE, window=20), atol=2e-5, rtol=2e-5
    )
    whole = case.kv_pages.copy()
    for slot, pages in [(0, 16), (2, 24)]:
        case.kv_pages[case.page_table[slot, :pages]] = np.nan
    np.testing.assert_array_equal(run(case, window=20), clean)
    # One step less deep, slot 2 sees the last row of its prefix again.
    case.tree_depth[2] = [18, 20, 21, 21]
    spoiled = run(case, window=20)
    clean = run(dataclasses.replace(case, kv_pages=whole), window=20)
    assert not np.isclose(spoiled[2, 0], clean[2, 0]).any()


def test_a_window_changes_the_result_by_depth():
    """Two siblings see the same tree rows, though one stands further on."""
    rng = np.random.default_rng(0)
    case = make_case(rng, B=1, T=4, G=1, page=8, lengths=(6,))
    case.tree_mask[0] = np.eye(4, dtype=bool)
    case.tree_mask[0, 1:, 0] = True
    case.tree_depth[0] = [0, 1, 1, 1]
    case.queries[0, 3] = case.queries[0, 1]
    case.tree_kv[0, :, :, 3] = case.tree_kv[0, :, :, 1]
    out = run(case, window=3)
    np.testing.assert_allclose(out[0, 1], out[0, 3], atol=1e-6)
    assert np.abs(out - run(case)).max() > 1e-2


@pytest.mark.parametrize("T, G", [(1, 1), (5, 4)])
def test_bfloat16_is_close(T, G):
    """Relative norm of the error at most 2e-2, inputs rounded alike."""
    rng = np.random.default_rng(T)
    case = make_case(rng, B=2, T=T, G=G, page=16, lengths=(5, 83))
    case = cast(case, jnp.bfloat16)
    want = attention(case, scale=SCALE)
    error = np.linalg.norm(run(case, jnp.bfloat16) - want) / np.linalg.norm(want)
    assert error < 2e-2


def test_rows_that_see_nothing_are_zeros():
    """Padding in a slot without prefix, through an empty and a running loop."""
    rng = np.random.default_rng(1)
    for lengths in [(0, 0), (0, 20)]:
        case = make_case(rng, B=2, T=5, G=2, page=8, lengths=lengths)
        case.tree_mask[0, 3:] = False
        out = run(case)
        assert np.isfinite(out).all()
        assert (out[0, 3:] == 0).all()
        assert (np.abs(out[0, :3]).max(axis=-1) > 0).all()
        check(case)


@pytest.mark.parametrize("most", [reference.MAX_SLICES, 0], ids=["slices", "gather"])
def test_rows_that_are_not_used_may_hold_anything(most, monkeypatch):
    """NaN in unused pages, in the rest of a last page, and behind the trash page."""
    monkeypatch.setattr(reference, "MAX_SLICES", most)
    rng = np.random.default_rng(2)
    case = make_case(rng, B=2, T=5, G=2, page=8, lengths=(13, 70))
    poisoned = case.kv_pages.copy()
    used = np.zeros(poisoned.shape[0] * 8, bool)
    for b, length in enumerate(case.lengths):
        for at in range(length):
            used[case.page_table[b, at // 8] * 8 + at % 8] = True
    free = ~used.reshape(-1, 8)
    assert free.sum() > 100
    pages, rows = np.nonzero(free)
    poisoned[pages, :, :, rows] = np.nan
    # A new function: the constant is read when it is traced.
    call = jax.jit(functools.partial(tree_attention, spec=SPEC))
    clean = call(cast(case))
    dirty = call(cast(dataclasses.replace(case, kv_pages=poisoned)))
    np.testing.assert_array_equal(clean, dirty)
    np.testing.assert_allclose(
        clean, attention(case, scale=SCALE), atol=2e-5, rtol=2e-5
    )


def test_a_chain_is_causal_attention():
    """Splitting a text anywhere into prefix and chain gives the same rows."""
    rng = np.random.default_rng(3)
    S, K, G, H, page = 12, 2, 2, 8, 8
    q = rng.normal(size=(1, S, K * G, H)).astype(np.float32)
    kv = rng.normal(size=(1, K, 2, S, H)).astype(np.float32)
    k, v = (np.repeat(kv[0, :, i], G, axis=0) for i in (0, 1))
    scores = np.einsum("tnh,nsh->nts", q[0], k) * SCALE
    scores = np.where(np.tril(np.ones((S, S), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    want = np.einsum("nts,nsh->tnh", weights, v)
    for start in (3, 8):
        pages = np.zeros((3, K, 2, page, H), np.float32)
        for at in range(start):
            pages[1 + at // page, :, :, at % page] = kv[0, :, :, at]
        operands = Operands(
            queries=q[:, start:],
            kv_pages=pages,
            page_table=np.array([[1, 2]], np.int32),
            lengths=np.array([start], np.int32),
            tree_kv=kv[:, :, :, start:],
            tree_mask=np.tril(np.ones((1, S - start, S - start), bool)),
        )
        out = attend(operands, SPEC)
        np.testing.assert_allclose(out[0], want[start:], atol=2e-5, rtol=2e-5)


def test_permuting_nodes_permutes_rows():
    rng = np.random.default_rng(4)
    case = make_case(rng, B=1, T=5, G=2, page=8, lengths=(9,))
    order = np.array([0, 3, 1, 4, 2])
    moved = dataclasses.replace(
        case,
        queries=case.queries[:, order],
        tree_kv=case.tree_kv[:, :, :, order],
        tree_mask=case.tree_mask[:, order][:, :, order],
    )
    out = run(case)
    np.testing.assert_allclose(run(moved), out[:, order], atol=2e-6)
    assert np.abs(out - out[:, order]).max() > 1e-2


def test_only_ancestors_have_a_gradient():
    """The gradient of a node with respect to tree rows is its row of the mask."""
    rng = np.random.default_rng(5)
    _, ancestors, _ = random_tree(rng, 6)
    q = jnp.asarray(rng.normal(size=(1, 6, 2, 8)), jnp.float32)
    kv = jnp.asarray(rng.normal(size=(1, 2, 2, 6, 8)), jnp.float32)

    @jax.jit
    @jax.grad
    def gradient(kv, node):
        operands = Operands(queries=q, tree_kv=kv, tree_mask=ancestors[None])
        out = tree_attention(operands, SPEC)
        return jnp.sum(out[0, node] * jnp.arange(1.0, 9.0))

    for node in range(6):
        keys, values = np.abs(gradient(kv, node))[0].max(axis=(0, 3))
        assert (keys[~ancestors[node]] == 0).all()
        assert (values[~ancestors[node]] == 0).all()
        assert (values[ancestors[node]] > 0).all()
        if ancestors[node].sum() > 1:
            assert (keys[ancestors[node]] > 0).all()


@pytest.mark.parametrize("B, page", [(2, 8), (1, 16)])
def test_the_gather_equals_the_slices(B, page, monkeypatch):
    """Both ways to read pages give the same bits."""
    rng = np.random.default_rng(6)
    case = make_case(rng, B=B, T=5, G=2, page=page, lengths=(75, 9)[:B])
    assert B * (reference.BLOCK_ROWS // page) <= reference.MAX_SLICES
    sliced = run(case)
    monkeypatch.setattr(reference, "MAX_SLICES", 0)
    gathered = jax.jit(functools.partial(tree_attention, spec=SPEC))(cast(case))
    np.testing.assert_array_equal(gathered, sliced)


def test_a_large_batch_takes_the_gather():
    rng = np.random.default_rng(7)
    lengths = rng.integers(0, 80, 5)
    case = make_case(rng, B=5, T=2, G=1, page=8, lengths=lengths)
    assert 5 * (reference.BLOCK_ROWS // 8) > reference.MAX_SLICES
    check(case)


WRONG = {
    "queries": (np.zeros((2, 5, 8)), r"queries are \(2, 5, 8\)"),
    "tree_kv": (np.zeros((2, 2, 2, 4, 8)), r"tree_kv \(2, 2, 2, 4, 8\)"),
    "tree_kv ": (np.zeros((2, 3, 2, 5, 8)), r"tree_kv \(2, 3, 2, 5, 8\)"),
    "tree_kv  ": (np.zeros((2, 2, 5, 8)), r"tree_kv \(2, 2, 5, 8\)"),
    "tree_mask": (np.ones((2, 5, 6), bool), r"tree_mask is \(2, 5, 6\)"),
    "kv_pages": (np.zeros((9, 2, 2, 8, 4)), r"kv_pages is \(9, 2, 2, 8, 4\)"),
    "kv_pages ": (np.zeros((9, 2, 8, 8)), r"kv_pages is \(9, 2, 8, 8\)"),
    "page_table": (np.zeros((3, 4), np.int32), r"page_table \(3, 4\)"),
    "page_table ": (None, "page_table None"),
    "lengths": (np.zeros((2, 1), np.int32), r"lengths \(2, 1\)"),
    "tree_depth": (np.zeros((2, 4), np.int32), r"tree_depth is \(2, 4\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_message_names_the_offending_shape(name):
    value, message = WRONG[name]
    rng = np.random.default_rng(8)
    case = make_case(rng, B=2, T=5, G=2, page=8, lengths=(1, 2))
    case = dataclasses.replace(case, **{name.strip(): value})
    with pytest.raises(ValueError, match=message):
        tree_attention(case, AttentionSpec(scale=SCALE, window=4))


def test_a_window_needs_depths():
    case = make_case(np.random.default_rng(9), B=1, T=2, G=1, page=8, lengths=(1,))
    with pytest.raises(ValueError, match="window=4 needs tree_depth"):
        tree_attention(
            dataclasses.replace(case, tree_depth=None),
            AttentionSpec(scale=SCALE, window=4),
        )


def test_the_reference_is_the_default_here():
    case = make_case(np.random.default_rng(9), B=1, T=2, G=1, page=8, lengths=(1,))
    named = AttentionSpec(scale=SCALE, implementation="reference")
    out, default = (tree_attention(cast(case), spec) for spec in (named, SPEC))
    np.testing.assert_array_equal(out, default)
