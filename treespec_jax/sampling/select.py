"""Largest entries of long columns, exactly, in the form that is quick on a CPU.

A column is cut into blocks: the maxima of the blocks (a plain reduction, which
vectorises) say which few blocks can hold the answer, and only those are searched for
indices. `jnp.argmax` carries an index through the whole reduction and takes several
times as long.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from treespec_jax.branches import on_gpu

# Comparisons up to which the best of rows are found by comparing all entries of a row
# with all on a GPU: one kernel, where a sort of short rows is several.
MOST_COMPARISONS = 1 << 26


def block_size(vocab: int) -> int | None:
    """A divisor of the column length to cut it by, or None if none fits."""
    if vocab < 2048:
        return None
    return next((size for size in range(512, 63, -16) if vocab % size == 0), None)


def argmax(x_VR: jax.Array) -> jax.Array:
    """int32 [R]: first index of the maximum of every column."""
    V, R = x_VR.shape
    size = block_size(V)
    if size is None:
        return jnp.argmax(x_VR, axis=0).astype(jnp.int32)
    x = x_VR.reshape(V // size, size, R)
    tops = jnp.max(x, axis=1)
    best_R = jnp.max(tops, axis=0)
    block_R = _first(tops == best_R)
    inside = _columns(x, block_R[None])[0]
    return block_R * size + _first(inside == best_R)


def top_k(x_VR: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of every column, best first.

    Returns:
      values [R, count] and int32 indices [R, count]; ties go to the lower index.
    """
    V, R = x_VR.shape
    size = block_size(V)
    if size is None or count * 4 > V // size:
        return top_k_rows(x_VR.T, count)
    x = x_VR.reshape(V // size, size, R)
    # The count best entries lie in the count blocks with the best maxima; sorted, so
    # that ties still go to the lower index.
    _, blocks = top_k_rows(jnp.max(x, axis=1).T, count)
    blocks = ascending(blocks)
    inside = _columns(x, blocks.T).transpose(2, 0, 1).reshape(R, count * size)
    values, columns = top_k_rows(inside, count)
    indices = (
        jnp.take_along_axis(blocks, columns // size, axis=1) * size + columns % size
    )
    return values, indices


def ascending(x: jax.Array) -> jax.Array:
    """Rows of different integers, sorted."""
    return on_gpu(ascending_by_counting, functools.partial(jnp.sort, axis=-1), x)


def ascending_by_counting(x: jax.Array) -> jax.Array:
    """`ascending` without a sort."""
    rank = jnp.sum(x[..., None, :] < x[..., None], axis=-1, dtype=jnp.int32)
    number = jnp.arange(x.shape[-1], dtype=jnp.int32)
    mine = rank[..., None, :] == number[:, None]
    return jnp.sum(jnp.where(mine, x[..., None, :], 0), axis=-1, dtype=x.dtype)


def top_k_rows(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k` along the last axis, with int32 indices."""
    if x.size * x.shape[-1] <= MOST_COMPARISONS:
        return on_gpu(
            functools.partial(top_k_by_counting, count=count),
            functools.partial(_top_k_by_sorting, count=count),
            x,
        )
    return _top_k_by_sorting(x, count)


def top_k_by_counting(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`top_k_rows` of short rows, for a device on which a sort is many kernels.

    An entry's rank is the number of entries before it.
    """
    number = jnp.arange(x.shape[-1], dtype=jnp.int32)
    before = (x[..., None, :] > x[..., None]) | (
        (x[..., None, :] == x[..., None]) & (number < number[:, None])
    )
    rank = jnp.sum(before, axis=-1, dtype=jnp.int32)
    found = rank[..., None, :] == jnp.arange(count, dtype=jnp.int32)[:, None]
    indices = jnp.sum(jnp.where(found, number, 0), axis=-1, dtype=jnp.int32)
    return jnp.take_along_axis(x, indices, axis=-1), indices


def _top_k_by_sorting(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    values, indices = lax.top_k(x, count)
    # Behind the barrier nobody's slice is merged with those that make it a top-k: for
    # a CPU it would be a sort of everything, by a comparator, at ten times the cost.
    # One barrier for both would take the top-k's own tuple, and XLA crashes over that
    # when it compiles for a mesh of CPUs.
    barrier = lax.optimization_barrier
    return barrier(values), barrier(indices.astype(jnp.int32))


def _columns(x: jax.Array, blocks_JR: jax.Array) -> jax.Array:
    """Entries [J, size, R] of the blocks that each column named, of x [n, size, R]."""
    size, R = x.shape[1:]
    return x[blocks_JR[:, None], jnp.arange(size)[:, None], jnp.arange(R)]


def _first(mark: jax.Array) -> jax.Array:
    """int32 [R]: first true of each column of mark [J, R]."""
    size = mark.shape[0]
    row_J1 = jnp.arange(size, dtype=jnp.int32)[:, None]
    return jnp.min(jnp.where(mark, row_J1, size - 1), axis=0)
