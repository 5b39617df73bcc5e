"""Block sizes of the TPU kernel: what they mean, and which to take where."""

from __future__ import annotations

import dataclasses

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


# By query rows per key/value head (T * G): up to the first number take its sizes.
# v4 has 16 MiB of vector memory, the others more; a device that is not named here gets
# what fits all.
_DEFAULT = (
    (32, BlockSizes(block_rows=512, unroll=8)),
    (None, BlockSizes(block_rows=256, rows=128, unroll=1)),
)
TABLE: dict[str | None, tuple[tuple[int | None, BlockSizes], ...]] = {
    None: _DEFAULT,
    "TPU v4": _DEFAULT,
    "TPU v5 lite": _DEFAULT,
    "TPU v5": _DEFAULT,
    "TPU v6 lite": _DEFAULT,
    "TPU7x": _DEFAULT,
}


def choose(device_kind: str | None, rows: int) -> BlockSizes:
    """The sizes for a kind of device and so many query rows per key/value head.

    Args:
      device_kind: `jax.Device.device_kind`; None or one that is not known: a choice
        that fits all.
      rows: T * G.
    """
    for most, sizes in TABLE.get(device_kind, TABLE[None]):
        if most is None or rows <= most:
            return sizes
    raise AssertionError(f"no sizes for {rows} rows on {device_kind!r}")
