"""Tree attention as one Triton kernel, for Hopper and Ampere.

One program holds a tile of the R = T * G query rows of a (slot, key/value head),
walks the slot's own prefix block by block through the page table, and adds the tree as
last block. Where slots and heads are too few to fill the device, the prefix is split
among programs, whose partial results (maximum, sum, weighted values) a last step
combines (Dao et al., "Flash-Decoding", 2023).

Triton serves both generations with one kernel; Mosaic GPU reaches tensor cores on
Hopper and later only. Every block is a power of two there, so that what a head width,
a page or a tree lacks to one is masked.

Letters as in `operands`; R rows of a tile, S keys of a block, D the head width
rounded up to a power of two.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.compat import triton as plgpu
from pallas_kernels.tree_attention.gpu_sizes import SMALLEST, power_of_two
from pallas_kernels.tree_attention.operands import Operands
from pallas_kernels.tree_attention.quantized import rescale
from pallas_kernels.tree_attention.spec import AttentionSpec

# Below every score and yet finite: exp2(LOWEST - LOWEST) is 1, not NaN.
LOWEST = -1e38
LOG2_E = math.log2(math.e)
CONTRACT_LAST = (((1,), (1,)), ((), ()))
CONTRACT_INNER = (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class _Static:
    """What the kernel's code depends on."""

    T: int
    U: int
    K: int
    G: int
    H: int
    D: int
    page: int
    rows: int
    keys: int
    tree_keys: int
    splits: int
    split_blocks: int  # least number of blocks of one part of a split prefix
    scale: float
    window: int | None
    soft_cap: float | None
    prefix: bool
    quantized: bool


def _read(ref, *index, mask=None):
    """Elements of `ref` at broadcast indices, zeros where `mask` is false."""
    other = None if mask is None else jnp.zeros((), ref.dtype)
    return plgpu.load(ref.at[index], mask=mask, other=other)


def _dot(a, b, dims):
    # Without HIGHEST the tensor cores would round float32 operands to ten bits.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, dims, preferred_element_type=jnp.float32, precision=precision
    )


