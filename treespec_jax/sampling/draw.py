"""Samples from columns of weights by inversion, in the form that is quick on a CPU.

A column is cut into blocks; one uniform finds the block and a second one the token in
it. That takes one pass of sums over the vocabulary for all samples of a column, no
noise of the vocabulary's size, and resolves weights far below the 2**-24 of one
uniform. Sampling siblings one after the other, without those that were sampled before,
has the distribution of the best of log q + Gumbel noise, in falling order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from treespec_jax.sampling import select


def one(weights_VR: jax.Array, uniforms_R2: jax.Array) -> jax.Array:
    """int32 [R]: a token of every column, with probability in proportion to its weight.

    Never a token of weight 0, unless no token has any.
    """
    blocks_nR, rows_of = _blocks(weights_VR, lambda x: x)
    block_R = invert(blocks_nR, uniforms_R2[:, 0])
    token_R = invert(rows_of(block_R), uniforms_R2[:, 1])
    return block_R * (weights_VR.shape[0] // blocks_nR.shape[0]) + token_R


def siblings(
    log_q_VR: jax.Array, uniforms_RX2: jax.Array, replacement: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """X tokens of every column in the order in which they are sampled.

    Args:
      log_q_VR: log q up to a constant per column.
      uniforms_RX2: in [0, 1).
      replacement: sample independently; else a token comes once.

    Returns:
      tokens int32 [R, X]; their shares of the column's total [R, X], 0 where nothing
      was left to sample; the share of the total not sampled before each [R, X] (1 for
      the first, and with replacement). Shares are sums of what remains, never one
      minus something, so that they are right to the rounding of log q however small
      they are.
    """
    blocks_nR, rows_of = _blocks(log_q_VR, jnp.exp)
    size = log_q_VR.shape[0] // blocks_nR.shape[0]
    row_JR = jnp.arange(size, dtype=jnp.int32)[:, None]
    column_R = jnp.arange(log_q_VR.shape[1])
    whole_R = jnp.sum(blocks_nR, axis=0)
    safe_R = jnp.where(whole_R > 0, whole_R, 1.0)
    tokens, shares, remaining = [], [], []
    for turn in range(uniforms_RX2.shape[1]):
        total_R = jnp.sum(blocks_nR, axis=0)
        block_R = invert(blocks_nR, uniforms_RX2[:, turn, 0])
        weights_JR = rows_of(block_R)
        if not replacement:
            for token_R, share_R in zip(tokens, shares, strict=True):
                taken = (block_R * size + row_JR == token_R) & (share_R > 0)
                weights_JR = jnp.where(taken, 0.0, weights_JR)
        found_R = invert(weights_JR, uniforms_RX2[:, turn, 1])
        weight_R = jnp.take_along_axis(weights_JR, found_R[None], axis=0)[0]
        weight_R = jnp.where(total_R > 0, weight_R, 0.0)
        tokens.append(block_R * size + found_R)
        shares.append(weight_R / safe_R)
        remaining.append(total_R / safe_R)
        if not replacement:
            rest_R = jnp.sum(jnp.where(row_JR == found_R, 0.0, weights_JR), axis=0)
            blocks_nR = blocks_nR.at[block_R, column_R].set(rest_R)
    return tuple(jnp.stack(x, axis=1) for x in (tokens, shares, remaining))


def _blocks(x_VR, weigh):
    """Sums of blocks [n, R], and a function from a block of each column to its rows."""
    V, R = x_VR.shape
    size = select.block_size(V) or V
    x = x_VR.reshape(V // size, size, R)
    rows, columns = jnp.arange(size)[:, None], jnp.arange(R)
    sums = jnp.sum(weigh(x), axis=1)
    return sums, lambda block_R: weigh(x[block_R, rows, columns])


def invert(weights_JR, uniform_R):
    """int32 [R]: the first row whose running sum passes the uniform's share."""
    J = weights_JR.shape[0]
    if J == 1:
        return jnp.zeros(weights_JR.shape[1], jnp.int32)
    sums_JR = jnp.cumsum(weights_JR, axis=0)
    # Running sums round, so that one may rise where there is no weight, or the last
    # may not be passed; a row without weight is never taken for that.
    some_JR = weights_JR > 0
    passed_JR = (sums_JR > uniform_R.astype(sums_JR.dtype) * sums_JR[-1]) & some_JR
    row_JR = jnp.arange(J, dtype=jnp.int32)[:, None]
    first_R = jnp.min(jnp.where(passed_JR, row_JR, J), axis=0)
    last_R = jnp.max(jnp.where(some_JR, row_JR, 0), axis=0)
    return jnp.minimum(first_R, last_R)
