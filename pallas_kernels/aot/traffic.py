"""HBM traffic of a compiled TPU program, added up from its text.

XLA's own "bytes accessed" charges each instruction with all of its operands and
results, wherever they lie. In a program for a TPU that is several times what memory
delivers: a weight that is fetched ahead in four slices counts four times whole, and
again as the operand of its product, which reads it from vector memory. Here only what
crosses between HBM and the core counts, and only as far as it is touched.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(
    r"^\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", re.MULTILINE
)
_CALLED = re.compile(r"calls=%?([\w.\-]+)")
_RUNS = re.compile(
    r"\b(?:to_apply|condition|body|true_computation|false_computation|"
    r"branch_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_ESTIMATE = re.compile(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')
# They name what others made, or wait for it; what they call is counted where it stands.
_FREE = {
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "copy-done",
    "get-tuple-element",
    "optimization-barrier",
    "parameter",
    "partition-id",
    "slice-done",
    "tuple",
    "while",
}
FETCHES = {"copy-start", "slice-start"}
# They read as much of their first operand as they give.
_PARTIAL = {"dynamic-slice", "gather", "slice"}
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # Where the update stands.


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes between HBM and the core of one device.

    Of every conditional the side that moves more counts, and bodies of loops count
    once: what one pass through the program moves at most.

    Attributes:
      fetched: ahead of their use, by copies that run beside the computation.
      kernels: of Pallas calls, by their own `cost_estimate`; without one all operands
        and results that lie in HBM.
      computed: read and written by all other instructions; of what is updated in place
        or looked up only the rows.
    """

    fetched: int
    kernels: int
    computed: int

    @property
    def total(self) -> int:
        return self.fetched + self.kernels + self.computed


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program: its result's shape, operation, operands, and the rest."""

    result: str
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def runs(self) -> list[str]:
        """Computations that a loop, a conditional or a call runs."""
        if self.op not in ("while", "conditional", "call"):
            return []
        return re.findall(r"%([\w.\-]+)", " ".join(_RUNS.findall(self.rest)))


def hbm_traffic(text: str) -> Traffic:
    """Adds up the traffic of a scheduled HLO program.

    Args:
      text: `jax.stages.Compiled.as_text()` of a TPU program.

    Raises:
      ValueError: not a program that this reader knows.
    """
    program = Program(text)
    if program.entry is None:
        raise ValueError("no HLO program, or of another form than this reader knows")
    parts = _moved(program, program.entry)
    return Traffic(parts["fetched"], parts["kernels"], parts["computed"])


def _moved(program: Program, name: str) -> collections.Counter[str]:
    """Bytes by kind of a computation and of what it runs."""
    parts: collections.Counter[str] = collections.Counter()
    computation = program.computations[name]
    for instruction in computation.values():
        parts[_kind(instruction)] += program.cost(instruction, computation)
        runs = [_moved(program, other) for other in instruction.runs()]
        if instruction.op == "conditional":
            runs = [max(runs, key=lambda side: side.total())]
        for one in runs:
            parts.update(one)
    return parts


def _kind(instruction: Instruction) -> str:
    if instruction.op in FETCHES:
        return "fetched"
    return "kernels" if _is_kernel(instruction) else "computed"


def _is_kernel(instruction: Instruction) -> bool:
    return 'custom_call_target="tpu_custom_call"' in instruction.rest


