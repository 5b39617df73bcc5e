"""Results as text: tables, spreads, and what they were measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from treespec_jax import adaptive


def aligned(rows: Sequence[Sequence[str]], gap: str = "  ") -> str:
    """Columns padded to equal width; the first is left-aligned, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(gap.join(_padded(row, widths, 1)).rstrip() for row in rows)


def markdown(rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table, readable as it stands; the first row is the head.

    Args:
      rows: texts, equally many in each.
      words: columns, from the first, that are left-aligned.
    """
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    rule = [
        "-" * width if i < words else "-" * (width - 1) + ":"
        for i, width in enumerate(widths)
    ]
    lines = [_padded(row, widths, words) for row in [rows[0], rule, *rows[1:]]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _padded(row: Sequence[str], widths: Sequence[int], words: int) -> list[str]:
    """The cells of a row: the first `words` are left-aligned, the others right."""
    return [
        cell.ljust(width) if i < words else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def percents(shares: Sequence[float]) -> str:
    """Acceptance by depth as "74 55 41 %"."""
    if not shares:
        return "-"
    return " ".join(f"{100 * share:.0f}" for share in shares) + " %"


def shares(counts: Mapping[str, int]) -> str:
    """Counts by name as "recycle 60 %, suffix 40 %"; names without any are left out."""
    total = sum(counts.values())
    named = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{n} {100 * c / total:.0f} %" for n, c in named if c) or "-"


def spread(values: Mapping[str, float], form: str, scale: float = 1) -> str:
    """What `timing.spread` gave, as "3.1 (2.9–3.4)"; without extremes if all agree."""
    middle, low, high = (
        format(scale * values[name], form) for name in ("median", "min", "max")
    )
    return middle if low == high else f"{middle} ({low}–{high})"


def types_in_force(settings: Mapping[str, Any]) -> str:
    """The dtype of computation, and those of weights and cache where they differ."""
    dtype, cache = settings["dtype"], settings["engine"]["cache_dtype"]
    weights = settings.get("weights", dtype)
    return (
        dtype
        + (f", {weights} weights" if weights != dtype else "")
        + (f", {cache} cache" if cache != dtype else "")
    )


def conditions(results: Mapping[str, Any], rounds: int) -> str:
    """What generation was measured on: dtype, prompts, batch, versions and machine."""
    settings, versions = results["settings"], results["versions"]
    return (
        types_in_force(settings) + f", {len(results['prompts'])} prompts × "
        f"{settings['sampling']['max_tokens']} tokens, batch "
        f"{settings['engine']['max_batch']}, {rounds} rounds; jax {versions['jax']}, "
        f"{versions['device_kind']}, {versions['cpus']} CPUs"
    )


def verdict(settings: Mapping[str, Any]) -> str | None:
    """How texts compare with plain decoding, where they may differ; else None."""
    # Not above, so that tables without it start without numpy.
    from treespec_jax.acceptance import compatibility

    spec = settings["speculative"]
    given = settings["sampling"]
    sampled = spec["rule"] != "exact" and given["temperature"] > 0
    policy = adaptive.parse("", given.get("adaptive_temperature", ""))
    if policy is not None and policy.by_tree:
        return "Different text, LOSSY."
    if not sampled and not spec["cascade"]:
        return None
    lossless = compatibility.label(spec["rule"], spec["cascade"]) == "lossless"
    return f"Different text, {'same distribution (lossless)' if lossless else 'LOSSY'}."


def reliability(by_name: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """A Markdown table of what `rounds.reliability` gave; none without records."""
    known = {name: figures for name, figures in by_name.items() if figures}
    if not known:
        return []
    bins = next(iter(known.values()))["bins"]
    head = [f"{100 * row['low']:.0f}–{100 * row['high']:.0f} %" for row in bins]
    rows = [("estimated probability", *head, "mean gap")]
    for name, figures in known.items():
        realised = (
            f"{100 * row['realised']:.0f}" if row["nodes"] else "-"
            for row in figures["bins"]
        )
        rows.append((name, *realised, f"{100 * figures['mean_gap']:.1f}"))
    words = "Nodes that came true, in %, by the drafter's estimate, of those whose "
    return ["", markdown(rows), "", words + "parent was reached.", ""]
