"""The public operation: checks its arguments, then picks an implementation.

Letters: B slots, T new tree rows, U = E + T tree rows in all (E of earlier calls
first), N query heads, K key/value heads, G = N / K, H head width, P pages, W width of
a row in a page.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.tree_attention import gpu, reference, tpu
from pallas_kernels.tree_attention.gpu_sizes import GpuBlockSizes, default_sizes
from pallas_kernels.tree_attention.sizes import BlockSizes, choose

# Platforms by the name of their kernel.
KERNELS = {"tpu": "tpu", "gpu": "cuda"}
IMPLEMENTATIONS = ("reference", *KERNELS)


def tree_attention(
    q: jax.Array,
    kv_pages: jax.Array | None,
    page_table: jax.Array | None,
    lengths: jax.Array | None,
    tree_kv: jax.Array,
    tree_mask: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    tree_depth: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
    implementation: str | None = None,
    device_kind: str | None = None,
    block_sizes: BlockSizes | GpuBlockSizes | None = None,
    interpret: bool | object = False,
    mesh: Mesh | None = None,
    heads_axis: str | None = None,
) -> jax.Array:
    """Softmax attention over (prefix rows 0..length-1) and the allowed tree rows.

    The kernels are for inference: their gradient is the reference's, which exists
    without a prefix only (the loop over a prefix has no known end).

    Args:
      q: [B, T, N, H], rotary applied.
      kv_pages: [P, K, 2, page, W >= H]; None: there is no prefix. Numbers past H are
        zeros. The TPU kernel wants W to be a multiple of 128: memory holds whole lanes
        in any case, but XLA keeps narrower rows transposed, and would copy all pages
        before each call.
      page_table: int32 [B, max_pages]; entries past a slot's length may be read and
        masked, so they must name some page.
      lengths: int32 [B], rows of prefix per slot.
      tree_kv: [B, K, 2, U, H]; the last T of the U rows are this call's own.
      tree_mask: bool [B, T, U], ancestors, self included; the only mask.
      scale: multiplies the scores.
      window: a row sees the `window` newest positions only, itself included; in the
        tree, positions go by depth.
      soft_cap: scores become cap · tanh(score / cap).
      tree_depth: int32 [B, U], needed with `window`.
      kv_scales: float32 [P, K, 2, X >= page], with int8 `kv_pages` only: what each row
        is multiplied by (see `quantize_rows`). The TPU kernel wants X to be a multiple
        of 128, for the same reason.
      implementation: a name of `IMPLEMENTATIONS`, or None to choose by the platform
        that the program is compiled for; the reference where the kernel cannot take
        the shapes.
      device_kind: `jax.Device.device_kind` to choose block sizes for; None: sizes that
        fit every kind.
      block_sizes: instead of the chosen ones; their type says for which kernel.
      interpret: True or `pltpu.InterpretParams`: runs a named kernel anywhere, slowly.
      mesh: of the devices that share the call. No compiler cuts a kernel up by itself:
        each device runs one on its own heads, and nothing is exchanged.
      heads_axis: axis of `mesh` that cuts the K heads, and with them the N, of all
        arrays; None: every device does all of them.

    Returns:
      [B, T, N, H] in the dtype of `q`, computed in float32. A row that may see nothing
      is zeros.

    Raises:
      ValueError: shapes that do not fit, or an implementation that cannot run here.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"tree_attention has no implementation {implementation!r}; choose from "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    _validate(q, kv_pages, page_table, lengths, tree_kv, tree_mask, kv_scales)
    if window is not None:
        if tree_depth is None:
            raise ValueError(f"window={window} needs tree_depth [B, U]")
        want = q.shape[0], tree_kv.shape[3]
        if tree_depth.shape != want:
            raise ValueError(f"tree_depth is {tree_depth.shape}, want {want}")
    if interpret and implementation not in KERNELS:
        raise ValueError(f"interpret needs a kernel's name, not {implementation!r}")
    arrays = [q, kv_pages, page_table, lengths, tree_kv, tree_mask]
    arrays += [tree_depth if window is not None else None, kv_scales]
    if mesh is not None:
        parts = 1 if heads_axis is None else mesh.shape[heads_axis]
        if tree_kv.shape[1] % parts:
            raise ValueError(
                f"{tree_kv.shape[1]} key/value heads cannot be cut in {parts} over "
                f"mesh axis {heads_axis!r}; pass heads_axis=None"
            )
        options = scale, window, soft_cap, implementation, device_kind, block_sizes
        return _on_mesh(mesh, heads_axis, (*options, interpret), *arrays)
    plain = functools.partial(
        reference.tree_attention, scale=scale, window=window, soft_cap=soft_cap
    )
    if implementation == "reference":
        return plain(*arrays)
    kernels = {}
    for name in KERNELS if implementation is None else [implementation]:
        sizes, reason = _plan(name, arrays, window, device_kind, block_sizes)
        options = scale, window, soft_cap, sizes, interpret
        if reason is None:
            kernels[KERNELS[name]] = functools.partial(_kernel, name, options)
        elif implementation is not None:
            raise ValueError(f"the {name.upper()} kernel cannot run: {reason}")
    if implementation is not None:
        return kernels[KERNELS[implementation]](*arrays)
    if not kernels:
        return plain(*arrays)
    return lax.platform_dependent(*arrays, **kernels, default=plain)


