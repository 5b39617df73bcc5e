"""Where weights lie in a CPU's memory."""

from __future__ import annotations

import mmap

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

HUGE_PAGE = 2 << 20


def use_huge_pages(module: nnx.Module) -> None:
    """Moves a module's large parameters, one by one, into 2 MiB pages.

    A step reads every weight once, in order; with 4 KiB pages a good part of that time
    goes into address translation and into prefetches that stop at the page's end. Does
    nothing on accelerators, or where the system has no such pages. The parameters are
    replaced in place, so that no second copy of the model exists.

    Args:
      module: its `nnx.Param`s are moved.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    for variable in jax.tree.leaves(
        nnx.state(module), is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        value = variable[...]
        if value.nbytes >= HUGE_PAGE and _can_move(value) and not _is_aligned(value):
            variable[...] = _copy(value)


def _can_move(value: jax.Array) -> bool:
    # numpy hands its own types to JAX by reference; bfloat16 is not one of them.
    plain = value.dtype in (jnp.float32, jnp.float16)
    return plain and all(d.platform == "cpu" for d in value.devices())


def _is_aligned(value: jax.Array) -> bool:
    return value.unsafe_buffer_pointer() % HUGE_PAGE == 0


def _copy(value: jax.Array) -> jax.Array:
    pages = mmap.mmap(-1, value.nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE)
    pages.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(pages, np.uint8)
    start = -raw.ctypes.data % HUGE_PAGE
    source = np.asarray(value)
    target = raw[start : start + value.nbytes].view(source.dtype)
    target = target.reshape(source.shape)
    target[...] = source
    return jnp.from_dlpack(target)
