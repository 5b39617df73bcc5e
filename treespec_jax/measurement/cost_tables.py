"""Cost curves as the engine reads them, as tables and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treespec_jax.engine.costs import CostCurve, Known, context_class
from treespec_jax.trees.shapes import TreeShape, text_of
from treespec_jax.tuning.theory import Costs


def curve(costs: Costs, slots: int) -> CostCurve:
    """Measured costs by rows: T nodes of so many slots.

    A level costs what one of the middle size does, and the rest what that of a plain
    step and that of a tree do on average.
    """
    return CostCurve(
        tuple((slots * nodes, seconds) for nodes, seconds in costs.verify),
        costs.draft_root,
        statistics.median(seconds for _, seconds in costs.draft_level),
        statistics.mean(seconds for _, seconds in costs.rest),
    )


def merged(known: Known, curves: Mapping[int, CostCurve]) -> Known:
    """What is known with curves by tokens of context put in.

    What single shapes were seen to cost stays: it was measured while they decoded.
    """
    new = {context_class(context): one for context, one in curves.items()}
    return Known({**known.curves, **new}, known.steps)


def shapes_of(
    costs: CostCurve, ladder: Sequence[TreeShape], slots: int
) -> list[dict[str, Any]]:
    """Predicted costs of a step of each shape, as plain values for JSON.

    `relative` is in plain steps, and so many tokens a step has to emit to be worth it.
    """
    return [
        {
            "shape": text_of(shape),
            "milliseconds": 1e3 * costs.step(shape, slots),
            "relative": costs.relative(shape, slots),
        }
        for shape in sorted(ladder, key=lambda shape: shape.num_nodes)
    ]


def table(results: Mapping[str, Any]) -> str:
    """Markdown: parts of a step, and steps of the ladder, for every context."""
    about, lines = results["about"], []
    device = ", ".join(filter(None, (about["device"], about["host"])))
    lines += [f"{device}; {about['slots']} slots; {about['drafter']}", ""]
    for context, found in results["contexts"].items():
        first = found["verify"][0][1]
        lines += [f"After {context} tokens:", ""]
        lines += ["| nodes | target's pass, ms | in passes over one |", "|---|---|---|"]
        for rows, seconds in found["verify"]:
            nodes = int(rows) // about["slots"]
            lines.append(f"| {nodes} | {1e3 * seconds:.2f} | {seconds / first:.2f} |")
        parts = ", ".join(
            f"{name} {1e3 * found[key]:.2f} ms"
            for name, key in (
                ("drafter without levels", "root"),
                ("a level", "level"),
                ("the rest", "rest"),
            )
        )
        lines += ["", parts, ""]
        lines += [
            "| tree | step, ms | pays from tokens per step |",
            "|---|---|---|",
        ]
        for one in found["shapes"]:
            name, relative = one["shape"], one["relative"]
            lines.append(f"| {name} | {one['milliseconds']:.2f} | {relative:.2f} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def save(results: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG: the target's pass by nodes, and a step's cost by shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    passes, steps = figure.subplots(1, 2)
    slots = results["about"]["slots"]
    for context, found in results["contexts"].items():
        rows, seconds = zip(*found["verify"], strict=True)
        nodes = [row / slots for row in rows]
        passes.plot(nodes, [1e3 * s for s in seconds], "o-", label=f"{context} tokens")
        names = [one["shape"] for one in found["shapes"]]
        relative = [one["relative"] for one in found["shapes"]]
        steps.plot(names, relative, "o-", label=f"{context} tokens")
    passes.set_xscale("log", base=2)
    passes.set_xticks(nodes, [f"{n:g}" for n in nodes])
    passes.set_xlabel("nodes verified in one pass")
    passes.set_ylabel("milliseconds")
    steps.set_ylabel("a step, in plain steps")
    for axes in (passes, steps):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", title="context")
    figure.savefig(path, dpi=120)
