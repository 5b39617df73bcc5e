"""Draws from columns of masses by inversion, in the form that is quick on a CPU.

A column is cut into blocks; one uniform finds the block and a second one the token in
it. That takes one pass of sums over the vocabulary for all draws of a column, no noise
of the vocabulary's size, and resolves masses far below the 2**-24 of one uniform.
Drawing siblings one after the other and leaving out those that were drawn has the law
of the best of log q + Gumbel noise, in falling order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from treespec_jax.acceptance import select


def one(mass_VR: jax.Array, uniforms_R2: jax.Array) -> jax.Array:
    """int32 [R]: a token of every column, with chance in proportion to its mass.

    Never a token without mass, unless no token has any.
    """
    blocks_nR, inside = _blocks(mass_VR)
    block_R = invert(blocks_nR, uniforms_R2[:, 0])
    token_R = invert(inside(block_R), uniforms_R2[:, 1])
    return block_R * (mass_VR.shape[0] // blocks_nR.shape[0]) + token_R


def siblings(
    mass_VR: jax.Array, uniforms_RK2: jax.Array, replacement: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """K tokens of every column in the order in which they were drawn.

    Args:
      mass_VR: q up to a factor per column.
      uniforms_RK2: in [0, 1).
      replacement: draw independently; else a token comes once.

    Returns:
      tokens int32 [R, K]; their shares of the column's mass [R, K], 0 where nothing
      was left to draw; the share of mass not drawn before each [R, K] (1 for the first,
      and with replacement). Shares are sums of what is left, never one minus something,
      so that they are right to rounding however small they are.
    """
    blocks_nR, inside = _blocks(mass_VR)
    size = mass_VR.shape[0] // blocks_nR.shape[0]
    at_JR = jnp.arange(size, dtype=jnp.int32)[:, None]
    column_R = jnp.arange(mass_VR.shape[1])
    whole_R = jnp.sum(blocks_nR, axis=0)
    safe_R = jnp.where(whole_R > 0, whole_R, 1.0)
    tokens, shares, left = [], [], []
    for turn in range(uniforms_RK2.shape[1]):
        total_R = jnp.sum(blocks_nR, axis=0)
        block_R = invert(blocks_nR, uniforms_RK2[:, turn, 0])
        mass_JR = inside(block_R)
        if not replacement:
            for token_R, share_R in zip(tokens, shares, strict=True):
                taken = (block_R * size + at_JR == token_R) & (share_R > 0)
                mass_JR = jnp.where(taken, 0.0, mass_JR)
        place_R = invert(mass_JR, uniforms_RK2[:, turn, 1])
        own_R = jnp.take_along_axis(mass_JR, place_R[None], axis=0)[0]
        own_R = jnp.where(total_R > 0, own_R, 0.0)
        tokens.append(block_R * size + place_R)
        shares.append(own_R / safe_R)
        left.append(total_R / safe_R)
        if not replacement:
            rest_R = jnp.sum(jnp.where(at_JR == place_R, 0.0, mass_JR), axis=0)
            blocks_nR = blocks_nR.at[block_R, column_R].set(rest_R)
    return tuple(jnp.stack(x, axis=1) for x in (tokens, shares, left))


def _blocks(mass_VR):
    """Sums of blocks [n, R], and a function from a block of each column to its rows."""
    V, R = mass_VR.shape
    size = select.block_size(V) or V
    x = mass_VR.reshape(V // size, size, R)
    rows, columns = jnp.arange(size)[:, None], jnp.arange(R)
    return jnp.sum(x, axis=1), lambda block_R: x[block_R, rows, columns]


def invert(mass_JR, uniform_R):
    """int32 [R]: the first row whose running sum passes the uniform's share."""
    J = mass_JR.shape[0]
    if J == 1:
        return jnp.zeros(mass_JR.shape[1], jnp.int32)
    sums_JR = jnp.cumsum(mass_JR, axis=0)
    # Running sums round, so that one may rise where there is no mass, or the last may
    # not be passed; a row without mass is never taken for that.
    some_JR = mass_JR > 0
    passed_JR = (sums_JR > uniform_R.astype(sums_JR.dtype) * sums_JR[-1]) & some_JR
    at_JR = jnp.arange(J, dtype=jnp.int32)[:, None]
    first_R = jnp.min(jnp.where(passed_JR, at_JR, J), axis=0)
    last_R = jnp.max(jnp.where(some_JR, at_JR, 0), axis=0)
    return jnp.minimum(first_R, last_R)
