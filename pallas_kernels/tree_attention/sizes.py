"""Block sizes of the TPU kernel: what they mean, and which to take where."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

LANES = 128


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How one call is cut up.

    Attributes:
      block_rows: rows of prefix per block; rounded down to whole pages, at least one.
      buffers: blocks held at once: one in use, the others being copied.
      rows: query rows of one product; a multiple of 16.
      heads: key/value heads of one grid step; the largest divisor of the number of
        heads up to this is taken.
      unroll: heads whose products stand side by side in one basic block, so that the
        latencies of one hide behind the others; likewise a divisor of `heads`.
      max_rows: query rows of one grid step and head; more rows read the prefix anew.
      vmem_bytes: on-chip memory that the kernel may take.
    """

    block_rows: int = 512
    buffers: int = 3
    rows: int = 128
    heads: int = 8
    unroll: int = 1
    max_rows: int = 2048
    vmem_bytes: int = 14 * 2**20

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name}={value!r} is not a positive integer")
        if self.buffers < 2:
            raise ValueError(f"buffers={self.buffers}: one is in use, want at least 2")
        if self.rows % 16:
            raise ValueError(f"rows={self.rows} is not a multiple of 16")
        if self.max_rows % self.rows:
            raise ValueError(
                f"max_rows={self.max_rows} is not a multiple of rows={self.rows}"
            )
        if self.unroll > self.heads:
            raise ValueError(f"unroll={self.unroll} is more than heads={self.heads}")


# By device kind ("default": one that is not listed), then by query rows per key/value
# head (T * G): up to `up_to` take an entry's sizes. scripts/tune_kernel.py writes them;
# v5e and v6e are by the compiler's figures, see README.md, the others after the nearest
# of the two. All fit the 16 MiB of vector memory of a v4.
SIZES_FILE = Path(__file__).with_name("tpu_sizes.json")


@functools.cache
def _table() -> dict[str, tuple[tuple[int | None, BlockSizes], ...]]:
    def entry(up_to, **fields):
        return up_to, BlockSizes(**fields)

    kinds = json.loads(SIZES_FILE.read_text())
    return {kind: tuple(entry(**x) for x in classes) for kind, classes in kinds.items()}


def choose(device_kind: str | None, rows: int) -> BlockSizes:
    """The sizes for a kind of device and so many query rows per key/value head.

    Args:
      device_kind: `jax.Device.device_kind`; None or one that is not known: a choice
        that fits all.
      rows: T * G.
    """
    table = _table()
    for most, sizes in table.get(device_kind, table["default"]):
        if most is None or rows <= most:
            return sizes
    raise AssertionError(f"no sizes for {rows} rows on {device_kind!r}")