def _both(*masks):
    """The conjunction of the masks that there are, or None."""
    masks = [m for m in masks if m is not None]
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _kernel(static: _Static, *refs):
    refs = list(refs)

    def take(wanted=True):
        return refs.pop(0) if wanted else None

    prefix, windowed = static.prefix, static.window is not None
    q_ref = take()  # [B, T, N, H]
    tree_ref = take()  # [B, K, 2, U, H]
    mask_ref = take()  # [B, T, U]
    depth_ref = take(windowed)  # [B, U]
    table_ref = take(prefix)  # [B, max_pages]
    lengths_ref = take(prefix)  # [B]
    pages_ref = take(prefix)  # [P, K, 2, page, >= H]
    scales_ref = take(static.quantized)  # [P, K, 2, >= page]
    out_ref = take()  # [B, T, N, H], or [splits, B, T, N, H] float32
    top_ref = take(static.splits > 1)  # [splits, B, T, N]
    total_ref = take(static.splits > 1)  # [splits, B, T, N]

    split = pl.program_id(1)
    b = lax.div(pl.program_id(2), static.K)
    k = lax.rem(pl.program_id(2), static.K)
    row_R = pl.program_id(0) * static.rows + lax.iota(jnp.int32, static.rows)
    used_R = row_R < static.T * static.G
    t_R = lax.div(row_R, static.G)
    n_R = k * static.G + lax.rem(row_R, static.G)
    lane_D = lax.iota(jnp.int32, static.D)[None]
    lanes = None if static.D == static.H else lane_D < static.H
    row_mask = _both(used_R[:, None], lanes)
    q_RD = _read(q_ref, b, t_R[:, None], n_R[:, None], lane_D, mask=row_mask)

    def scores(keys_SD, scales_1S=None):
        """In units of log2, float32."""
        s_RS = rescale(_dot(q_RD, keys_SD, CONTRACT_LAST), scales_1S)
        if static.soft_cap is None:
            return s_RS * (static.scale * LOG2_E)
        capped = jnp.tanh(s_RS * (static.scale / static.soft_cap))
        return capped * (static.soft_cap * LOG2_E)

    def add(carry, s_RS, values_SD, scales_1S=None):
        """One more block; `s_RS` is -inf where masked, the values are finite there."""
        top_R, total_R, acc_RD = carry
        new_R = jnp.maximum(top_R, jnp.max(s_RS, axis=1))
        p_RS = jnp.exp2(s_RS - new_R[:, None])
        shrink_R = jnp.exp2(top_R - new_R)
        total_R = total_R * shrink_R + jnp.sum(p_RS, axis=1)
        p_RS = rescale(p_RS, scales_1S)
        pv_RD = _dot(p_RS.astype(values_SD.dtype), values_SD, CONTRACT_INNER)
        return new_R, total_R, acc_RD * shrink_R[:, None] + pv_RD

    if windowed:
        depth_R = _read(depth_ref, b, static.U - static.T + t_R, mask=used_R)

    carry = (
        jnp.full((static.rows,), LOWEST, jnp.float32),
        jnp.zeros((static.rows,), jnp.float32),
        jnp.zeros((static.rows, static.D), jnp.float32),
    )

    if prefix:
        S = static.keys
        length = _read(lengths_ref, b)
        blocks = lax.div(length + S - 1, S)
        begin = seen_by_all = jnp.zeros((), jnp.int32)
        if windowed:
            # The first prefix row that a query sees.
            first_R = jnp.maximum(length + depth_R - (static.window - 1), 0)
            begin = jnp.min(jnp.where(used_R, first_R, length))
            begin = jnp.minimum(lax.div(begin, S), blocks)
            seen_by_all = jnp.max(jnp.where(used_R, first_R, 0))
            seen_by_all = lax.div(seen_by_all + S - 1, S)
        end = blocks
        if static.splits > 1:
            part = lax.div(blocks - begin + static.splits - 1, static.splits)
            part = jnp.maximum(part, static.split_blocks)
            begin = jnp.minimum(begin + split * part, blocks)
            end = jnp.minimum(begin + part, blocks)

        one_page = static.page % S == 0  # a block lies within one page

        def pages_of(i):
            """The page of the i-th block, or [S] pages of its rows."""
            if one_page:
                i = jnp.maximum(jnp.minimum(i, blocks - 1), 0)
                return _read(table_ref, b, lax.div(i * S, static.page))
            position_S = i * S + lax.iota(jnp.int32, S)
            return _read(
                table_ref, b, lax.div(position_S, static.page), mask=position_S < length
            )

        def block(partial, i, carry):
            page, *carry = carry
            # Read one block ahead: the copies of keys must not wait for the table.
            next_page = pages_of(i + 1)
            page_S1 = page if one_page else page[:, None]
            position_S = i * S + lax.iota(jnp.int32, S)
            filled_S = position_S < length if partial else None
            offset_S = lax.rem(i * S, static.page) + lax.iota(jnp.int32, S)
            if not one_page:
                offset_S = lax.rem(position_S, static.page)
            mask = _both(filled_S[:, None] if partial else None, lanes)

            def rows(which):
                rows_SD = _read(
                    pages_ref, page_S1, k, which, offset_S[:, None], lane_D, mask=mask
                )
                if not static.quantized:
                    return rows_SD, None
                scale_S = _read(scales_ref, page, k, which, offset_S, mask=filled_S)
                return rows_SD.astype(q_RD.dtype), scale_S.astype(jnp.float32)[None]

            s_RS = scores(*rows(0))
            if partial:
                seen = filled_S[None]
                if windowed:
                    seen = seen & (position_S[None] >= first_R[:, None])
                s_RS = jnp.where(seen, s_RS, -jnp.inf)
            return next_page, *add(carry, s_RS, *rows(1))

        full_begin = jnp.clip(seen_by_all, begin, end)
        full_end = jnp.clip(lax.div(length, S), full_begin, end)
        whole, partial = (functools.partial(block, x) for x in (False, True))
        carry = pages_of(begin), *carry
        if windowed:
            carry = lax.fori_loop(begin, full_begin, partial, carry)
        carry = lax.fori_loop(full_begin, full_end, whole, carry)
        _, *carry = lax.fori_loop(full_end, end, partial, carry)

    def tree_block(i, carry):
        u_S = i * static.tree_keys + lax.iota(jnp.int32, static.tree_keys)
        there_S = u_S < static.U
        mask = _both(there_S[:, None], lanes)
        keys_SD, values_SD = (
            _read(tree_ref, b, k, which, u_S[:, None], lane_D, mask=mask)
            for which in (0, 1)
        )
        seen = used_R[:, None] & there_S[None]
        seen = _read(mask_ref, b, t_R[:, None], u_S[None], mask=seen)
        if windowed:
            depth_S = _read(depth_ref, b, u_S, mask=there_S)
            seen = seen & (depth_R[:, None] - depth_S[None] < static.window)
        return add(carry, jnp.where(seen, scores(keys_SD), -jnp.inf), values_SD)

    # Parts of the prefix are dealt out from the first; the last has the least to do.
    tree_blocks = pl.cdiv(static.U, static.tree_keys)
    if static.splits > 1:
        tree_blocks *= (split == static.splits - 1).astype(jnp.int32)
    carry = lax.fori_loop(0, tree_blocks, tree_block, tuple(carry))
    top_R, total_R, acc_RD = carry

    if static.splits > 1:
        index = split, b, t_R, n_R
        plgpu.store(top_ref.at[index], top_R, mask=used_R)
        plgpu.store(total_ref.at[index], total_R, mask=used_R)
        index = split, b, t_R[:, None], n_R[:, None], lane_D
    else:
        acc_RD = acc_RD / jnp.where(total_R > 0, total_R, 1.0)[:, None]
        index = b, t_R[:, None], n_R[:, None], lane_D
    plgpu.store(out_ref.at[index], acc_RD.astype(out_ref.dtype), mask=row_mask)