class Program:
    """A scheduled HLO program, in order.

    Args:
      text: `jax.stages.Compiled.as_text()`.

    Attributes:
      computations: instructions by name, by the name of the computation.
      fused: names of computations that are bodies of fusions.
      entry: the name of the first that runs; None: there is none.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.fused: set[str] = set()
        self.entry: str | None = None
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations[match[1]] = {}
                self.entry = match[1] if line.startswith("ENTRY") else self.entry
            elif match := _INSTRUCTION.match(line):
                root, name, result, op, rest = match.groups()
                operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
                current[name] = Instruction(
                    result, op, tuple(operands), rest, bool(root)
                )
                if op == "fusion":
                    self.fused.add(_CALLED.search(rest)[1])

    def body(self, fusion: Instruction) -> dict[str, Instruction]:
        """The computation that a fusion stands for."""
        return self.computations[_CALLED.search(fusion.rest)[1]]

    def cost(self, it: Instruction, around: dict[str, Instruction]) -> int:
        """Bytes between HBM and the core, of an instruction of a computation."""
        given = [around[x].result if x in around else "" for x in it.operands]
        if it.op in _FREE or it.op.endswith("-done"):
            return 0
        if it.op in FETCHES:
            # (source, what arrives, …); the source of a slice in brackets of its own.
            arriving = [m[0] for m in _SHAPE.finditer(it.result)][1]
            return size_of(arriving, everywhere=True)
        if it.op == "fusion":
            return self._fusion(it, given)
        if it.op in _IN_PLACE:
            new = given[_IN_PLACE[it.op]]
            written = size_of(new, everywhere=True) if size_of(given[0]) else 0
            return size_of(new) + written
        if it.op in _PARTIAL:
            read = size_of(it.result, everywhere=True) if size_of(given[0]) else 0
            return read + size_of(it.result)
        if it.op == "custom-call":
            if estimate := _ESTIMATE.search(it.rest):
                return int(estimate[1])
            if not _is_kernel(it):
                return 0  # The compiler's own, which place things.
        return size_of(it.result) + sum(map(size_of, given))

    def _fusion(self, it: Instruction, given: list[str]) -> int:
        name = _CALLED.search(it.rest)[1]
        total = 0
        for index, operand in enumerate(given):
            if size := size_of(operand):
                total += min(size, self._read(name, index))
        body = self.computations[name]
        (root,) = (x for x in body.values() if x.root)
        made, shapes = [root], [it.result]
        if root.op == "tuple":
            made = [body[x] for x in root.operands]
            shapes = [m[0] for m in _SHAPE.finditer(it.result)]
        for result, shape in zip(made, shapes, strict=True):
            while result.op == "bitcast":
                result = body[result.operands[0]]
            size = size_of(shape)
            if result.op in _IN_PLACE:
                new = body[result.operands[_IN_PLACE[result.op]]].result
                size = min(size, size_of(new, everywhere=True))
            total += size
        return total

    def _renames(self, it: Instruction) -> bool:
        """Whether a fusion does nothing but to see its operand as another shape."""
        if it.op != "fusion":
            return False
        body = self.computations[_CALLED.search(it.rest)[1]]
        return all(x.op in ("parameter", "bitcast") for x in body.values())

    def _read(self, name: str, index: int) -> int:
        """Bytes of a fused computation's parameter that it touches."""
        body = self.computations[name]
        (source,) = (
            key
            for key, x in body.items()
            if x.op == "parameter" and x.rest.startswith(f"{index})")
        )
        whole = size_of(body[source].result, everywhere=True)
        total, todo = 0, [source]
        while todo:
            name = todo.pop()
            for key, user in body.items():
                for number, operand in enumerate(user.operands):
                    if operand != name:
                        continue
                    if user.op == "bitcast" or self._renames(user):
                        todo.append(key)
                    elif user.op == "fusion":
                        total += self._read(_CALLED.search(user.rest)[1], number)
                    elif user.op in _PARTIAL and number == 0:
                        total += size_of(user.result, everywhere=True)
                    elif user.op not in _IN_PLACE or number:
                        total += whole
        return min(total, whole)


def size_of(shapes: str, everywhere: bool = False) -> int:
    """Bytes of all arrays of a shape that lie in HBM, or wherever; padding included."""
    total = 0
    for dtype, dims, layout in _SHAPE.findall(shapes):
        if "S(" in layout and not everywhere:
            continue
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
        sizes = [int(n) for n in dims.split(",") if n]
        total += math.prod(_padded(sizes, layout)) * bits // 8
    return total


def _padded(sizes: list[int], layout: str) -> list[int]:
    """Sizes in memory of an array, whose rows are cut into tiles, such as T(8,128)."""
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    if tile is None or not sizes:
        return sizes
    padded = list(sizes)
    # The order names the axes from the innermost.
    axes = [int(n) for n in order.split(",")]
    edges = [int(n) for n in reversed(tile[1].split(","))]
    for axis, edge in zip(axes, edges, strict=False):
        padded[axis] = -(-padded[axis] // edge) * edge
    return padded
