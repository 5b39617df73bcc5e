"""Largest entries of long rows, exactly, in the form that is quick on a CPU.

A row is cut into blocks: the maxima of the blocks (a plain reduction, which vectorises)
say which few blocks can hold the answer, and only those are searched for indices.
`jnp.argmax` carries an index through the whole reduction and takes ten times as long
(M=16 rows of 32000: 2.5 ms against 0.15 ms on two cores).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_BLOCKS = range(512, 31, -1)


def _block(vocab: int) -> int | None:
    """A divisor of the row length to cut it by, or None if there is no fitting one."""
    if vocab < 2048:
        return None
    return next((size for size in _BLOCKS if vocab % size == 0), None)


def argmax(x: jax.Array) -> jax.Array:
    """int32 [...]: first index of the maximum along the last axis of x [..., V]."""
    *lead, vocab = x.shape
    size = _block(vocab)
    if size is None:
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    x = x.reshape(-1, vocab // size, size)
    tops = jnp.max(x, axis=2)
    best = jnp.max(tops, axis=1, keepdims=True)
    block = _first(tops == best)
    inside = jnp.take_along_axis(x, block[:, None, None], axis=1)[:, 0]
    return (block * size + _first(inside == best)).reshape(lead)


def top_k(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest along the last axis of x [..., V], best first.

    Returns:
      values [..., count] and int32 indices [..., count]; ties go to the lower index.
    """
    *lead, vocab = x.shape
    size = _block(vocab)
    if size is None or count * 4 > vocab // size:
        values, indices = lax.top_k(x, count)
        return values, indices.astype(jnp.int32)
    x = x.reshape(-1, vocab // size, size)
    # The count best entries lie in the count blocks with the best maxima; sorted, so
    # that ties still go to the lower index.
    _, blocks = lax.top_k(jnp.max(x, axis=2), count)
    blocks = jnp.sort(blocks.astype(jnp.int32), axis=1)
    inside = jnp.take_along_axis(x, blocks[:, :, None], axis=1)
    values, at = lax.top_k(inside.reshape(x.shape[0], count * size), count)
    at = at.astype(jnp.int32)
    indices = jnp.take_along_axis(blocks, at // size, axis=1) * size + at % size
    return values.reshape(*lead, count), indices.reshape(*lead, count)


def _first(mark: jax.Array) -> jax.Array:
    """int32 [M]: first true of each row of mark [M, J]."""
    size = mark.shape[1]
    at = jnp.where(mark, jnp.arange(size, dtype=jnp.int32), size - 1)
    return jnp.min(at, axis=1)
