"""The benchmark's table."""

from __future__ import annotations

from typing import Any

from treespec_jax.acceptance import compatibility
from treespec_jax.experiments.table import markdown, percents


def table(results: dict[str, Any]) -> str:
    """Two Markdown tables and what they were measured on."""
    v, s = results["versions"], results["settings"]
    bandwidth = results["bandwidth"]
    weights = results["target_weight_bytes"]
    sampling = s["sampling"]
    kind = "greedy" if not sampling["temperature"] else f"T={sampling['temperature']:g}"
    kept = s["engine"].get("cache_dtype", "")
    label = compatibility.label(s["rule"], s["cascade"], kept)
    cache = f", {kept} cache" if kept else ""
    lines = [
        f"rule {s['rule']} ({label}), {s['dtype']}{cache}, "
        f"{kind}, "
        f"{len(results['prompts'])} prompts × "
        f"{sampling['max_tokens']} tokens, batch {s['engine']['max_batch']}, "
        f"{s['benchmark']['repeat']} rounds; jax {v['jax']}, {v['device_kind']}, "
        f"{v['cpus']} CPUs",
        f"target weights {weights / 1e6:.0f} MB, read bandwidth "
        f"{bandwidth['bytes_per_second'] / 1e9:.1f} GB/s ({bandwidth['method']})",
        "",
        markdown([_HEAD, *(_row(n, f) for n, f in results["shapes"].items())]),
        "",
        "Speeds are medians of rounds (min–max), ratios are paired within a round. "
        "Draft, target and rest are shares of a step; memory is weight bytes over the "
        "time of the target's pass, as a share of the read bandwidth.",
    ]
    estimated = {n: f["reliability"] for n, f in results["shapes"].items()}
    lines += reliability_lines(estimated)
    whole = results["shapes"]["none"]["bandwidth_share_whole"]
    lines.append(
        f"Plain decoding, all of its step included, reads weights at {100 * whole:.0f} "
        "% of the bandwidth."
    )
    unlike = {n: f["texts_unlike_plain"] for n, f in results["shapes"].items()}
    if s["cascade"] or (s["rule"] != "exact" and sampling["temperature"]):
        lossless = compatibility.label(s["rule"], s["cascade"]) == "lossless"
        distribution = "of the distribution of plain decoding" if lossless else "LOSSY"
        by = f", cascade {s['cascade']} {s['alpha']:g}" if s["cascade"] else ""
        lines.append(f"Rule {s['rule']}{by}: texts are others, {distribution}.")
    elif any(unlike.values()):
        named = ", ".join(f"{n}: {count}" for n, count in unlike.items() if count)
        lines.append(f"TEXTS THAT DIFFER FROM PLAIN DECODING: {named}")
    else:
        lines.append("All shapes emitted the tokens of plain decoding.")
    lines += ["", markdown(_curve_rows(results["cost_curve"]))]
    return "\n".join(lines)


def reliability_lines(by_name: dict[str, dict[str, Any] | None]) -> list[str]:
    """A Markdown table of what `benchmark.reliability` gave; none without records."""
    known = {name: own for name, own in by_name.items() if own}
    if not known:
        return []
    first = next(iter(known.values()))["bins"]
    head = [f"{100 * row['low']:.0f}–{100 * row['high']:.0f} %" for row in first]
    rows = [("estimated probability", *head, "mean gap")]
    for name, own in known.items():
        realised = (
            f"{100 * row['realised']:.0f}" if row["nodes"] else "-"
            for row in own["bins"]
        )
        rows.append((name, *realised, f"{100 * own['mean_gap']:.1f}"))
    words = "Nodes that came true, in %, by the drafter's estimate, of those whose "
    return ["", markdown(rows), "", words + "parent was reached.", ""]


_HEAD = (
    "shape",
    "tok/s",
    "× plain",
    "tokens/step",
    "acceptance by depth",
    "accepted by rank",
    "ms/step",
    "draft",
    "target",
    "rest",
    "memory",
)


def _row(name: str, f: dict[str, Any]) -> tuple[str, ...]:
    step = f["step"]
    return (
        name,
        _spread(f["tokens_per_second"], ".1f"),
        _spread(f["ratio_to_plain"], ".2f"),
        f"{f['tokens_per_step']:.2f}",
        percents(f["acceptance_by_depth"]),
        percents(f["acceptance_by_rank"]),
        f"{f['milliseconds_per_step']['median']:.2f}",
        f"{100 * step['draft_share']:.0f} %",
        f"{100 * step['target_share']:.0f} %",
        f"{100 * step['rest_share']:.1f} %",
        f"{100 * f['bandwidth_share']:.0f} %",
    )


def _curve_rows(curve: list[dict[str, Any]]):
    return [
        ("nodes verified", *(str(point["nodes"]) for point in curve)),
        ("ms", *(f"{1e3 * point['seconds']:.2f}" for point in curve)),
        ("× one node", *(f"{point['ratio']['median']:.2f}" for point in curve)),
    ]


def _spread(values: dict[str, float], form: str) -> str:
    middle, low, high = (format(values[k], form) for k in ("median", "min", "max"))
    return f"{middle} ({low}–{high})"
