"""The benchmark's picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from treespec_jax.acceptance import compatibility


def save(results: dict[str, Any], path: Path) -> None:
    """Writes a PNG: speed by shape, and the cost of verifying more nodes."""
    # Without pyplot: no global state, and no display is looked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _speeds(left, results["shapes"])
    settings = results["settings"]
    kept = settings["engine"].get("cache_dtype", "")
    label = compatibility.label(settings["rule"], settings["cascade"], kept)
    cascade = f", cascade {settings['cascade']}" if settings["cascade"] else ""
    left.set_title(f"rule {settings['rule']}{cascade} ({label})", fontsize="medium")
    _curve(right, results["cost_curve"])
    figure.savefig(path, dpi=120)


def _speeds(axes, shapes: dict[str, Any]) -> None:
    names = list(shapes)
    speeds = [shapes[name]["tokens_per_second"] for name in names]
    middle = [s["median"] for s in speeds]
    error = [
        [s["median"] - s["min"] for s in speeds],
        [s["max"] - s["median"] for s in speeds],
    ]
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

    figures = results["figures"]
    temperatures = results["comparison"]["temperatures"]
    shapes, rules = (
        list(dict.fromkeys(f[name] for f in figures if f["shape"] != "none"))
        for name in ("shape", "rule")
    )
    width = 0.8 / len(rules)
    figure = Figure(figsize=(4.5 * len(temperatures), 7), layout="constrained")
    grid = figure.subplots(2, len(temperatures), squeeze=False, sharey="row")
    for row, (what, label) in enumerate(
        [("tokens_per_step", "tokens per step"), ("tokens_per_second", "tok/s")]
    ):
        for axes, temperature in zip(grid[row], temperatures, strict=True):
            for number, rule in enumerate(rules):
                found = {
                    f["shape"]: f[what]
                    for f in figures
                    if f["rule"] == rule and f["temperature"] == temperature
                }
                own = [s for s in shapes if s in found]
                middle = [found[s]["median"] for s in own]
                low = [found[s]["median"] - found[s]["min"] for s in own]
                high = [found[s]["max"] - found[s]["median"] for s in own]
                at = [shapes.index(s) + width * (number - len(rules) / 2) for s in own]
                lossy = "" if compatibility.RULES[rule].lossless else " (lossy)"
                label_of = rule + lossy
                axes.bar(at, middle, width, yerr=[low, high], label=label_of)
            plain = next(
                f[what]["median"]
                for f in figures
                if f["shape"] == "none" and f["temperature"] == temperature
            )
            axes.axhline(plain, color="0.5", linestyle=":", label="plain decoding")
            axes.set_xticks(range(len(shapes)), shapes)
            axes.set_title(f"temperature {temperature:g}")
            axes.set_ylabel(label)
    grid[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
