"""Plots of the benchmark and of the comparison of rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from treespec_jax.measurement import shape_table


def save_shapes(results: dict[str, Any], path: Path) -> None:
    """Writes a PNG: speed by shape, and the cost of verifying more nodes."""
    # Without pyplot: no global state, and no display is looked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    speeds, costs = figure.subplots(1, 2)
    _speeds(speeds, results["shapes"])
    speeds.set_title(shape_table.title(results["settings"]), fontsize="medium")
    _curve(costs, results["cost_curve"])
    figure.savefig(path, dpi=120)


def _speeds(axes, shapes: dict[str, Any]) -> None:
    names = list(shapes)
    speeds = [shapes[name]["tokens_per_second"] for name in names]
    middle, error = _bars(speeds)
    colours = ["0.6" if name == "none" else "tab:blue" for name in names]
    axes.barh(names, middle, xerr=error, color=colours, capsize=3)
    for row, name in enumerate(names):
        ratio = shapes[name]["ratio_to_plain"]["median"]
        axes.text(0.01 * max(middle), row, f"× {ratio:.2f}", va="center", color="w")
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second (median, min to max of the rounds)")


def _curve(axes, curve: list[dict[str, Any]]) -> None:
    nodes = [point["nodes"] for point in curve]
    ratios = [point["ratio"] for point in curve]
    axes.plot(nodes, [r["median"] for r in ratios], "o-")
    axes.fill_between(
        nodes, [r["min"] for r in ratios], [r["max"] for r in ratios], alpha=0.2
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(nodes, [str(n) for n in nodes])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_xlabel("nodes verified in one pass")
    axes.set_ylabel("time, in passes over one node")


def save_rules(results: dict[str, Any], path: Path) -> None:
    """Writes a PNG: tokens per step and per second by shape and rule."""
    from matplotlib.figure import Figure

    temperatures = results["comparison"]["temperatures"]
    figure = Figure(figsize=(4.5 * len(temperatures), 7), layout="constrained")
    grid = figure.subplots(2, len(temperatures), squeeze=False, sharey="row")
    labels = {"tokens_per_step": "tokens per step", "tokens_per_second": "tok/s"}
    for row, (what, label) in zip(grid, labels.items(), strict=True):
        for axes, temperature in zip(row, temperatures, strict=True):
            figures = results["figures"]
            _rules(axes, [f for f in figures if f["temperature"] == temperature], what)
            axes.set_title(f"temperature {temperature:g}")
            axes.set_ylabel(label)
    grid[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _rules(axes, figures: list[dict[str, Any]], what: str) -> None:
    """A group of bars per shape, a bar per rule, and a line for plain decoding."""
    drafted = [f for f in figures if f["shape"] != "none"]
    shapes, rules = (
        list(dict.fromkeys(f[name] for f in drafted)) for name in ("shape", "rule")
    )
    width = 0.8 / len(rules)
    for number, rule in enumerate(rules):
        bars = [f for f in drafted if f["rule"] == rule]
        shift = width * (number - len(rules) / 2)
        positions = [shapes.index(f["shape"]) + shift for f in bars]
        middle, error = _bars([f[what] for f in bars])
        label = rule if all(f["lossless"] for f in bars) else f"{rule} (lossy)"
        axes.bar(positions, middle, width, yerr=error, label=label)
    plain = next(f[what]["median"] for f in figures if f["shape"] == "none")
    axes.axhline(plain, color="0.5", linestyle=":", label="plain decoding")
    axes.set_xticks(range(len(shapes)), shapes)


def _bars(spreads: list[dict[str, float]]):
    """Medians, and how far the extremes are below and above them."""
    middle = [s["median"] for s in spreads]
    below = [s["median"] - s["min"] for s in spreads]
    above = [s["max"] - s["median"] for s in spreads]
    return middle, [below, above]
