"""The table of tree shapes that scripts/benchmark.py writes."""

from __future__ import annotations

from typing import Any

from treespec_jax.acceptance import compatibility
from treespec_jax.measurement import tables

_HEAD = (
    *("shape", "tok/s", "× plain", "tokens/step", "acceptance by depth"),
    *("accepted by rank", "ms/step", "draft", "target", "rest", "memory"),
)


def title(settings: dict[str, Any]) -> str:
    """The rule, the cascade if there is one, and whether both are lossless."""
    speculative = settings["speculative"]
    rule, cascade = speculative["rule"], speculative["cascade"]
    label = compatibility.label(rule, cascade, settings["engine"]["cache_dtype"])
    named = f", cascade {cascade} {speculative['alpha']:g}" if cascade else ""
    return f"rule {rule}{named} ({label})"


def table(results: dict[str, Any]) -> str:
    """Two Markdown tables and what they were measured on."""
    settings, shapes = results["settings"], results["shapes"]
    temperature = settings["sampling"]["temperature"]
    bandwidth = results["bandwidth"]
    whole = shapes["none"]["bandwidth_share_whole"]
    return "\n".join(
        [
            f"{title(settings)}, "
            f"{f'T={temperature:g}' if temperature else 'greedy'}, "
            + tables.conditions(results, settings["benchmark"]["rounds"]),
            f"target weights {results['target_weight_bytes'] / 1e6:.0f} MB, read "
            f"bandwidth {bandwidth['bytes_per_second'] / 1e9:.1f} GB/s "
            f"({bandwidth['method']})",
            "",
            tables.markdown([_HEAD, *(_row(n, f) for n, f in shapes.items())]),
            "",
            "Speeds are medians of rounds (min–max), ratios are paired within a round. "
            "Draft, target and rest are shares of a step; memory is weight bytes over "
            "the time of the target's pass, as a share of the read bandwidth.",
            *tables.reliability({n: f["reliability"] for n, f in shapes.items()}),
            "Plain decoding, all of its step included, reads weights at "
            f"{100 * whole:.0f} % of the bandwidth.",
            _verdict(results),
            "",
            tables.markdown(_curve_rows(results["cost_curve"])),
        ]
    )


def _verdict(results: dict[str, Any]) -> str:
    """How the texts compare with those of plain decoding."""
    unlike = {n: f["texts_unlike_plain"] for n, f in results["shapes"].items()}
    named = ", ".join(f"{name}: {count}" for name, count in unlike.items() if count)
    if not named:
        return "All shapes emitted the tokens of plain decoding."
    differ = f"TEXTS THAT DIFFER FROM PLAIN DECODING: {named}"
    return tables.verdict(results["settings"]) or differ


def _row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    step = figures["step"]
    return (
        name,
        tables.spread(figures["tokens_per_second"], ".1f"),
        tables.spread(figures["ratio_to_plain"], ".2f"),
        tables.spread(figures["tokens_per_step"], ".2f"),
        tables.percents(figures["acceptance_by_depth"]),
        tables.percents(figures["acceptance_by_rank"]),
        f"{figures['milliseconds_per_step']['median']:.2f}",
        f"{100 * step['draft_share']:.0f} %",
        f"{100 * step['target_share']:.0f} %",
        f"{100 * step['rest_share']:.1f} %",
        f"{100 * figures['bandwidth_share']:.0f} %",
    )


def _curve_rows(curve: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        ("nodes verified", *(str(point["nodes"]) for point in curve)),
        ("ms", *(f"{1e3 * point['seconds']:.2f}" for point in curve)),
        ("× one node", *(f"{point['ratio']['median']:.2f}" for point in curve)),
    ]
