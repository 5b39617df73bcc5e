"""What fixed trees should bring, and tables of it beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from treespec_jax.measurement import tables
from treespec_jax.trees.topology import Topology, regular
from treespec_jax.tuning import theory
from treespec_jax.tuning.theory import Acceptance, Costs

# Nodes of the rows of `found`; the rest is in the file.
_SIZES = (1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 63, 127, 255, 511, 1023)


def predict(topology: Topology, acceptance: Acceptance, costs: Costs) -> dict[str, Any]:
    """Predictions for a tree, as plain values for JSON.

    `tokens_error` is the standard error that the count of acceptance leaves;
    `closed` holds the closed forms where they apply, for trees of one branching.
    """
    tokens = theory.expected_tokens(topology, acceptance)
    probability = theory.node_probabilities(topology, acceptance)
    return {
        "nodes": topology.num_nodes - 1,
        "depth": topology.depth,
        "tokens": tokens,
        "tokens_error": standard_error(topology, acceptance),
        "milliseconds": 1e3 * costs.step(topology),
        "speedup": costs.speedup(topology, tokens),
        "deepest": float(probability[topology.level(topology.depth)].sum()),
        "closed": _closed(topology, acceptance),
    }


def standard_error(topology: Topology, acceptance: Acceptance) -> float:
    """Of the expected tokens, by the number of steps that acceptance was counted on."""
    steps = max(1, acceptance.families[0])
    return theory.deviation(topology, acceptance) / steps**0.5


def _closed(topology: Topology, acceptance: Acceptance) -> dict[str, float] | None:
    """Closed forms at one alpha: the mean rate of the ranks that the tree has."""
    depth, branching = topology.depth, len(topology.level(1))
    if topology != regular((branching,) * depth):
        return None
    alpha = float(acceptance.array(depth, branching).mean())
    return {
        "alpha": alpha,
        "textbook": theory.textbook_survival(alpha, branching, depth),
        "independent": theory.survival(alpha, branching, depth),
        "tokens": theory.regular_tokens(alpha, branching, depth),
    }


def predictions(results: Mapping[str, Any]) -> str:
    """Markdown: acceptance, tokens and times of every tree, and the closed forms."""
    figures = results["figures"]
    return "\n".join(
        [
            _conditions(results),
            "",
            *acceptance_table(results["acceptance"]),
            "",
            tables.markdown(_tokens(figures, results["plain"])),
            "",
            "Predicted / measured (error). Tokens per step by acceptance (± the "
            "standard error of its count), speed-up by acceptance and costs.",
            *_closed_table(figures),
        ]
    )


def _tokens(figures: Sequence[Mapping[str, Any]], plain) -> list[list[str]]:
    rows = [["shape", "nodes", "tokens/step", "ms/step", "speed-up"]]
    both = beside(plain["predicted"], plain["milliseconds_per_step"]["median"])
    rows.append(["none", "0", "1.00", both, "1.00"])
    for figure in figures:
        measured = figure["measured"]
        tokens = beside(
            figure["tokens"],
            measured["tokens_per_step"]["median"],
            figure["tokens_error"],
        )
        milliseconds = measured["milliseconds_per_step"]["median"]
        rows.append(
            [
                figure["shape"],
                str(figure["nodes"]),
                tokens,
                beside(figure["milliseconds"], milliseconds),
                beside(figure["speedup"], measured["ratio_to_plain"]["median"]),
            ]
        )
    return rows


def beside(predicted: float, measured: float, error: float | None = None) -> str:
    """For example "3.10 ± 0.04 / 3.00 (+3.3 %)"."""
    shown = f"{predicted:.2f}" + ("" if error is None else f" ± {error:.2f}")
    return f"{shown} / {measured:.2f} ({100 * (predicted / measured - 1):+.1f} %)"


def _closed_table(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [["shape", "alpha", "1-(1-α^D)^(B^D)", "independent nodes"]]
    rows[0] += ["by depth and rank", "measured"]
    for figure in figures:
        closed = figure["closed"]
        if closed:
            by_depth = figure["measured"]["acceptance_by_depth"]
            deepest = dict(enumerate(by_depth, 1)).get(figure["depth"], 0.0)
            values = *closed.values(), figure["deepest"], deepest
            alpha, textbook, independent, _, ours, measured = values
            shown = alpha, textbook, independent, ours, measured
            rows.append([figure["shape"], *(f"{value:.3f}" for value in shown)])
    if not rows[1:]:
        return []
    words = "Probability that a path is accepted down to the last level; alpha is the "
    words += "mean rate of the tree's ranks. The first formula takes all paths for "
    words += "independent, the second all nodes; siblings really exclude each other."
    return ["", tables.markdown(rows), "", words]


def acceptance_table(acceptance: Mapping[str, Any]) -> list[str]:
    """Markdown: rates in percent by depth and rank."""
    rates, families = acceptance["rates"], acceptance["families"]
    rows = [["child of a node at depth", *(f"rank {r}" for r in range(len(rates[0])))]]
    rows[0].append("families")
    for depth, (row, count) in enumerate(zip(rates, families, strict=True)):
        rows.append([str(depth), *(f"{100 * rate:.1f}" for rate in row), str(count)])
    return [tables.markdown(rows), "", "Accepted children, in % of accepted parents."]


def found(results: Mapping[str, Any]) -> str:
    """Markdown: acceptance, the best trees by their size, and the best of all."""
    rows = [["nodes", "depth", "tokens/step", "ms/step", "speed-up"]]
    listed = [one for one in results["by_nodes"] if one["nodes"] in _SIZES]
    for one in listed or results["by_nodes"]:
        rows.append([str(one["nodes"]), str(one["depth"]), f"{one['tokens']:.2f}"])
        seconds, speedup = one["seconds"], one["speedup"]
        rows[-1].append("-" if seconds is None else f"{1e3 * seconds:.2f}")
        rows[-1].append("-" if speedup is None else f"{speedup:.2f}")
    tokens = f"{results['tokens']:.2f} tokens per step"
    lines = [
        _conditions(results),
        "",
        *acceptance_table(results["acceptance"]),
        "",
        tables.markdown(rows),
        "",
        f"Best: {results['tree']}, {results['nodes']} nodes, {tokens}",
    ]
    if results["speedup"] is not None:
        lines[-1] += f", {results['speedup']:.2f} times plain decoding"
    measured = results["measured"]
    if measured:
        both = beside(
            results["held_out"],
            measured["tokens_per_step"]["median"],
            results["tokens_error"],
        )
        lines += ["", f"Predicted / measured tokens per step: {both}"]
        if results["speedup"] is not None:
            speedup = results["speedup"] * results["held_out"] / results["tokens"]
            both = beside(speedup, measured["ratio_to_plain"]["median"])
            lines.append(f"Predicted / measured speed-up: {both}")
    return "\n".join(lines)


def _conditions(results: Mapping[str, Any]) -> str:
    settings, versions = results["settings"], results["versions"]
    sampling, batch = settings["sampling"], settings["engine"]["max_batch"]
    return (
        f"{settings['dtype']}, {settings['speculative']['method']}, "
        f"T={sampling['temperature']:g}, batch {batch}, {results['prompts']} prompts × "
        f"{sampling['max_tokens']} tokens, {results['rounds']} rounds, each half of "
        "the prompts predicted by the other; "
        f"jax {versions['jax']}, {versions['device_kind']}, {versions['cpus']} CPUs"
    )
