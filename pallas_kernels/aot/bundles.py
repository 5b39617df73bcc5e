"""Reads the compiler's final machine program of one kernel.

A TPU core issues at most one bundle of instructions per cycle. The compiler dumps three
files per kernel: the bundles, with the loops they stand in; one row per bundle with how
many instructions go to each unit; and the schedule that the bundles come from, in which
a cycle without a bundle still stands as an empty one. Trip counts are in none of them,
so that all figures here are static: per pass through a loop's body, not per run.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence

from pallas_kernels.aot.devices import DeviceKind

FILL, SPILL = "VLOAD:FILL", "VSTORE:SPILL"

_BUNDLE = re.compile(r"^\s*(?:0x)?([0-9a-f]+)\s+((?:[A-Z]{2}\s*)*):\s*(>*)\s*\{")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
# At the start of an instruction: comments of bounds checks quote copies too.
_BRANCH = re.compile(
    r"(?:\{|;;)\s+%\S+ = sbr\.rel .*?target (?:= \$|bundleno = \d+ \(\w+\), )region"
    r"(?: = )?(\d+)"
)
_COPY = re.compile(
    r"(?:\{|;;)\s+%\S+ = dma\.(\w+_to_\w+)\s.*?size_in_granules=\*/([^,\s]+)"
)


@dataclasses.dataclass(frozen=True)
class Mix:
    """What a run of bundles issues.

    Attributes:
      bundles: their number.
      slots: instructions per unit (MXU, XLU, VALU, VPOP, EUP, VLOAD, VSTORE, SALU and
        the reloads and spills of registers among the loads and stores).
      mxu_bundles: bundles that issue to the MXU.
      bound: bundles that the busiest unit alone would need.
      bound_unit: its name.
    """

    bundles: int
    slots: dict[str, int]
    mxu_bundles: int
    bound: int
    bound_unit: str

    @property
    def mxu_share(self) -> float:
        return self.mxu_bundles / self.bundles if self.bundles else 0.0

    @property
    def fills(self) -> int:
        return self.slots.get(FILL, 0)

    @property
    def spills(self) -> int:
        return self.slots.get(SPILL, 0)


@dataclasses.dataclass(frozen=True)
class Loop:
    """One loop of a kernel, counted without the loops inside it.

    Attributes:
      index: its place in `KernelReport.loops`, in program order.
      parent: index of the loop around it; None: the outermost.
      depth: 1 for the outermost.
      first: its first bundle.
      last: its last one, delay slots of the branch back included.
      mix: of one pass through the body, both sides of all branches.
      cycles: of one pass, by the schedule; waits for copies are not in it.
      skippable: bundles that some branch jumps over: those of `pl.when`.
      copied: bytes of one pass per direction ("hbm_to_vmem", …).
      unsized: copies whose size is known at run time only.
    """

    index: int
    parent: int | None
    depth: int
    first: int
    last: int
    mix: Mix
    cycles: int
    skippable: int
    copied: dict[str, int]
    unsized: int

    @property
    def bundles(self) -> int:
        return self.mix.bundles


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One kernel, by the compiler.

    Attributes:
      name: of the HLO instruction, the kernel's name and a number.
      mix: of all bundles, each counted once.
      cycles: of all of the schedule, each counted once.
      loops: in program order.
      copied: bytes of the copies outside all loops.
    """

    name: str
    mix: Mix
    cycles: int
    loops: tuple[Loop, ...]
    copied: dict[str, int]

    @property
    def bundles(self) -> int:
        return self.mix.bundles

    @property
    def innermost(self) -> Loop | None:
        """The largest loop that holds no other."""
        parents = {loop.parent for loop in self.loops}
        inner = [loop for loop in self.loops if loop.index not in parents]
        return max(inner, key=lambda loop: loop.bundles, default=None)


@dataclasses.dataclass
class _Bundle:
    """One line of the program, before loops are known."""

    labels: str
    depth: int
    empty: bool
    text: str


def read_kernel(
    name: str, program: str, utilization: str, schedule: str, kind: DeviceKind
) -> KernelReport:
    """Parses the three dumps of a kernel.

    Args:
      name: of the kernel.
      program: text of `*final_bundles.txt`.
      utilization: text of `*final_hlo-static-per-bundle-utilization.txt`.
      schedule: text of `*-packed-bundles-post-ra.txt`.
      kind: what it was compiled for.

    Raises:
      ValueError: the files do not look as this reader expects, or disagree.
    """
    bundles = _read_bundles(program)
    capacity, rows = _read_utilization(utilization)
    if not bundles or len(bundles) != len(rows):
        raise ValueError(
            f"kernel {name}: {len(bundles)} bundles, but {len(rows)} rows of "
            "utilization; the compiler's dump has another form than this reader knows"
        )
    regions = _find_regions(bundles)
    spans = _find_loops(bundles, regions, kind.delay_slots)
    skipped = _find_skipped(bundles, regions, kind.delay_slots)
    owner = _owners(len(bundles), spans)
    cycles = _read_bundles(schedule)
    timed = _find_loops(cycles, _find_regions(cycles), kind.delay_slots)
    if [span[2:] for span in timed] != [span[2:] for span in spans]:
        raise ValueError(
            f"kernel {name}: its schedule has other loops than its bundles"
        )
    per_loop = collections.Counter(_owners(len(cycles), timed))

    def copies(of):
        total: dict[str, int] = {}
        unsized = 0
        for i, bundle in enumerate(bundles):
            if owner[i] != of:
                continue
            for direction, size in _COPY.findall(bundle.text):
                if size.isdigit():
                    total[direction] = total.get(direction, 0) + int(size)
                else:
                    unsized += 1
        return {key: value * kind.granule for key, value in total.items()}, unsized

    loops = []
    for index, (first, last, depth, parent) in enumerate(spans):
        inside = [i for i in range(first, last + 1) if owner[i] == index]
        copied, unsized = copies(index)
        loops.append(
            Loop(
                index=index,
                parent=parent,
                depth=depth,
                first=first,
                last=last,
                mix=_mix(capacity, [rows[i] for i in inside]),
                cycles=per_loop[index],
                skippable=sum(skipped[i] > skipped[first] for i in inside),
                copied=copied,
                unsized=unsized,
            )
        )
    mix, outside = _mix(capacity, rows), copies(None)[0]
    return KernelReport(name, mix, len(cycles), tuple(loops), outside)


