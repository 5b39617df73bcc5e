"""Results of scripts/benchmark.py: figures of a journal, and their tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from treespec_jax.drafting import METHODS
from treespec_jax.measurement import (
    breakdown,
    choices,
    spec_bench,
    suite_exactness,
    tables,
)
from treespec_jax.measurement.grid import ANSWER, PEER, STREAM, Combination
from treespec_jax.measurement.journal import Journal
from treespec_jax.measurement.spec_bench import OVERALL

_TASK_HEAD = (
    *("task", "method", "mean length", "acceptance rate", "tokens/step", "tok/s"),
    *("speed-up", "overall ratio", "first token ms", "inter-token ms p50", "p95"),
    "memory MB",
)
_ROUND_HEAD = (
    *("method", "decode tok/s", "× plain", "tokens/step", "acceptance by depth"),
    *("accepted by rank", "accepted by source"),
)
_STEP_HEAD = (
    *("method", "batch", "ms/step", "draft", "target", "rest"),
    *("bandwidth, target", "bandwidth, step"),
)


def results(
    journal: Journal, combinations: Sequence[Combination], details: Mapping[str, Any]
) -> dict[str, Any]:
    """All figures, as plain values for JSON.

    Args:
      journal: of a finished run.
      combinations: that it holds.
      details: further values to pass on.
    """
    answers, streams = map(journal.all, (ANSWER, STREAM))
    answers_of, streams_of = _by_combination(answers), _by_combination(streams)
    # Plain decoding by the first type of weights comes first.
    weights = combinations[0].weights
    several = any(combination.weights != weights for combination in combinations)

    def first(combination: Combination):
        if not several:
            return ()
        return answers_of[dataclasses.replace(combination.baseline, weights=weights)]

    figures = [
        {
            **dataclasses.asdict(combination),
            "label": combination.label,
            "tasks": spec_bench.by_task(
                answers_of[combination],
                answers_of[combination.baseline],
                streams_of.get(combination, ()),
                first(combination),
            ),
            "interrupted": _interrupted(answers_of[combination]),
        }
        for combination in combinations
    ]
    devices = [a["peak_device_bytes"] for a in answers]
    return {
        "settings": journal.header["in_force"],
        "versions": journal.header["versions"],
        **details,
        "figures": figures,
        "choices": choices.results({c: answers_of[c] for c in combinations}),
        "exactness": suite_exactness.results(journal),
        "breakdown": breakdown.results(journal),
        "peak_rss_bytes": max(a["peak_rss_bytes"] for a in answers),
        "peak_device_bytes": None if None in devices else max(devices),
    }


def _by_combination(lines) -> dict[Combination, list[dict[str, Any]]]:
    found: dict[Combination, list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(Combination.of(line), []).append(line)
    return found


def _interrupted(answers: Sequence[Mapping[str, Any]]) -> int:
    """Rounds in which a drafter lost what it had learnt, as its process ended."""
    method = METHODS.get(answers[0]["method"])
    if method is None or method.needs_model or method.tree == "none":
        return 0
    processes: dict[int, set[str]] = {}
    for answer in answers:
        processes.setdefault(answer["round"], set()).add(answer["process"])
    return sum(len(found) > 1 for found in processes.values())


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a table by task, spreads over the rounds, parts of a step."""
    lines = [conditions(results), ""]
    for (temperature, batch), figures in groups(results).items():
        lines += [f"### T={temperature:g}, batch {batch}", ""]
        if len(figures[0]["tasks"]) > 2:
            lines += [tables.markdown(_speed_up_rows(figures)), ""]
        lines += [tables.markdown([_TASK_HEAD, *_task_rows(figures)], words=2), ""]
        lines += [tables.markdown(_round_rows(figures)), ""]
    lines += choices.lines(results["choices"])
    lines += [_LEGEND, "", _memory(results)]
    lines += tables.reliability(
        {
            str(Combination.of(f)): f["tasks"][OVERALL]["reliability"]
            for f in results["figures"]
        }
    )
    if results["breakdown"]:
        lines += ["", *_breakdown_lines(results["breakdown"])]
    lines += ["", *suite_exactness.lines(results["exactness"])]
    lines += verdicts(results["figures"])
    lines += [
        f"{Combination.of(f)}: a drafter that learns from earlier texts lost them "
        f"within {f['interrupted']} rounds, as the run was interrupted"
        for f in results["figures"]
        if f["interrupted"]
    ]
    lines += [f"skipped: {s['what']}: {s['reason']}" for s in results["skipped"]]
    if results["left_out"]:
        ids = ", ".join(results["left_out"])
        lines.append(f"left out, too long for max_len: {ids}")
    return "\n".join(lines)