def unsupported(operands: Operands, spec: AttentionSpec) -> str | None:
    """Why the kernel cannot take such a call, in a sentence; None: it can."""
    if plgpu is None:
        return "this jax has no Triton back end of Pallas any more"
    reason = operands.unsupported_types((jnp.float32, jnp.bfloat16, jnp.float16))
    if reason is not None:
        return reason
    if operands.is_joined:
        return "keys and values share the rows of kv_pages, want them apart"
    if operands.dims.H > 256:
        return f"heads {operands.dims.H} wide are wider than 256"
    # Pallas counts offsets in 32 signed bits up to 2^32 bytes, and then in 64.
    if operands.is_quantized and 2**31 <= operands.kv_pages.size <= 2**32:
        return f"{operands.kv_pages.size} bytes of int8 pages, want less than 2^31"
    return None


def tree_attention(operands: Operands, spec: AttentionSpec) -> jax.Array:
    """See `api.tree_attention`.

    Args:
      operands: the arrays.
      spec: the settings, block sizes of this kernel among them.
    """
    B, T, N, H, K, G, U = operands.dims
    q, sizes = operands.queries, spec.block_sizes
    D = max(SMALLEST, power_of_two(H))
    capacity = operands.max_pages * operands.page
    tiles = pl.cdiv(T * G, sizes.rows)
    splits = sizes.splits(tiles * B * K, capacity)
    static = _Static(
        T=T,
        U=U,
        K=K,
        G=G,
        H=H,
        D=D,
        page=operands.page,
        rows=sizes.rows,
        keys=sizes.keys,
        tree_keys=min(sizes.keys, max(SMALLEST, power_of_two(U))),
        splits=splits,
        split_blocks=pl.cdiv(sizes.split_rows, sizes.keys),
        scale=spec.scale,
        window=spec.window,
        soft_cap=spec.soft_cap,
        prefix=operands.has_prefix,
        quantized=operands.is_quantized,
    )
    inputs = [q, operands.tree_kv, operands.tree_mask]
    row_bytes = operands.prefix_row_bytes(H)
    moved = B * capacity * row_bytes + sum(x.nbytes for x in (q, *inputs))
    if spec.window is not None:
        inputs.append(operands.tree_depth)
    if operands.has_prefix:
        inputs += [operands.page_table, operands.lengths, operands.kv_pages]
    if operands.is_quantized:
        inputs.append(operands.kv_scales)
    out_shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    if splits > 1:
        stats = jax.ShapeDtypeStruct((splits, B, T, N), jnp.float32)
        out_shape = [
            jax.ShapeDtypeStruct((splits, *q.shape), jnp.float32),
            stats,
            stats,
        ]
        moved += sum(2 * x.size * x.dtype.itemsize for x in out_shape)
    out = pl.pallas_call(
        functools.partial(_kernel, static),
        name="tree_attention",
        grid=(tiles, splits, B * K),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(
            num_warps=sizes.warps, num_stages=sizes.stages
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * T * (capacity + U) * H,
            transcendentals=B * N * T * (capacity + U),
            bytes_accessed=moved,
        ),
        interpret=spec.interpret,
    )(*inputs)
    return _combine(*out).astype(q.dtype) if splits > 1 else out


def _combine(acc_XBTNH, top_XBTN, total_XBTN):
    """The softmax over all X parts from the running ones of each."""
    weight_XBTN = jnp.exp2(top_XBTN - jnp.max(top_XBTN, axis=0))
    total_BTN = jnp.sum(total_XBTN * weight_XBTN, axis=0)
    out_BTNH = jnp.sum(acc_XBTNH * weight_XBTN[..., None], axis=0)
    return out_BTNH / jnp.where(total_BTN > 0, total_BTN, 1.0)[..., None]
