"""Where weights lie in a CPU's memory."""

from __future__ import annotations

import math
import mmap

import jax
import numpy as np
from flax import nnx

HUGE_PAGE = 2 << 20
_LINE = 64
# From here on not on the heap, where what stays would keep holes between what goes.
_OWN_PAGES = 64 << 10


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An unfilled array that a CPU device adopts uncopied (`jax.device_put`).

    Large ones lie in 2 MiB pages where the system has them. A step reads every weight
    once, in order; with 4 KiB pages a good part of that time goes into address
    translation and into prefetches that stop at the page's end.
    """
    size = math.prod(shape) * dtype.itemsize
    huge = size >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
    start = 0
    if huge:
        pages = _private(size + HUGE_PAGE)
        raw = np.frombuffer(pages, np.uint8)
        start = -raw.ctypes.data % HUGE_PAGE
        # The rest is a megabyte per array on average: it lies in small pages.
        pages.madvise(mmap.MADV_NOHUGEPAGE)
        pages.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE * HUGE_PAGE)
    elif size >= _OWN_PAGES:
        raw = np.frombuffer(_private(size), np.uint8)
    else:
        raw = np.empty(size + _LINE, np.uint8)
        start = -raw.ctypes.data % _LINE
    return raw[start : start + size].view(dtype).reshape(shape)


def use_huge_pages(module: nnx.Module) -> None:
    """Moves a module's large parameters, one by one, into 2 MiB pages.

    Does nothing for those that `empty` made, on accelerators, over several devices, or
    where the system has no such pages. The parameters are replaced in place, so that
    no second copy of the model exists.

    Args:
      module: its `nnx.Param`s are moved.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    for variable in jax.tree.leaves(
        nnx.state(module), is_leaf=lambda x: isinstance(x, nnx.Variable)
    ):
        value = variable.get_value()
        if any(map(_should_move, jax.tree.leaves(value))):
            variable.set_value(jax.tree.map(_moved, value))


def _should_move(value: jax.Array) -> bool:
    on_cpu = [d.platform for d in value.devices()] == ["cpu"]
    large = value.nbytes >= HUGE_PAGE
    return large and on_cpu and value.unsafe_buffer_pointer() % HUGE_PAGE != 0


def _moved(value: jax.Array) -> jax.Array:
    if not _should_move(value):
        return value
    array = empty(value.shape, value.dtype)
    array[...] = np.asarray(value)
    return jax.device_put(array)


def _private(size: int) -> mmap.mmap:
    # By default a map is shared, for which systems have other limits.
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    return mmap.mmap(-1, size)
