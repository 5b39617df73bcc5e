"""Tree attention in plain XLA: the default on a CPU, the oracle of the kernels.

The prefix is walked in blocks of whole pages with a running maximum and sum, so that
work and memory follow the longest slot, not the capacity of the cache, and no T x S
array exists.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

# Prefix rows per block: one page of the usual size, which needs no copy to join it to
# others, and whose scores stay in a CPU's second-level cache.
BLOCK_ROWS = 64
# Up to here pages are copied one by one, which is a memcpy each; a gather is compiled
# once whatever the batch, but computes an index per element on a CPU.
MAX_SLICES = 16


def tree_attention(
    q,
    kv_pages,
    page_table,
    lengths,
    tree_kv,
    tree_mask,
    tree_depth=None,
    kv_scales=None,
    *,
    scale,
    window=None,
    soft_cap=None,
):
    """See `api.tree_attention`."""
    B, T, N, H = q.shape
    K, U = tree_kv.shape[1], tree_kv.shape[3]
    G = N // K
    R = T * G
    # Keys stand on the left of their product, untransposed, and the R rows on the
    # right: on a CPU that form costs the same for one row and for many.
    q_BKHR = q.reshape(B, T, K, G, H).transpose(0, 2, 4, 1, 3).reshape(B, K, H, R)

    def scores(keys_BKSH, scale_BKS=None):
        s_BKSR = jnp.einsum(
            "bksh,bkhr->bksr",
            keys_BKSH,
            q_BKHR,
            preferred_element_type=jnp.float32,
            precision=_precision(q),
        )
        s_BKSR = lax.optimization_barrier(s_BKSR)
        s_BKRS = s_BKSR.swapaxes(2, 3) * scale
        if scale_BKS is not None:
            s_BKRS *= scale_BKS[:, :, None]
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

    allowed = tree_mask
    if window is not None:
        depth_BT = tree_depth[:, U - T :]
        allowed &= depth_BT[:, :, None] - tree_depth[:, None, :] < window
    masked = jnp.where(rows(allowed), scores(tree_kv[:, :, 0]), -jnp.inf)
    top = jnp.max(masked, axis=-1, keepdims=True)
    weights = jnp.exp(masked - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    carry = top, total, weigh(weights, tree_kv[:, :, 1])

    if kv_pages is not None:
        page = kv_pages.shape[3]
        per_block = min(max(1, BLOCK_ROWS // page), page_table.shape[1])
        short = -page_table.shape[1] % per_block
        table = jnp.pad(page_table, ((0, 0), (0, short)))
        block = per_block * page

        def body(i, carry):
            top, total, out = carry
            ids = lax.dynamic_slice_in_dim(table, i * per_block, per_block, axis=1)
            at_S = i * block + jnp.arange(block)
            filled_BS = at_S[None] < lengths[:, None]
            seen = filled_BS[:, None, None]
            if window is not None:
                position_BT = lengths[:, None] + depth_BT
                seen = seen & rows(position_BT[:, :, None] - at_S < window)
            keys = _read_pages(kv_pages, ids, 0, H).astype(q.dtype)
            s = scores(keys, _read_scales(kv_scales, ids, 0, page))
            s = jnp.where(seen, s, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
            safe = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
            shrink = jnp.exp(top - safe)
            weights = jnp.exp(s - safe)
            # A row of an unused page may hold anything; 0 · NaN must not reach the sum.
            values = _read_pages(kv_pages, ids, 1, H).astype(q.dtype)
            values = jnp.where(filled_BS[:, None, :, None], values, 0)
            total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            if kv_scales is not None:
                value_scale = _read_scales(kv_scales, ids, 1, page)
                value_scale = jnp.where(filled_BS[:, None], value_scale, 0.0)
                weights *= value_scale[:, :, None]
            return (
                new_top,
                total,
                out * shrink + weigh(weights, values),
            )

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


def _read_pages(kv_pages, ids_BJ, which, H):
    """Keys (0) or values (1) of pages ids [B, J] as rows [B, K, J * page, H]."""
    B, J = ids_BJ.shape
    _, K, _, page, _ = kv_pages.shape
    if B * J > MAX_SLICES:
        rows = kv_pages[:, :, which, :, :H][ids_BJ]
        return rows.transpose(0, 2, 1, 3, 4).reshape(B, K, J * page, H)
    size = (1, K, 1, page, H)
    slots = [
        jnp.concatenate(
            [
                lax.dynamic_slice(kv_pages, (ids_BJ[b, j], 0, which, 0, 0), size)[0]
                for j in range(J)
            ],
            axis=2,
        )
        for b in range(B)
    ]
    return jnp.stack(slots).reshape(B, K, J * page, H)


def _read_scales(kv_scales, ids_BJ, which, page):
    """Scales of the rows that `_read_pages` reads, [B, K, J * page], or None."""
    if kv_scales is None:
        return None
    B, J = ids_BJ.shape
    scales = kv_scales[ids_BJ, :, which, :page]
    return scales.transpose(0, 2, 1, 3).reshape(B, -1, J * page)