def _owners(count: int, spans) -> list[int | None]:
    """The innermost loop of each bundle."""
    owner: list[int | None] = [None] * count
    for index, (first, last, _, _) in enumerate(spans):
        owner[first : last + 1] = [index] * (last + 1 - first)
    return owner


def _mix(capacity: dict[str, int], rows: Sequence[dict[str, int]]) -> Mix:
    slots = {unit: sum(row[unit] for row in rows) for unit in capacity}
    # Reloads and spills take the slots of loads and stores.
    shared = dict(slots)
    shared["VLOAD"] = shared.get("VLOAD", 0) + shared.pop(FILL, 0)
    shared["VSTORE"] = shared.get("VSTORE", 0) + shared.pop(SPILL, 0)
    bounds = {
        unit: -(-n // max(1, capacity.get(unit, 1))) for unit, n in shared.items()
    }
    busiest = max(bounds, key=lambda unit: bounds[unit])
    return Mix(
        bundles=len(rows),
        slots=slots,
        mxu_bundles=sum(row["MXU"] > 0 for row in rows),
        bound=bounds[busiest],
        bound_unit=busiest,
    )


def _read_bundles(program: str) -> list[_Bundle]:
    bundles: list[_Bundle] = []
    for line in program.splitlines():
        match = _BUNDLE.match(line)
        if match is None:
            if bundles:
                bundles[-1].text += "\n" + line
            continue
        if int(match[1], 16) != len(bundles):
            raise ValueError(f"bundle {len(bundles)} is missing before {line[:40]!r}")
        # An empty bundle is printed without its depth.
        empty = line[match.end() :].lstrip().startswith("}")
        depth = bundles[-1].depth if empty and bundles else len(match[3])
        bundles.append(_Bundle(match[2], depth, empty, line[match.end() - 1 :]))
    return bundles


def _find_loops(bundles: Sequence[_Bundle], regions: dict[str, int], slots: int):
    """(first, last, depth, parent) of each loop, in program order.

    A loop runs from the label of its body to the branch back there and the bundles in
    that branch's delay; the branch itself is printed with the depth around the loop.
    """
    ends: dict[int, int] = {}
    for i, bundle in enumerate(bundles):
        for region in _BRANCH.findall(bundle.text):
            if regions.get(region, i + 1) <= i:
                ends[regions[region]] = i
    spans: list[tuple[int, int, int, int | None]] = []
    for first, bundle in enumerate(bundles):
        if "LB" not in bundle.labels:
            continue
        if first not in ends:
            raise ValueError(f"the loop at bundle {first:#x} has no branch back to it")
        branch = ends[first]
        last = branch + _delay(bundles, branch, slots)
        for i in range(branch + 1, last + 1):
            if not bundles[i].empty and bundles[i].depth < bundle.depth:
                last = i - 1
                break
        around = [k for k, span in enumerate(spans) if span[1] >= last]
        spans.append((first, last, bundle.depth, around[-1] if around else None))
    return spans


def _find_skipped(
    bundles: Sequence[_Bundle], regions: dict[str, int], slots: int
) -> list[int]:
    """Per bundle, how many forward branches can jump over it."""
    skipped = [0] * len(bundles)
    for i, bundle in enumerate(bundles):
        for region in _BRANCH.findall(bundle.text):
            after = i + 1 + _delay(bundles, i, slots)
            for jumped in range(after, regions.get(region, 0)):
                skipped[jumped] += 1
    return skipped


def _find_regions(bundles: Sequence[_Bundle]) -> dict[str, int]:
    """Where each region, the target of branches, starts."""
    regions: dict[str, int] = {}
    for i, bundle in enumerate(bundles):
        for region in _REGION.findall(bundle.text):
            regions.setdefault(region, i)
    return regions


def _delay(bundles: Sequence[_Bundle], branch: int, slots: int) -> int:
    """Bundles after a branch that run with it; the compiler shortens it at a label."""
    for i, bundle in enumerate(bundles[branch + 1 : branch + 1 + slots]):
        if bundle.labels:
            return i
    return min(slots, len(bundles) - 1 - branch)


def _read_utilization(text: str) -> tuple[dict[str, int], list[dict[str, int]]]:
    lines = [line for line in text.splitlines() if line.strip()]
    head = [line.startswith("==") for line in lines]
    if head[:4] != [True, False, False, True]:
        raise ValueError("the utilization dump has another form than this reader knows")
    units = [unit.strip() for unit in lines[1].split(",")]
    table = [[int(n) for n in line.split()] for line in [lines[2], *lines[4:]]]
    if any(len(row) != len(units) for row in table) or "MXU" not in units:
        raise ValueError("the utilization dump has another form than this reader knows")
    capacity, *rows = [dict(zip(units, row, strict=True)) for row in table]
    return capacity, rows