_LEGEND = (
    "Speeds are medians of rounds (min–max), ratios are paired within a round. tok/s "
    "is the mean over questions of tokens per second, prefill included; speed-up and "
    "overall ratio are over plain decoding. docs/benchmark.md defines every column."
)


def conditions(results: Mapping[str, Any]) -> str:
    """What was measured, and on what, in words."""
    settings, versions = results["settings"], results["versions"]
    suite, weights = results["suite"], settings["benchmark"]["weights"]
    if len(weights) > 1:
        settings = {**settings, "weights": " / ".join(weights)}
    return (
        f"suite {suite['name']}, {suite['questions']} questions, "
        f"{settings['sampling']['max_tokens']} tokens a turn at most, "
        f"{settings['benchmark']['rounds']} rounds; {tables.types_in_force(settings)}; "
        f"jax {versions['jax']}, {versions['device_kind']}, {versions['cpus']} CPUs"
    )


def groups(results: Mapping[str, Any]) -> dict[tuple[float, int], list[Any]]:
    """Figures by temperature and batch size."""
    found: dict[tuple[float, int], list[Any]] = {}
    for figure in results["figures"]:
        key = figure["temperature"], figure["batch"]
        found.setdefault(key, []).append(figure)
    return found


def shown_tasks(figure: Mapping[str, Any]) -> list[str]:
    """Tasks worth a row: all questions once, if they are of one category."""
    tasks = list(figure["tasks"])
    return tasks if len(tasks) > 2 else tasks[:1]


def _speed_up_rows(figures) -> list[Sequence[str]]:
    """Spec-Bench's own table: a row per method, a column per task."""
    tasks = list(figures[0]["tasks"])
    rows: list[Sequence[str]] = [("speed-up", *tasks, "tokens/step")]
    for figure in figures:
        ratios = (figure["tasks"][task]["speed_up"]["median"] for task in tasks)
        mean = figure["tasks"][OVERALL]["tokens_per_step"]
        rows.append((figure["label"], *(f"{r:.2f}" for r in ratios), f"{mean:.2f}"))
    return rows


def _task_rows(figures) -> list[Sequence[str]]:
    rows = []
    for task in shown_tasks(figures[0]):
        for number, figure in enumerate(figures):
            values = figure["tasks"][task]
            rows.append(("" if number else task, figure["label"], *_task_cells(values)))
    return rows


def _task_cells(values: Mapping[str, Any]) -> tuple[str, ...]:
    rate, memory = values["acceptance_rate"], values["memory_bytes"]
    return (
        f"{values['mean_length']:.1f}",
        "-" if rate is None else f"{100 * rate:.0f} %",
        f"{values['tokens_per_step']:.2f}",
        f"{values['tokens_per_second']['median']:.1f}",
        tables.spread(values["speed_up"], ".2f"),
        f"{values['overall_ratio']['median']:.2f}",
        *(
            "-" if values[name] is None else f"{1e3 * values[name]:.1f}"
            for name in ("first_token_seconds", "inter_token_p50", "inter_token_p95")
        ),
        "-" if memory is None else f"{memory / 1e6:.0f}",
    )


def _round_rows(figures) -> list[Sequence[str]]:
    """With a column more where there are several types of weights."""
    names, head = ["decode_ratio"], list(_ROUND_HEAD)
    if any(figure["tasks"][OVERALL]["decode_ratio_first"] for figure in figures):
        names.append("decode_ratio_first")
        head.insert(3, f"× {figures[0]['weights']} plain")
    return [
        head,
        *(_round_row(f["label"], f["tasks"][OVERALL], names) for f in figures),
    ]


