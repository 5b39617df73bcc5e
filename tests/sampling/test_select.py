"""Argmax and top-k of columns against numpy, ties to the lower index."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from treespec_jax.sampling import select

# Blocks of 512, of 500, none (short), none (no divisor): both paths of `select`.
VOCABS = {97: None, 2048: 512, 32000: 512 - 12, 2051: None}
argmax = jax.jit(select.argmax)
top_k = jax.jit(select.top_k, static_argnums=1)


def columns(vocab, kind) -> np.ndarray:
    """float32 [vocab, 3]: normal, or of few values and so full of ties."""
    rng = np.random.default_rng(vocab)
    if kind == "ties":
        return rng.integers(0, 5, (vocab, 3)).astype(np.float32)
    x = rng.normal(size=(vocab, 3)).astype(np.float32)
    x[-1, 1] = x[0, 2] = 50.0
    return x


def best(x, count):
    """Stable sort by falling value."""
    order = np.argsort(-x, axis=0, kind="stable")[:count].T
    return np.take_along_axis(x.T, order, axis=1), order


def test_the_sizes_cover_both_paths():
    assert [select.block_size(v) is None for v in VOCABS] == [True, False, False, True]


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("vocab", VOCABS)
def test_argmax_is_the_first_maximum(vocab, kind):
    x = columns(vocab, kind)
    got = argmax(x)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, x.argmax(axis=0))


@pytest.mark.parametrize("vocab", VOCABS)
def test_argmax_with_cut_tokens(vocab):
    """Truncated logits are mostly -inf, ties among them too."""
    x = np.full((vocab, 3), -np.inf, np.float32)
    x[[vocab - 1, vocab // 2], [0, 1]] = -3.0
    x[[5, vocab // 2, vocab - 2], 2] = 1.0
    np.testing.assert_array_equal(argmax(x), x.argmax(axis=0))


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("vocab, count", [(97, 4), (2048, 1), (32000, 8), (2051, 8)])
def test_top_k_is_a_stable_sort(vocab, count, kind):
    x = columns(vocab, kind)
    values, indices = top_k(x, count)
    want_values, want_indices = best(x, count)
    np.testing.assert_array_equal(values, want_values)
    np.testing.assert_array_equal(indices, want_indices)
    assert indices.dtype == np.int32


def test_top_k_of_neighbours_in_one_block():
    """The best entries may all lie in one block."""
    x = columns(32000, "normal")
    x[1000:1008] = 100 + np.arange(8)[:, None] % 3
    values, indices = top_k(x, 8)
    want_values, want_indices = best(x, 8)
    np.testing.assert_array_equal(values, want_values)
    np.testing.assert_array_equal(indices, want_indices)


def test_top_k_of_more_than_the_blocks_can_tell():
    """Too many for the blocks: the plain path, the same answer."""
    x = columns(2048, "ties")
    values, indices = top_k(x, 300)
    np.testing.assert_array_equal(values, best(x, 300)[0])
    np.testing.assert_array_equal(indices, best(x, 300)[1])


def test_ties_between_blocks_go_to_the_lower_index():
    """A later block that holds the best entry must not come first in a tie."""
    x = np.zeros((32000, 1), np.float32)
    x[[9000, 20000, 20001], 0] = 8.0, 8.0, 9.0
    assert top_k(x, 4)[1].tolist() == [[20001, 9000, 20000, 0]]


@pytest.mark.usefixtures("optimised_programs")
def test_a_shorter_look_at_the_top_is_no_sort_on_a_cpu():
    """Two slices of different length of one result once made XLA sort everything."""

    def run(x):
        values, indices = select.top_k(x, 8)
        return values, indices[:, :3]

    x = np.zeros((512, 4), np.float32)
    text = jax.jit(run).lower(x).compile().as_text()
    if jax.default_backend() == "cpu":
        assert " sort(" not in text and "TopK" in text
