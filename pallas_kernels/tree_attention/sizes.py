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
      block_rows: rows of prefix per block; rounded down to whole pages, at least one,
        and halved where memory is short.
      buffers: blocks held at once: one in use, the others being copied.
      rows: query rows of one product; a multiple of 16.
      heads: key/value heads of one grid step; the largest divisor of the number of
        heads up to this is taken whose queries are whole tiles (multiples of 8 heads),
        or else all heads.
      unroll: heads whose products stand side by side in one basic block, so that the
        latencies of one hide behind the others; likewise a divisor of `heads`.
      in_turn: whether of these the scores of one are computed beside the weights of the
        one before, instead of all scores first.
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
    in_turn: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "in_turn":
                if not isinstance(value, bool):
                    raise ValueError(f"in_turn={value!r} is neither True nor False")
                continue
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


# Classes of calls: query rows per key/value head (T * G) up to which each goes.
CLASSES = (8, 16, 32, 64, 128, 256)
# By device kind, then by class, what differs from `BlockSizes()`; a kind or class that
# is not there takes those of "default", which fit the 16 MiB of vector memory of a v4.
# The others are from scripts/tune_kernel.py, by the compiler's figures: see README.md.
SIZES_FILE = Path(__file__).with_name("tpu_sizes.json")


@functools.cache
def _table() -> dict[str, dict[int, BlockSizes]]:
    kinds = json.loads(SIZES_FILE.read_text())
    return {
        kind: {int(limit): BlockSizes(**fields) for limit, fields in classes.items()}
        for kind, classes in kinds.items()
    }


# So few rows of so few heads, as on each device of a mesh, leave little to do side by
# side; blocks of twice the length take a third off the cycles.
_FEW_ROWS, _FEW_HEADS = 32, 2


def choose(device_kind: str | None, rows: int, kv_heads: int = 8) -> BlockSizes:
    """The sizes for a kind of device and so many query rows per key/value head.

    Args:
      device_kind: `jax.Device.device_kind`; None or one that is not known: a choice
        that fits all.
      rows: T * G; the last class also serves calls with more.
      kv_heads: K, on one device.
    """
    limit = next((limit for limit in CLASSES if rows <= limit), CLASSES[-1])
    default = _table()["default"][limit]
    sizes = _table().get(device_kind, {}).get(limit, default)
    if rows <= _FEW_ROWS and kv_heads <= _FEW_HEADS:
        return dataclasses.replace(sizes, block_rows=2 * sizes.block_rows)
    return sizes


def save(chosen: dict[str, dict[int, BlockSizes]]) -> None:
    """Replaces entries, {kind: {class: sizes, or None to take the default}}."""
    table = json.loads(SIZES_FILE.read_text())
    usual = dataclasses.asdict(BlockSizes())
    for kind, classes in chosen.items():
        entries = table.setdefault(kind, {})
        for limit, sizes in classes.items():
            entries.pop(str(limit), None)
            if sizes is not None:
                fields = dataclasses.asdict(sizes).items()
                entries[str(limit)] = {k: v for k, v in fields if v != usual[k]}
    lines = []
    for kind, classes in table.items():
        if classes:
            entries = sorted(classes.items(), key=lambda entry: int(entry[0]))
            rows = [f'  "{limit}": {json.dumps(fields)}' for limit, fields in entries]
            lines.append(f' "{kind}": {{\n' + ",\n".join(rows) + "\n }")
    SIZES_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    _table.cache_clear()