def _plan(name, arrays, window, device_kind, block_sizes):
    """Block sizes for a kernel, and why it cannot take the call, None if it can."""
    q, kv_pages, page_table, _, tree_kv, _, _, kv_scales = arrays
    rows = q.shape[1] * q.shape[2] // tree_kv.shape[1]
    if name == "gpu":
        reason = gpu.unsupported(q, kv_pages, tree_kv)
        if reason is not None or isinstance(block_sizes, GpuBlockSizes):
            return block_sizes, reason
        return default_sizes(q.dtype.itemsize, rows, q.shape[3], device_kind), None
    given = isinstance(block_sizes, BlockSizes)
    sizes = block_sizes if given else choose(device_kind, rows, tree_kv.shape[1])
    return sizes, tpu.unsupported(
        q, kv_pages, page_table, tree_kv, kv_scales, window, sizes
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # Traced once for all layers.
def _on_mesh(mesh, axis, options, *arrays):
    scale, window, soft_cap, implementation, device_kind, block_sizes, interpret = (
        options
    )

    def attend(*arrays):
        *arrays, tree_depth, kv_scales = arrays
        return tree_attention(
            *arrays,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            tree_depth=tree_depth,
            kv_scales=kv_scales,
            implementation=implementation,
            device_kind=device_kind,
            block_sizes=block_sizes,
            interpret=interpret,
        )

    queries, heads = P(None, None, axis), P(None, axis)
    # q, pages, table, lengths, tree rows, mask, depth, scales.
    specs = queries, heads, P(), P(), heads, P(), P(), heads
    run = jax.shard_map(
        attend, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False
    )
    return run(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
@functools.partial(jax.jit, static_argnums=(0, 1))  # Traced once for all layers.
def _kernel(name, options, *arrays):
    scale, window, soft_cap, sizes, interpret = options
    run = {"tpu": tpu.tree_attention, "gpu": gpu.tree_attention}[name]
    return run(
        *arrays,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sizes=sizes,
        interpret=interpret,
    )


def _forward(name, options, *arrays):
    return _kernel(name, options, *arrays), arrays


def _backward(name, options, arrays, gradient):
    scale, window, soft_cap, *_ = options

    def plain(q, kv_pages, tree_kv):
        _, _, table, lengths, _, mask, depth, scales = arrays
        return reference.tree_attention(
            q,
            kv_pages,
            table,
            lengths,
            tree_kv,
            mask,
            depth,
            scales,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
        )

    q, kv_pages, _, _, tree_kv, _, _, _ = arrays
    _, pull = jax.vjp(plain, q, kv_pages, tree_kv)
    to_q, to_pages, to_tree = pull(gradient)
    return to_q, to_pages, None, None, to_tree, None, None, None


_kernel.defvjp(_forward, _backward)


def _validate(q, kv_pages, page_table, lengths, tree_kv, tree_mask, kv_scales):
    if q.ndim != 4:
        raise ValueError(f"q is {q.shape}, want [B, T, N, H]")
    B, T, N, H = q.shape
    K, U = (tree_kv.shape[1], tree_kv.shape[3]) if tree_kv.ndim == 5 else (1, 0)
    if tree_kv.shape != (B, K, 2, U, H) or N % K or U < T:
        raise ValueError(
            f"tree_kv {tree_kv.shape} does not fit q {q.shape}: want "
            "[B, K, 2, U >= T, H] with K dividing N"
        )
    if tree_mask.shape != (B, T, U):
        raise ValueError(f"tree_mask is {tree_mask.shape}, want {(B, T, U)}")
    if kv_pages is None:
        if kv_scales is not None:
            raise ValueError(f"kv_scales {kv_scales.shape} without kv_pages")
        return
    pages = kv_pages.shape
    if len(pages) != 5 or pages[1:3] != (K, 2) or pages[4] < H:
        raise ValueError(f"kv_pages is {pages}, want [P, {K}, 2, page, W >= {H}]")
    table, length = (x if x is None else x.shape for x in (page_table, lengths))
    if table is None or len(table) != 2 or table[0] != B or length != (B,):
        raise ValueError(
            f"page_table {table} and lengths {length} must be "
            f"[{B}, max_pages] and [{B}]"
        )
    if (kv_pages.dtype == jnp.int8) != (kv_scales is not None):
        raise ValueError(
            f"kv_pages is {kv_pages.dtype} and kv_scales "
            f"{'missing' if kv_scales is None else 'given'}: int8 needs them, and "
            "nothing else has them"
        )
    if kv_scales is not None:
        scales = kv_scales.shape
        if len(scales) != 4 or scales[:3] != pages[:3] or scales[3] < pages[3]:
            raise ValueError(
                f"kv_scales is {scales}, want [{pages[0]}, {K}, 2, X >= {pages[3]}]"
            )
