"""The public operation: checks its operands, then picks an implementation.

Letters as in `operands`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels.tree_attention import bitwise, reference
from pallas_kernels.tree_attention.gpu_sizes import GpuBlockSizes, default_sizes
from pallas_kernels.tree_attention.operands import Operands
from pallas_kernels.tree_attention.sizes import BlockSizes, choose
from pallas_kernels.tree_attention.spec import PLAIN, PLATFORMS, AttentionSpec

# As `jax.Device.device_kind` says of a CPU, which no kernel is for.
_CPU = "cpu"


def tree_attention(operands: Operands, spec: AttentionSpec) -> jax.Array:
    """Softmax attention over (prefix rows 0..length-1) and the allowed tree rows.

    The kernels are for inference: their gradient is the reference's, which exists
    without a prefix only (the loop over a prefix has no known end).

    Args:
      operands: the arrays.
      spec: the settings.

    Returns:
      [B, T, N, H] in the dtype of the queries, computed in float32. A row that may see
      nothing is zeros.

    Raises:
      ValueError: shapes that do not fit, or an implementation that cannot run here.
    """
    _validate(operands, spec)
    if spec.window is None:
        operands = dataclasses.replace(operands, tree_depth=None)
    if spec.mesh is not None:
        return _on_mesh(spec, operands)
    plain = functools.partial(_plain, spec)
    named = spec.implementation is not None
    if spec.implementation in PLAIN or (not named and spec.device_kind == _CPU):
        return plain(operands)
    kernels = {}
    for name in [spec.implementation] if named else PLATFORMS:
        planned, reason = _plan(name, operands, spec)
        if reason is None:
            kernels[PLATFORMS[name]] = functools.partial(_kernel, planned)
        elif named:
            raise ValueError(f"the {name.upper()} kernel cannot run: {reason}")
    if named:
        return kernels[PLATFORMS[spec.implementation]](operands)
    if not kernels:
        return plain(operands)
    return lax.platform_dependent(operands, **kernels, default=plain)


def _module(name: str):
    """A kernel's module, imported where it may run: Pallas takes its time."""
    return importlib.import_module(f"pallas_kernels.tree_attention.{name}")


def _plan(
    name: str, operands: Operands, spec: AttentionSpec
) -> tuple[AttentionSpec, str | None]:
    """The spec with a kernel's name and block sizes filled in.

    Returns:
      The spec, and why the kernel cannot take the call; None: it can.
    """
    dims, rows = operands.dims, operands.query_rows
    planned = functools.partial(dataclasses.replace, spec, implementation=name)
    sizes = spec.block_sizes
    if name == "tpu":
        if not isinstance(sizes, BlockSizes):
            sizes = choose(spec.device_kind, rows, dims.K)
        spec = planned(block_sizes=sizes)
        return spec, _module(name).unsupported(operands, spec)
    reason = _module(name).unsupported(operands, spec)
    if reason is None and not isinstance(sizes, GpuBlockSizes):
        itemsize = operands.queries.dtype.itemsize
        sizes = default_sizes(itemsize, rows, dims.H, spec.device_kind)
    return planned(block_sizes=sizes), reason


@functools.partial(jax.jit, static_argnums=0)  # Traced once for all layers.
def _on_mesh(spec: AttentionSpec, operands: Operands) -> jax.Array:
    queries, heads = P(None, None, spec.heads_axis), P(None, spec.heads_axis)
    parts = Operands(
        queries=queries,
        kv_pages=heads,
        page_table=P(),
        lengths=P(),
        tree_kv=heads,
        tree_mask=P(),
        tree_depth=P(),
        kv_scales=heads,
    )
    one_device = dataclasses.replace(spec, mesh=None, heads_axis=None)
    run = jax.shard_map(
        functools.partial(tree_attention, spec=one_device),
        mesh=spec.mesh,
        in_specs=(parts,),
        out_specs=queries,
        check_vma=False,
    )
    return run(operands)


@functools.partial(jax.jit, static_argnums=0)  # Traced once for all layers.
def _plain(spec: AttentionSpec, operands: Operands) -> jax.Array:
    module = bitwise if spec.implementation == "bitwise" else reference
    return module.tree_attention(operands, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)  # Traced once for all layers.
