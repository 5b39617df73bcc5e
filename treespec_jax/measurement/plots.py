"""Plots of the benchmark, of the comparison of rules and of calibrations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treespec_jax.measurement import suite_report
from treespec_jax.measurement.spec_bench import OVERALL


def save_suite(results: dict[str, Any], path: Path) -> None:
    """Writes a PNG: speed-up by task, acceptance by depth, cost of T nodes.

    A row per temperature and batch size.
    """
    # Without pyplot: no global state, and no display is looked for.
    from matplotlib.figure import Figure

    groups = suite_report.groups(results)
    found = results["breakdown"] or {"cost_curves": []}
    curves = found["cost_curves"]
    columns = 3 if curves else 2
    figure = Figure(figsize=(5.5 * columns, 4.2 * len(groups)), layout="constrained")
    grid = figure.subplots(len(groups), columns, squeeze=False)
    for row, ((temperature, batch), figures) in zip(grid, groups.items(), strict=True):
        _speed_ups(row[0], figures)
        _depths(row[1], figures)
        row[0].set_title(f"T={temperature:g}, batch {batch}", fontsize="medium")
        for curve in curves:
            if curve["batch"] == batch:
                _curve(row[2], curve)
    figure.savefig(path, dpi=120)


def _speed_ups(axes, figures: list[dict[str, Any]]) -> None:
    """A group of bars per task, a bar per combination but plain decoding."""
    tasks = suite_report.shown_tasks(figures[0])
    drafted = [figure for figure in figures if figure["method"] != "none"]
    width = 0.8 / max(1, len(drafted))
    for number, figure in enumerate(drafted):
        shift = width * (number - (len(drafted) - 1) / 2)
        middle, error = _bars([figure["tasks"][task]["speed_up"] for task in tasks])
        positions = [index + shift for index in range(len(tasks))]
        axes.bar(positions, middle, width, yerr=error, label=figure["label"])
    axes.axhline(1, color="0.5", linestyle=":", label="plain decoding")
    axes.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
    axes.set_ylabel("speed-up over plain decoding")
    # Room for the legend above the bars.
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])
    axes.legend(fontsize="small", ncols=2, loc="upper left")


def _depths(axes, figures: list[dict[str, Any]]) -> None:
    for figure in figures:
        shares = figure["tasks"][OVERALL]["acceptance_by_depth"]
        if shares:
            depths = range(1, len(shares) + 1)
            axes.plot(depths, shares, "o-", label=figure["label"])
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("depth")
    axes.set_ylabel("share of steps that accept a node there")
    if axes.lines:
        axes.legend(fontsize="small")


def _curve(axes, curve: dict[str, Any]) -> None:
    nodes = [point["nodes"] for point in curve["points"]]
    ratios = [point["ratio"] for point in curve["points"]]
    axes.plot(nodes, [r["median"] for r in ratios], "o-", label=curve["weights"])
    axes.fill_between(
        nodes, [r["min"] for r in ratios], [r["max"] for r in ratios], alpha=0.2
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(nodes, [str(n) for n in nodes])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_xlabel("nodes verified in one pass")
    axes.set_ylabel("time, in passes over one node")
    if curve["weights"]:
        axes.legend(fontsize="small")


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
    """A group of bars around each shape, one per rule, and a line for plain decoding.

    A rule has one colour; a group has no gap for a rule that refuses the shape.
    """
    drafted = [f for f in figures if f["shape"] != "none"]
    shapes, rules = (
        list(dict.fromkeys(f[name] for f in drafted)) for name in ("shape", "rule")
    )
    takers = {s: [f["rule"] for f in drafted if f["shape"] == s] for s in shapes}
    width = 0.8 / len(rules)

    def position(figure: dict[str, Any]) -> float:
        group = takers[figure["shape"]]
        shift = group.index(figure["rule"]) - (len(group) - 1) / 2
        return shapes.index(figure["shape"]) + width * shift

    for number, rule in enumerate(rules):
        bars = [f for f in drafted if f["rule"] == rule]
        positions = list(map(position, bars))
        middle, error = _bars([f[what] for f in bars])
        label = rule if all(f["lossless"] for f in bars) else f"{rule} (lossy)"
        colour = f"C{number}"
        axes.bar(positions, middle, width, yerr=error, label=label, color=colour)
    plain = next(f[what]["median"] for f in figures if f["shape"] == "none")
    axes.axhline(plain, color="0.5", linestyle=":", label="plain decoding")
    axes.set_xticks(range(len(shapes)), shapes)


def save_reliability(by_name: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Writes a PNG: how often estimates came true, and how many there were.

    Args:
      by_name: what `rounds.reliability` gave, by what it is of.
      path: of the file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="0.5", linestyle=":", label="as estimated")
    for name, figures in by_name.items():
        rows = [row for row in figures["bins"] if row["nodes"]]
        label = f"{name} (mean gap {100 * figures['mean_gap']:.1f} %)"
        estimated = [row["estimated"] for row in rows]
        upper.plot(estimated, [row["realised"] for row in rows], "o-", label=label)
        lower.plot(estimated, [row["nodes"] for row in rows], "o-")
    upper.set_ylabel("share that came true")
    upper.set_aspect("equal")
    upper.legend(fontsize="small")
    lower.set_yscale("log")
    lower.set_ylabel("nodes")
    lower.set_xlabel("probability that the drafter estimated")
    figure.savefig(path, dpi=120)


def _bars(spreads: list[dict[str, float]]):
    """Medians, and how far the extremes are below and above them."""
    middle = [s["median"] for s in spreads]
    below = [s["median"] - s["min"] for s in spreads]
    above = [s["max"] - s["median"] for s in spreads]
    return middle, [below, above]
