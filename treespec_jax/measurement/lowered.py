"""What a program says before any compiler saw it: loops, conditionals, sorts, kernels.

Only the lowering for a platform is needed, which takes no device and no compiler of it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

# StableHLO and CHLO operations that make no kernel of their own after fusion.
_FREE = ("constant", "return", "reshape", "tuple", "get_tuple_element", "iota")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Operations of a program; of a called function once per call.

    Attributes:
      loops: `while`s that stand in no other.
      inner_loops: the others.
      conditionals: whose branch is chosen while the program runs.
      sorts: of any kind.
      top_ks: each of which a GPU's compiler may make a sort.
      calls: custom calls by their targets: kernels, above all.
      operations: all others, before fusion, without constants and reshapes.
    """

    loops: int
    inner_loops: int
    conditionals: int
    sorts: int
    top_ks: int
    calls: dict[str, int]
    operations: int


def lower(function, arguments: tuple, platform: str) -> jax.stages.Lowered:
    """A program for "cuda", "rocm", "tpu" or "cpu", whatever this machine has."""
    traced = jax.jit(function, donate_argnums=1).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,))


def counts(lowered: jax.stages.Lowered) -> Counts:
    """Of a lowered program."""
    module = lowered.compiler_ir(dialect="stablehlo")
    views = [view.operation for view in module.body.operations]
    functions = {_text(op.attributes["sym_name"]): op for op in views}
    seen: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for op, depth in _walk(functions["main"], functions, 0):
        name = op.name.split(".")[-1]
        if name == "while":
            seen["inner_loops" if depth else "loops"] += 1
        elif name in ("case", "if"):
            seen["conditionals"] += _is_open(op)
        elif name in ("sort", "top_k"):
            seen[f"{name}s"] += 1
        elif name == "custom_call":
            calls[_text(op.attributes["call_target_name"])] += 1
        elif name not in _FREE:
            seen["operations"] += 1
    names = [field.name for field in dataclasses.fields(Counts)]
    return Counts(**{name: seen[name] for name in names} | {"calls": dict(calls)})


def _text(attribute: Any) -> str:
    """A name, without the marks that say what kind of name."""
    return str(attribute).strip('@"')


def _walk(op: Any, functions: dict[str, Any], depth: int) -> Iterator[tuple[Any, int]]:
    """All operations below one, calls followed, and the loops around each."""
    for region in op.regions:
        for block in region.blocks:
            for view in block.operations:
                inner = view.operation
                if inner.name == "func.call":
                    callee = functions[_text(inner.attributes["callee"])]
                    yield from _walk(callee, functions, depth)
                    continue
                yield inner, depth
                # What reduces or sorts is a region too, and no program of its own.
                if inner.name.split(".")[-1] in ("while", "case", "if"):
                    loop = inner.name.endswith(".while")
                    yield from _walk(inner, functions, depth + loop)


def _is_open(op: Any) -> bool:
    """Whether a conditional is decided when the program runs.

    A choice by platform is one with a single branch, or with a constant.
    """
    chosen = op.operands[0].owner
    constant = getattr(chosen, "name", "").endswith("constant")
    return len(op.regions) > 1 and not constant
