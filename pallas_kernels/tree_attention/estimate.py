"""The TPU kernel's cost per prefix, from the compiler's program of it.

The machine program says what one pass through each loop costs; how often the loops run
follows from the block sizes. All figures are the compiler's estimates.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.aot.bundles import KernelReport, Loop
from pallas_kernels.aot.devices import DeviceKind
from pallas_kernels.tree_attention import tpu_cut
from pallas_kernels.tree_attention.operands import Operands
from pallas_kernels.tree_attention.spec import AttentionSpec

ROWS = 128


@dataclasses.dataclass(frozen=True)
class PrefixCost:
    """Of 128 rows of prefix and one key/value head, where no mask is needed.

    Attributes:
      bundles: issued.
      cycles: of the schedule, without waits for copies.
      stream_cycles: in which the device's memory delivers those rows.
      spills: registers that are stored or loaded again for want of registers; both are
        in bundles and cycles.
      mxu_share: of the bundles, those that issue to the MXU.
      copied: bytes read from HBM for them.
      least: bytes that they have.
    """

    bundles: float
    cycles: float
    stream_cycles: float
    spills: float
    mxu_share: float
    copied: float
    least: int

    @property
    def seconds_ratio(self) -> float:
        """Estimated time over that of streaming: at 1 memory alone is the bound."""
        return max(1.0, self.cycles / self.stream_cycles)


@dataclasses.dataclass(frozen=True)
class CallBytes:
    """HBM traffic of one call: what the kernel moves, and the least possible."""

    moved: int
    least: int


def prefix_cost(
    kernel: KernelReport, kind: DeviceKind, operands: Operands, spec: AttentionSpec
) -> PrefixCost:
    """Adds up the loops of one block of whole pages.

    Args:
      kernel: as compiled for this call.
      kind: what for.
      operands: of the call, shapes at least.
      spec: of the call, with the block sizes that it was compiled with.

    Raises:
      ValueError: a kernel that has no such loop, or operands that it does not take.
    """
    static = _static(operands, spec)
    block = _first_block(kernel)
    inside = [loop for loop in kernel.loops if loop.parent == block.index]
    trips = {block.index: 1}
    for loop in inside:
        if loop.copied:
            trips[loop.index] = static.pages_per_block
        elif loop.mix.mxu_bundles:
            passes = static.heads // static.unroll * (static.rows // static.tile)
            trips[loop.index] = passes
    units = static.heads * static.pages_per_block * static.page / ROWS
    parts = [(loop, trips[loop.index]) for loop in (block, *inside)]

    def total(of):
        return sum(of(loop) * count for loop, count in parts) / units

    bundles = total(lambda loop: loop.bundles)
    least = ROWS * static.parts * static.H * static.page_bytes
    return PrefixCost(
        bundles=bundles,
        cycles=total(lambda loop: loop.cycles),
        stream_cycles=kind.stream_cycles(least),
        spills=total(lambda loop: loop.mix.spills + loop.mix.fills),
        mxu_share=total(lambda loop: loop.mix.mxu_bundles) / bundles,
        copied=total(lambda loop: loop.copied.get("hbm_to_vmem", 0)),
        least=least,
    )


def call_bytes(
    cost: PrefixCost, operands: Operands, spec: AttentionSpec, length: int
) -> CallBytes:
    """Bytes of a call whose slots all hold `length` rows of prefix."""
    static = _static(operands, spec)
    queries, table = operands.queries, operands.page_table
    whole = -(-length // static.page) * static.page * static.slots * static.K
    rows = queries.size // static.width * static.H
    tree = static.slots * static.K * 2 * static.U * static.H
    mask = static.slots * static.row_steps * static.mask_rows * static.U * 2
    moved = whole / ROWS * cost.copied * static.row_steps
    moved += (2 * rows + tree) * static.row_bytes + mask + table.size * 4
    least = length * static.slots * static.K * cost.least / ROWS
    least += (2 * queries.size + operands.tree_kv.size) * static.row_bytes
    return CallBytes(moved=int(moved), least=int(least))


def _first_block(kernel: KernelReport) -> Loop:
    """The first loop within that over the grid whose body multiplies."""
    multiplies = set()
    for loop in kernel.loops:
        if loop.mix.mxu_bundles:
            while loop.depth > 2:
                loop = kernel.loops[loop.parent]
            multiplies.add(loop.index)
    blocks = [kernel.loops[i] for i in sorted(multiplies) if kernel.loops[i].depth == 2]
    if not blocks:
        raise ValueError(f"{kernel.name} has no loop over blocks of prefix")
    return blocks[0]


def _static(operands: Operands, spec: AttentionSpec) -> tpu_cut.Static:
    static = tpu_cut.cut(operands, spec)
    if isinstance(static, str):
        raise ValueError(f"the TPU kernel cannot run: {static}")
    return static
