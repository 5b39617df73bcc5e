"""Block sizes of the GPU kernel: what they mean, and which to take where."""

from __future__ import annotations

import dataclasses
import re

# The least operand of a tensor-core product, in every dimension.
SMALLEST = 16


def power_of_two(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


@dataclasses.dataclass(frozen=True)
class GpuBlockSizes:
    """How one call is cut up.

    Attributes:
      rows: query rows of one program; a power of two, at least 16.
      keys: rows of prefix or of the tree per product; a power of two, at least 16.
      warps: warps of one program; a power of two.
      stages: blocks of keys and values in flight.
      programs: programs that should run at once; where slots, heads and tiles of
        query rows are fewer, the prefix is split.
      split_rows: rows of prefix that one part of a split prefix has at least.
    """

    rows: int = 128
    keys: int = 64
    warps: int = 8
    stages: int = 2
    programs: int = 132
    split_rows: int = 512

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name}={value!r} is not a positive integer")
        for name, least in (("rows", SMALLEST), ("keys", SMALLEST), ("warps", 1)):
            value = getattr(self, name)
            if value != power_of_two(value) or value < least:
                raise ValueError(
                    f"{name}={value} is not a power of two of at least {least}"
                )

    def splits(self, tiles: int, prefix_rows: int) -> int:
        """Parts into which a call's prefix is cut, from its shapes alone.

        Args:
          tiles: slots · key/value heads · tiles of query rows.
          prefix_rows: rows that the page table has room for.
        """
        return max(1, min(self.programs // tiles, prefix_rows // self.split_rows))


# Multiprocessors by device kind (the vendors' data sheets), for `programs`.
_MULTIPROCESSORS = {"A100": 108, "H100": 132, "H200": 132}
# Timed on an H100: bfloat16, heads of 128, 8 slots × 8192 rows and 8 key/value heads,
# 64 query rows and more. All others are chosen by the size of shared memory, and so
# that Triton's compiler spills (almost) no registers on sm_80 and sm_90.
# Bytes of a number, greatest head width and most query rows -> sizes; the first that
# fits is taken. `programs` is per multiprocessor here. More rows than a tile has take
# more tiles.
_Table = tuple[tuple[int, int, int | None, GpuBlockSizes], ...]
_HOPPER: _Table = (
    (2, 128, 32, GpuBlockSizes(rows=32, keys=64, warps=4, stages=3, programs=2)),
    (2, 128, 64, GpuBlockSizes(rows=64, keys=64, warps=4, stages=3, programs=2)),
    (2, 128, 128, GpuBlockSizes(rows=128, keys=64, warps=8, stages=3, programs=1)),
    (2, 128, 256, GpuBlockSizes(rows=128, keys=128, warps=8, stages=3, programs=1)),
    (2, 128, None, GpuBlockSizes(rows=128, keys=64, warps=8, stages=3, programs=1)),
    (2, 256, 32, GpuBlockSizes(rows=32, keys=32, warps=4, stages=3, programs=2)),
    (2, 256, None, GpuBlockSizes(rows=64, keys=32, warps=8, stages=2, programs=1)),
    (4, 256, None, GpuBlockSizes(rows=32, keys=16, warps=8, stages=3, programs=2)),
)
_AMPERE: _Table = (
    (2, 128, 32, GpuBlockSizes(rows=32, keys=64, warps=4, stages=3, programs=2)),
    (2, 128, 64, GpuBlockSizes(rows=64, keys=64, warps=4, stages=3, programs=1)),
    (2, 128, None, GpuBlockSizes(rows=128, keys=32, warps=8, stages=3, programs=1)),
    (2, 256, 32, GpuBlockSizes(rows=32, keys=32, warps=4, stages=3, programs=1)),
    (2, 256, None, GpuBlockSizes(rows=64, keys=32, warps=8, stages=2, programs=1)),
    (4, 256, None, GpuBlockSizes(rows=32, keys=16, warps=8, stages=3, programs=2)),
)
TABLE: dict[str, _Table] = {"A100": _AMPERE, "H100": _HOPPER, "H200": _HOPPER}


def default_sizes(
    itemsize: int, rows: int, width: int, device_kind: str | None = None
) -> GpuBlockSizes:
    """Sizes for a call.

    Args:
      itemsize: bytes of a number of the queries.
      rows: query rows of one slot and key/value head.
      width: of a head, at most 256.
      device_kind: as `jax.Device.device_kind` says; None or unknown: as on an H100.
    """
    found = re.search("|".join(TABLE), device_kind or "")
    kind = found.group() if found else "H100"
    sizes = next(
        sizes
        for size, widest, limit, sizes in TABLE[kind]
        if size == itemsize and width <= widest and (limit is None or rows <= limit)
    )
    return dataclasses.replace(
        sizes,
        rows=min(sizes.rows, max(SMALLEST, power_of_two(rows))),
        programs=sizes.programs * _MULTIPROCESSORS[kind],
    )