def _round_row(
    label: str, values: Mapping[str, Any], ratios: Sequence[str]
) -> tuple[str, ...]:
    speed = values["decode_tokens_per_second"]
    found = (values[name] for name in ratios)
    return (
        label,
        tables.spread(speed, ".1f") if speed else "-",
        *(tables.spread(ratio, ".2f") if ratio else "-" for ratio in found),
        f"{values['tokens_per_step']:.2f}",
        tables.percents(values["acceptance_by_depth"]),
        tables.percents(values["acceptance_by_rank"]),
        tables.shares(values["accepted_by_source"]),
    )


def _breakdown_lines(found: Mapping[str, Any]) -> list[str]:
    bandwidth = found["bandwidth"]
    rows = [_STEP_HEAD, *map(_step_row, found["steps"])]
    lines = [
        "### Parts of a step",
        "",
        f"target weights {_megabytes(found['steps'])}, read bandwidth "
        f"{bandwidth['bytes_per_second'] / 1e9:.1f} GB/s ({bandwidth['method']})",
        "",
        tables.markdown(rows),
        "",
        "Draft, target and rest are shares of a step. Bandwidth is weight bytes over "
        "the time of the target's pass, or of the whole step, as a share of what is "
        "read at best.",
    ]
    for curve in found["cost_curves"]:
        points = curve["points"]
        table = [
            ("nodes verified", *(str(point["nodes"]) for point in points)),
            ("ms", *(f"{1e3 * point['seconds']:.2f}" for point in points)),
            ("× one node", *(f"{point['ratio']['median']:.2f}" for point in points)),
        ]
        title = f"{curve['weights']} batch {curve['batch']}:".lstrip()
        lines += ["", title, "", tables.markdown(table)]
    return lines


def _megabytes(steps: Sequence[Mapping[str, Any]]) -> str:
    sizes = {step["weights"]: step["target_weight_bytes"] for step in steps}
    parts = (f"{size / 1e6:.0f} MB {kind}".rstrip() for kind, size in sizes.items())
    return ", ".join(parts)


def _step_row(step: Mapping[str, Any]) -> tuple[str, ...]:
    names = (step[name] for name in ("method", "shape", "rule"))
    return (
        Combination(*names, 0.0, step["batch"], step["weights"]).label,
        str(step["batch"]),
        f"{1e3 * step['step']:.2f}",
        f"{100 * step['draft_share']:.0f} %",
        f"{100 * step['target_share']:.0f} %",
        f"{100 * step['rest_share']:.1f} %",
        f"{100 * step['bandwidth_share']:.0f} %",
        f"{100 * step['bandwidth_share_whole']:.0f} %",
    )


def _memory(results: Mapping[str, Any]) -> str:
    text = f"Peak resident memory of the run {results['peak_rss_bytes'] / 1e6:.0f} MB"
    if results["peak_device_bytes"] is not None:
        text += f", peak device memory {results['peak_device_bytes'] / 1e6:.0f} MB"
    return text + "."


def verdicts(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """How texts compare with those of plain decoding, in lines of words."""
    differ, other = [], {True: [], False: []}
    for figure in figures:
        values = figure["tasks"][OVERALL]
        name, count = str(Combination.of(figure)), values["texts_unlike_plain"]
        if keeps_text(figure, values["lossless"]):
            differ += [f"{name}: {count}"] if count else []
        elif figure["method"] not in (PEER, "none"):
            other[values["lossless"]].append(name)
    lines = []
    if differ:
        lines.append(f"TEXTS THAT DIFFER FROM PLAIN DECODING: {'; '.join(differ)}")
    else:
        lines.append("Whatever keeps the text emitted the tokens of plain decoding.")
    if other[True]:
        names = "; ".join(other[True])
        lines.append(f"Different text, same distribution (lossless): {names}.")
    if other[False]:
        lines.append(f"LOSSY: {'; '.join(other[False])}.")
    peers = {
        str(Combination.of(f)): f["tasks"][OVERALL]["texts_unlike_plain"]
        for f in figures
        if f["method"] == PEER and f["temperature"] == 0
    }
    lines += [f"{name}: {count} greedy texts differ" for name, count in peers.items()]
    return lines


def keeps_text(figure: Mapping[str, Any], lossless: bool) -> bool:
    """Whether the very text of plain decoding is promised."""
    if figure["method"] == PEER or not lossless:
        return False
    return figure["rule"] == "exact" or figure["temperature"] == 0
