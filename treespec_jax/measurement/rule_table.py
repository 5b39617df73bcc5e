"""The tables of acceptance rules that scripts/compare_rules.py writes."""

from __future__ import annotations

from typing import Any

from treespec_jax.measurement import tables


def table(results: dict[str, Any]) -> str:
    """Markdown tables: speeds, acceptance, who wins where; and what was refused."""
    figures, comparison = results["figures"], results["comparison"]
    refused = results["refused"]
    lines = [
        tables.conditions(results, comparison["rounds"]),
        "",
        tables.markdown(_speeds(figures, comparison["temperatures"])),
        "",
        "Medians of rounds (min–max), ratios are paired within a round; each round has "
        "other seeds. At T=0 a lossless rule emits the tokens of plain decoding.",
        "",
        tables.markdown(_accepted(figures, comparison["temperatures"])),
        "",
        "Steps that accepted a node at depth 1, 2, …, and accepted nodes by their rank "
        "among siblings.",
        *tables.reliability(
            {
                f"{f['rule']} {f['shape']} T={f['temperature']:g}": f["reliability"]
                for f in figures
            }
        ),
        "",
        tables.markdown(winners(results), words=3),
        "",
        *(f"refused: {r['rule']} on {r['shape']}: {r['reason']}" for r in refused),
    ]
    return "\n".join(lines)


def _speeds(figures, temperatures) -> list[list[str]]:
    rows = [["shape", "rule", "distribution"]]
    for temperature in temperatures:
        rows[0] += [f"tokens/step T={temperature:g}", "tok/s", "× plain"]
    for (rule, shape), by_temperature in _by_name(figures).items():
        lossless = all(f["lossless"] for f in by_temperature.values())
        label = "lossless" if lossless else "lossy"
        rows.append([shape, "-" if shape == "none" else rule, label])
        for temperature in temperatures:
            figure = by_temperature[temperature]
            rows[-1] += [
                tables.spread(figure["tokens_per_step"], ".2f"),
                tables.spread(figure["tokens_per_second"], ".1f"),
                format(figure["ratio_to_plain"]["median"], ".2f"),
            ]
    return rows


def _accepted(figures, temperatures) -> list[list[str]]:
    rows = [["shape", "rule"]]
    for temperature in temperatures:
        rows[0] += [f"by depth T={temperature:g}", "by rank"]
    for (rule, shape), by_temperature in _by_name(figures).items():
        if shape == "none":
            continue
        rows.append([shape, rule])
        for temperature in temperatures:
            for what in ("acceptance_by_depth", "acceptance_by_rank"):
                rows[-1].append(tables.percents(by_temperature[temperature][what]))
    return rows


def _by_name(figures) -> dict[tuple[str, str], dict[float, dict[str, Any]]]:
    """Figures by rule and shape, then by temperature."""
    found: dict[tuple[str, str], dict[float, dict[str, Any]]] = {}
    for figure in figures:
        name = figure["rule"], figure["shape"]
        found.setdefault(name, {})[figure["temperature"]] = figure
    return found


def winners(results: dict[str, Any]) -> list[list[str]]:
    """A row per temperature, family of shapes and kind of rule, below a head.

    Lossless rules compete with each other, and lossy ones.
    """
    names = {"tokens_per_step": "tokens/step", "tokens_per_second": "tok/s"}
    rows = [["temperature", "shapes", "distribution"]]
    for name in names.values():
        rows[0] += [f"most {name}", "", "next rule", ""]
    for temperature in results["comparison"]["temperatures"]:
        figures = [f for f in results["figures"] if f["temperature"] == temperature]
        drafted = [f for f in figures if f["shape"] != "none"]
        groups = {}
        for figure in drafted:
            groups.setdefault(_family(figure), []).append(figure)
        if len(groups) > 1:
            groups["all"] = figures
        for family, members in groups.items():
            for kind, lossless in {"lossless": True, "LOSSY": False}.items():
                rivals = [f for f in members if f["lossless"] == lossless]
                if rivals:
                    row = [f"{temperature:g}", family, kind]
                    for what in names:
                        row += _against_next(rivals, what)
                    rows.append(row)
    return rows


def _family(figure: dict[str, Any]) -> str:
    return figure["shape"].partition(":")[0]


def _against_next(figures: list[dict[str, Any]], what: str) -> list[str]:
    """The best of some figures, and how far the next rule is behind it."""
    first, *others = sorted(figures, key=lambda f: f[what]["median"], reverse=True)
    cells = [_named(first), f"{first[what]['median']:.2f}"]
    other = next((f for f in others if f["rule"] != first["rule"]), None)
    if other is None:
        return [*cells, "-", "-"]
    gap = 1 - other[what]["median"] / first[what]["median"]
    return [*cells, _named(other), f"−{100 * gap:.0f} %"]


def _named(figure: dict[str, Any]) -> str:
    if figure["shape"] == "none":
        return "plain decoding"
    return f"{figure['rule']} on {figure['shape']}"
