"""What the devices of a compiled TPU program exchange, and what runs meanwhile.

A program's text is its schedule. A collective is hidden as far as the core has other
work under way: here, as far as copies from HBM that were started before it are awaited
after it, or as it is itself split into a start and an end.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.aot.traffic import FETCHES, Instruction, Program, size_of

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Exchanges of one kind and size; loops and both sides of conditionals count once.

    Attributes:
      kind: of `KINDS`.
      count: how many instructions.
      size: bytes of the result of each, on one device.
      beside: how many of them run beside copies from HBM, or are asynchronous.
      fetching: bytes of those copies under way, on average over all of them.
    """

    kind: str
    count: int
    size: int
    beside: int
    fetching: int


def collectives(text: str) -> tuple[Collective, ...]:
    """Counts the collectives of a scheduled HLO program, those with most bytes first.

    Args:
      text: `jax.stages.Compiled.as_text()` of a TPU program.
    """
    program = Program(text)
    found: dict[tuple[str, int], list[int]] = {}
    for name, computation in program.computations.items():
        if name in program.fused:
            continue
        under_way = 0
        for instruction in computation.values():
            if instruction.op in FETCHES:
                under_way += program.cost(instruction, computation)
            elif started := _awaited(instruction, computation):
                under_way -= program.cost(started, computation)
            elif exchange := _exchange(instruction, program):
                kind, size, asynchronous = exchange
                total = found.setdefault((kind, size), [0, 0, 0])
                total[0] += 1
                total[1] += asynchronous or under_way > 0
                total[2] += under_way
    rows = [
        Collective(kind, count, size, beside, fetching // count)
        for (kind, size), (count, beside, fetching) in found.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.count * row.size))


def _exchange(it: Instruction, program: Program) -> tuple[str, int, bool] | None:
    """Kind and bytes of a collective, and whether it is asynchronous."""
    if it.op in KINDS:
        return it.op, size_of(it.result, everywhere=True), False
    name = it.op.removesuffix("-start")
    if name in KINDS:
        # Operand and result stand side by side.
        return name, size_of(it.result, everywhere=True) // 2, True
    body = program.body(it).values() if it.op == "fusion" else ()
    if any("AsyncCollectiveStart" in part.rest for part in body):
        inside = next(part for part in body if part.op in KINDS)
        return inside.op, size_of(inside.result, everywhere=True), True
    return None


def _awaited(
    instruction: Instruction, around: dict[str, Instruction]
) -> Instruction | None:
    """The copy whose end an instruction waits for."""
    if instruction.op not in ("copy-done", "slice-done"):
        return None
    return around.get(instruction.operands[0])
