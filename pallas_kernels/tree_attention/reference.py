"""Tree attention in plain XLA: the default on a CPU, the oracle of the kernels.

The prefix is walked in blocks of whole pages with a running maximum and sum, so that
work and memory follow the longest slot, not the capacity of the cache, and no T x S
array exists.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tree_attention.operands import Operands
from pallas_kernels.tree_attention.quantized import rescale
from pallas_kernels.tree_attention.spec import AttentionSpec

# Prefix rows per block: one page of the usual size, which needs no copy to join it to
# others, and whose scores stay in a CPU's second-level cache.
BLOCK_ROWS = 64
# Up to here pages are copied one by one, which is a memcpy each; a gather is compiled
# once whatever the batch, but computes an index per element on a CPU.
MAX_SLICES = 16


def tree_attention(operands: Operands, spec: AttentionSpec) -> jax.Array:
    """See `api.tree_attention`."""
    B, T, N, H, K, G, U = operands.dims
    q, lengths, tree_kv = operands.queries, operands.lengths, operands.tree_kv
    window, soft_cap = spec.window, spec.soft_cap
    R = T * G
    # Keys stand on the left of their product, untransposed, and the R rows on the
    # right: on a CPU that form costs the same for one row and for many.
    q_BKHR = q.reshape(B, T, K, G, H).transpose(0, 2, 4, 1, 3).reshape(B, K, H, R)

    def scores(keys_BKSH, scales_BK1S=None):
        s_BKSR = jnp.einsum(
            "bksh,bkhr->bksr",
            keys_BKSH,
            q_BKHR,
            preferred_element_type=jnp.float32,
            precision=_precision(q),
        )
        s_BKSR = lax.optimization_barrier(s_BKSR)
        s_BKRS = rescale(s_BKSR.swapaxes(2, 3) * spec.scale, scales_BK1S)
        return s_BKRS if soft_cap is None else soft_cap * jnp.tanh(s_BKRS / soft_cap)

    def weigh(weights_BKRS, values_BKSH):
        return jnp.einsum(
            "bkrs,bksh->bkrh",
            weights_BKRS.astype(q.dtype),
            values_BKSH,
            preferred_element_type=jnp.float32,
            precision=_precision(q),
        )

    def rows(mask_BTS):
        """[B, T, S] -> [B, 1, R, S]: the G queries of a node share its mask."""
        return jnp.repeat(mask_BTS, G, axis=1)[:, None]

    allowed = operands.tree_mask
    if window is not None:
        depth_BT = operands.tree_depth[:, U - T :]
        allowed &= depth_BT[:, :, None] - operands.tree_depth[:, None, :] < window
    masked = jnp.where(rows(allowed), scores(tree_kv[:, :, 0]), -jnp.inf)
    top = jnp.max(masked, axis=-1, keepdims=True)
    weights = jnp.exp(masked - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    carry = top, total, weigh(weights, tree_kv[:, :, 1])

    if operands.has_prefix:
        page, max_pages = operands.page, operands.max_pages
        per_block = min(max(1, BLOCK_ROWS // page), max_pages)
        short = -max_pages % per_block
        table = jnp.pad(operands.page_table, ((0, 0), (0, short)))
        block = per_block * page

        def body(i, carry):
            top, total, out = carry
            ids = lax.dynamic_slice_in_dim(table, i * per_block, per_block, axis=1)
            position_S = i * block + jnp.arange(block)
            filled_BS = position_S[None] < lengths[:, None]
            seen = filled_BS[:, None, None]
            if window is not None:
                position_BT = lengths[:, None] + depth_BT
                seen = seen & rows(position_BT[:, :, None] - position_S < window)
            s = scores(*_read_rows(operands, ids, 0))
            s = jnp.where(seen, s, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
            safe = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
            shrink = jnp.exp(top - safe)
            weights = jnp.exp(s - safe)
            # A row of an unused page may hold anything; 0 · NaN must not reach the sum.
            values, scales_BK1S = _read_rows(operands, ids, 1)
            values = jnp.where(filled_BS[:, None, :, None], values, 0)
            total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            if scales_BK1S is not None:
                scales_BK1S = jnp.where(filled_BS[:, None, None], scales_BK1S, 0.0)
            weights = rescale(weights, scales_BK1S)
            return new_top, total, out * shrink + weigh(weights, values)

        first, end_B = 0, lengths
        if window is not None:
            # From the oldest row that the least deep node of any slot still sees.
            oldest_B = lengths + jnp.min(depth_BT, axis=1) - window + 1
            end_B = jnp.where(oldest_B < lengths, lengths, 0)
            oldest_B = jnp.where(end_B > 0, oldest_B, jnp.iinfo(jnp.int32).max)
            first = jnp.maximum(jnp.min(oldest_B), 0) // block
        blocks = (jnp.max(end_B) + block - 1) // block
        carry = lax.fori_loop(first, blocks, body, carry)

    _, total, out = carry
    out = jnp.where(total > 0, out / jnp.where(total > 0, total, 1.0), 0.0)
    out = out.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4)
    return out.reshape(B, T, N, H).astype(q.dtype)


def _precision(q):
    return lax.Precision.HIGHEST if q.dtype == jnp.float32 else None


def _read_rows(operands, ids_BJ, which):
    """Keys (0) or values (1) of some pages, and their scales.

    Returns:
      [B, K, J * page, H] in the dtype of the queries, and [B, K, 1, J * page], or None
      where rows have no scales.
    """
    rows = _read_pages(operands, ids_BJ, which).astype(operands.queries.dtype)
    if not operands.is_quantized:
        return rows, None
    B, J = ids_BJ.shape
    scales = operands.kv_scales[ids_BJ, :, which, : operands.page]
    scales = scales.transpose(0, 2, 1, 3).reshape(B, -1, 1, J * operands.page)
    return rows, scales


def _read_pages(operands, ids_BJ, which):
    """Rows of pages ids [B, J] as they lie there, [B, K, J * page, H]."""
    B, J = ids_BJ.shape
    kv_pages, page = operands.kv_pages, operands.page
    K, H = operands.dims.K, operands.dims.H
    first = which * H if operands.is_joined else 0
    which = 0 if operands.is_joined else which
    if B * J > MAX_SLICES:
        rows = kv_pages[:, :, which, :, first : first + H][ids_BJ]
        return rows.transpose(0, 2, 1, 3, 4).reshape(B, K, J * page, H)
    size = (1, K, 1, page, H)
    slots = [
        jnp.concatenate(
            [
                lax.dynamic_slice(kv_pages, (ids_BJ[b, j], 0, which, 0, first), size)[0]
                for j in range(J)
            ],
            axis=2,
        )
        for b in range(B)
    ]
    return jnp.stack(slots).reshape(B, K, J * page, H)
