"""Tree attention as one Mosaic kernel: the call. `tpu_kernel` has its program.

Letters as in `operands`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tree_attention.operands import Operands
from pallas_kernels.tree_attention.ring import Plan
from pallas_kernels.tree_attention.sizes import LANES
from pallas_kernels.tree_attention.spec import AttentionSpec
from pallas_kernels.tree_attention.tpu_cut import Static, cut
from pallas_kernels.tree_attention.tpu_kernel import kernel


def unsupported(operands: Operands, spec: AttentionSpec) -> str | None:
    """Why the kernel cannot take such a call, in a sentence; None: it can."""
    static = cut(operands, spec)
    return static if isinstance(static, str) else None


def tree_attention(operands: Operands, spec: AttentionSpec) -> jax.Array:
    """See `api.tree_attention`.

    Args:
      operands: the arrays.
      spec: the settings, block sizes of this kernel among them.
    """
    B, T, N, H, K, G, U = operands.dims
    q, tree_kv, lengths = operands.queries, operands.tree_kv, operands.lengths
    static, window = cut(operands, spec), spec.window
    assert isinstance(static, Static), static

    def tiles(x, size, padded, axis):
        """Cuts an axis into the steps' pieces of `size`, each padded with zeros."""
        steps = static.row_steps
        x = _pad(x, axis, steps * size)
        x = x.reshape(x.shape[:axis] + (steps, size) + x.shape[axis + 1 :])
        x = _pad(x, axis + 1, padded)
        return x.reshape(x.shape[:axis] + (steps * padded,) + x.shape[axis + 2 :])

    allowed = operands.tree_mask
    if window is not None:
        depth_BU = operands.tree_depth
        depth_BT = depth_BU[:, U - T :]
        allowed &= depth_BT[:, :, None] - depth_BU[:, None, :] < window
    mask = tiles(allowed.astype(jnp.bfloat16), static.step_rows, static.mask_rows, 1)
    mask = _pad(mask, 2, static.U)

    vmem = functools.partial(pl.BlockSpec, memory_space=pltpu.VMEM)
    tokens = vmem(
        (1, static.step_rows, static.heads * G, H), lambda b, k, r, *_: (b, r, k, 0)
    )
    prefetch, inputs = [], [q, tree_kv, mask]
    in_specs = [
        tokens,
        vmem(
            (1, static.heads, 2, U, H),
            lambda b, k, r, *_: (b, k, 0, 0, 0),
        ),
        vmem((1, static.mask_rows, static.U), lambda b, k, r, *_: (b, r, 0)),
    ]
    if static.prefix:
        low = high = jnp.zeros_like(lengths)
        if window is not None:
            limit_BT = jnp.maximum(lengths[:, None] + depth_BT - window + 1, 0)
            low, high = jnp.min(limit_BT, axis=1), jnp.max(limit_BT, axis=1)
            limit_BR = jnp.repeat(limit_BT, G, axis=1)
            limit_BR = tiles(limit_BR, static.step_rows * G, static.rows, 1)
            inputs.append(
                jnp.broadcast_to(limit_BR[..., None], (*limit_BR.shape, LANES))
            )
            in_specs.append(
                vmem((1, static.rows, LANES), lambda b, k, r, *_: (b, r, 0))
            )
        prefetch = [
            operands.page_table.reshape(-1),
            Plan.make(lengths, low, high, static.page, static.pages_per_block),
        ]
        for x in (operands.kv_pages, operands.kv_scales):
            if x is not None:
                if not spec.interpret:
                    # Else XLA first fetches whole pools, free pages and all, into
                    # vector memory where they fit there.
                    x = pltpu.with_memory_space_constraint(x, pltpu.HBM)
                inputs.append(x)
                in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
    S = static.max_pages * static.page
    row_bytes = operands.prefix_row_bytes(static.H)
    return pl.pallas_call(
        functools.partial(kernel, static),
        name="tree_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(B, static.head_steps, static.row_steps),
            in_specs=in_specs,
            out_specs=tokens,
            scratch_shapes=static.scratch(operands),
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        # Of slots that are full: how full they are is not known here.
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * T * (S + U) * H,
            transcendentals=B * N * T * (S + U),
            bytes_accessed=B * S * row_bytes * static.row_steps
            + sum(x.nbytes for x in (tree_kv, q, q, mask)),
        ),
        compiler_params=pltpu.CompilerParams(
            # Steps hand the ring of page buffers on, so their order is fixed.
            dimension_semantics=("arbitrary",) * 3,
            vmem_limit_bytes=static.sizes.vmem_bytes,
        ),
        interpret=spec.interpret,
    )(*prefetch, *inputs)


def _pad(x, axis, size):
    """Pads an axis with zeros to `size`."""
    short = size - x.shape[axis]
    if not short:
        return x
    return jnp.pad(x, [(0, short if a == axis else 0) for a in range(x.ndim)])