def _kernel(spec: AttentionSpec, operands: Operands) -> jax.Array:
    return _module(spec.implementation).tree_attention(operands, spec)


def _forward(spec, operands):
    return _kernel(spec, operands), operands


def _backward(spec, operands, gradient):
    def plain(queries, kv_pages, tree_kv):
        given = dict(queries=queries, kv_pages=kv_pages, tree_kv=tree_kv)
        return reference.tree_attention(dataclasses.replace(operands, **given), spec)

    _, pull = jax.vjp(plain, operands.queries, operands.kv_pages, operands.tree_kv)
    to_queries, to_pages, to_tree = pull(gradient)
    return (
        Operands(
            queries=to_queries, kv_pages=to_pages, tree_kv=to_tree, tree_mask=None
        ),
    )


_kernel.defvjp(_forward, _backward)


def _validate(operands: Operands, spec: AttentionSpec) -> None:
    queries, tree_kv = operands.queries, operands.tree_kv
    if queries.ndim != 4:
        raise ValueError(f"queries are {queries.shape}, want [B, T, N, H]")
    B, T, N, H = queries.shape
    K, U = (tree_kv.shape[1], tree_kv.shape[3]) if tree_kv.ndim == 5 else (1, 0)
    if tree_kv.shape != (B, K, 2, U, H) or N % K or U < T:
        raise ValueError(
            f"tree_kv {tree_kv.shape} does not fit queries {queries.shape}: want "
            "[B, K, 2, U >= T, H] with K dividing N"
        )
    if operands.tree_mask.shape != (B, T, U):
        raise ValueError(f"tree_mask is {operands.tree_mask.shape}, want {(B, T, U)}")
    _validate_prefix(operands, spec)
    if spec.window is not None:
        depth = operands.tree_depth
        if depth is None:
            raise ValueError(f"window={spec.window} needs tree_depth [B, U]")
        if depth.shape != (B, U):
            raise ValueError(f"tree_depth is {depth.shape}, want {(B, U)}")
    parts = 1 if spec.heads_axis is None else spec.mesh.shape[spec.heads_axis]
    if K % parts:
        raise ValueError(
            f"{K} key/value heads cannot be cut in {parts} over mesh axis "
            f"{spec.heads_axis!r}; pass heads_axis=None"
        )


def _validate_prefix(operands: Operands, spec: AttentionSpec) -> None:
    B, _, _, H, K, _, _ = operands.dims
    kv_pages, kv_scales = operands.kv_pages, operands.kv_scales
    if kv_pages is None:
        if kv_scales is not None:
            raise ValueError(f"kv_scales {kv_scales.shape} without kv_pages")
        return
    pages = kv_pages.shape
    fits = len(pages) == 5 and pages[1] == K and pages[2] in (1, 2)
    if not fits or pages[4] * pages[2] < 2 * H:
        raise ValueError(
            f"kv_pages is {pages}, want [P, {K}, 2, page, W >= {H}], or joined "
            f"[P, {K}, 1, page, W >= {2 * H}]"
        )
    table, lengths = (
        x if x is None else x.shape for x in (operands.page_table, operands.lengths)
    )
    if table is None or len(table) != 2 or table[0] != B or lengths != (B,):
        raise ValueError(
            f"page_table {table} and lengths {lengths} must be "
            f"[{B}, max_pages] and [{B}]"
        )
    if spec.implementation == "bitwise" and kv_scales is None:
        raise ValueError(f"bitwise attention wants int8 pages, got {kv_pages.dtype}")
    if (kv_pages.dtype == jnp.int8) != (kv_scales is not None):
        raise ValueError(
            f"kv_pages is {kv_pages.dtype} and kv_scales "
            f"{'missing' if kv_scales is None else 'given'}: int8 needs them, and "
            "nothing else has them"
        )
    if kv_scales is not None:
        scales = kv_scales.shape
        wanted = (*pages[:2], 2)
        if len(scales) != 4 or scales[:3] != wanted or scales[3] < pages[3]:
            raise ValueError(
                f"kv_scales is {scales}, want [{pages[0]}, {K}, 2, X >= {pages[3]}]"
            )
