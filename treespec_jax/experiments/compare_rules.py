"""Every rule on every tree at several temperatures, on one pair of models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treespec_jax.acceptance import compatibility
from treespec_jax.engine.stats import total
from treespec_jax.errors import UserError
from treespec_jax.experiments import models, output, plot, prompts, runtime
from treespec_jax.experiments.benchmark import Run, reliability, run_round, spread
from treespec_jax.experiments.output import say
from treespec_jax.experiments.report import reliability_lines
from treespec_jax.experiments.settings import Experiment, RuleComparison
from treespec_jax.experiments.table import markdown, percents
from treespec_jax.trees import shapes

# Rule and shape; plain decoding samples by the noise of the exact rule.
Combination = tuple[str, str]
PLAIN: Combination = ("exact", "none")


def run(settings: Experiment, comparison: RuleComparison, folder: str) -> None:
    """Measures everything and writes table, JSON and plot to `folder`.

    Raises:
      UserError: an unwritable folder, no rule that takes any of the trees, an
        unreadable prompt or checkpoint, or settings that do not fit together.
    """
    possible, refused = combinations(comparison)
    if not possible:
        raise UserError(f"no rule takes any of the trees: {refused[0]['reason']}")
    file = comparison.prompts
    texts = prompts.read(file) if file else list(prompts.STORIES)
    with output.folder(folder) as work:
        draw = plot.save_rules if output.can_plot() else None
        models.check(settings, texts, comparison.shapes)
        results = measure(settings, comparison, possible, texts)
        results["refused"] = refused
        shown = table(results)
        output.write(work, results, shown, draw)
    print(shown)
    print(f"\nwrote {Path(folder) / 'results.md'}, results.json beside it")


def combinations(
    comparison: RuleComparison,
) -> tuple[list[Combination], list[dict[str, str]]]:
    """What can be measured, and what a rule refuses, with its reason."""
    possible, refused = [], []
    for shape in comparison.shapes:
        for rule in comparison.rules:
            try:
                compatibility.choose_proposal(rule, "", shapes.parse(shape))
            except UserError as error:
                refused.append({"rule": rule, "shape": shape, "reason": str(error)})
            else:
                possible.append((rule, shape))
    return possible, refused


def measure(
    settings: Experiment,
    comparison: RuleComparison,
    possible: Sequence[Combination],
    texts: Sequence[str],
) -> dict[str, Any]:
    """All figures, as plain values for JSON."""
    pair = models.load_pair(settings)
    llms = {}
    for rule, shape in [PLAIN, *possible]:
        own = dataclasses.replace(settings, rule=rule, proposal="", tree=shape)
        llms[rule, shape] = models.make_llm(own, pair, shape, comparison.record)
    plain = llms[PLAIN]
    ids = models.encode(plain, texts, settings.sampling)
    for note in dict.fromkeys(note for llm in llms.values() for note in llm.notes):
        say(f"note: {note}")
    for (rule, shape), llm in llms.items():
        say(f"compiling {rule} on {shape}")
        models.warm_up(llm, ids)
    rounds: dict[float, list[dict[Combination, Run]]] = {}
    for number in range(comparison.repeat):
        for temperature in comparison.temperatures:
            say(
                f"round {number + 1} of {comparison.repeat}, temperature "
                f"{temperature:g}"
            )
            sampling = dataclasses.replace(
                settings.sampling,
                temperature=temperature,
                seed=(settings.sampling.seed + number * len(ids)) % 2**32,
            )
            now = dataclasses.replace(settings, sampling=sampling)
            done = run_round(now, llms, ids, number)
            rounds.setdefault(temperature, []).append(done)
    values = settings.as_dict()
    values["dtype"] = plain.dtype
    values["engine"] = dataclasses.asdict(plain.engine.config)
    for name in ("tree", "rule", "proposal", "benchmark"):
        del values[name]
    return {
        "settings": values,
        "comparison": dataclasses.asdict(comparison),
        "prompts": list(texts),
        "versions": runtime.versions(),
        "figures": [
            _summary(name, temperature, own)
            for temperature, own in rounds.items()
            for name in llms
        ],
    }


def _summary(
    name: Combination, temperature: float, rounds: Sequence[dict[Combination, Run]]
) -> dict[str, Any]:
    """Figures of one rule on one shape at one temperature."""
    rule, shape = name
    mine = [r[name].stats for r in rounds]
    whole = total(mine, 0.0, 0.0)
    speeds = [stats.tokens_per_second for stats in mine]
    plain = [r[PLAIN].stats.tokens_per_second for r in rounds]
    ratios = [a / b for a, b in zip(speeds, plain, strict=True)]
    return {
        "rule": rule,
        "shape": shape,
        "temperature": temperature,
        "lossless": compatibility.RULES[rule].lossless,
        "proposal": compatibility.RULES[rule].proposal[0] if name != PLAIN else None,
        "tokens": whole.tokens,
        "steps": whole.steps,
        "tokens_per_step": spread([stats.tokens_per_step for stats in mine]),
        "acceptance_by_depth": whole.acceptance_by_depth,
        "acceptance_by_rank": whole.acceptance_by_rank,
        "reliability": reliability([r[name] for r in rounds]),
        "tokens_per_second": spread(speeds),
        "ratio_to_plain": spread(ratios),
    }


def table(results: dict[str, Any]) -> str:
    """Markdown tables, who wins where in words, and what was refused."""
    figures, versions = results["figures"], results["versions"]
    comparison = results["comparison"]
    temperatures = comparison["temperatures"]
    sampling = results["settings"]["sampling"]
    by_name: dict[Combination, dict[float, dict[str, Any]]] = {}
    for one in figures:
        by_name.setdefault((one["rule"], one["shape"]), {})[one["temperature"]] = one
    speeds, accepted = [["shape", "rule", "distribution"]], [["shape", "rule"]]
    for temperature in temperatures:
        speeds[0] += [f"tokens/step T={temperature:g}", "tok/s", "× plain"]
        accepted[0] += [f"by depth T={temperature:g}", "by rank"]
    for (rule, shape), own in by_name.items():
        plain = (rule, shape) == PLAIN
        name = [shape, "-" if plain else rule]
        speeds.append([*name, compatibility.RULES[rule].label])
        accepted.append(name)
        for temperature in temperatures:
            one = own[temperature]
            speeds[-1] += [
                _spread(one["tokens_per_step"], ".2f"),
                _spread(one["tokens_per_second"], ".1f"),
                format(one["ratio_to_plain"]["median"], ".2f"),
            ]
            for what in ("acceptance_by_depth", "acceptance_by_rank"):
                accepted[-1].append(percents(one[what]))
    accepted = [row for row in accepted if row[0] != "none"]
    lines = [
        f"{results['settings']['dtype']}, {len(results['prompts'])} prompts × "
        f"{sampling['max_tokens']} tokens, batch "
        f"{results['settings']['engine']['max_batch']}, "
        f"{comparison['repeat']} rounds; jax {versions['jax']}, "
        f"{versions['device_kind']}, {versions['cpus']} CPUs",
        "",
        markdown(speeds),
        "",
        "Medians of rounds (min–max), ratios are paired within a round; each round has "
        "other seeds. At T=0 every rule keeps what plain decoding would emit.",
        "",
        markdown(accepted),
        "",
        "Steps that accepted a node at depth 1, 2, …, and accepted nodes by their rank "
        "among siblings.",
        *reliability_lines(
            {
                f"{f['rule']} {f['shape']} T={f['temperature']:g}": f["reliability"]
                for f in figures
            }
        ),
        "",
        *winners(results),
    ]
    for one in results["refused"]:
        lines.append(f"refused: {one['rule']} on {one['shape']}: {one['reason']}")
    return "\n".join(lines)


def winners(results: dict[str, Any]) -> list[str]:
    """A line per temperature and family of shapes, and one over all shapes.

    Lossless rules compete; the best lossy one is named behind them, as such.
    """
    figures = results["figures"]
    shapes_ = dict.fromkeys(f["shape"] for f in figures if f["shape"] != "none")
    families = dict.fromkeys(_family(shape) for shape in shapes_)
    lines = []
    for temperature in results["comparison"]["temperatures"]:
        now = [f for f in figures if f["temperature"] == temperature]
        plain = [f for f in now if f["shape"] == "none"]
        for family in families:
            own = [f for f in now if _family(f["shape"]) == family]
            lines.append(_winner(f"T={temperature:g}, {family}", own))
        if len(families) > 1:
            drafted = [f for f in now if f["shape"] != "none"]
            lines.append(_winner(f"T={temperature:g}, all", plain + drafted))
    return lines


def _family(shape: str) -> str:
    return shape.partition(":")[0]


def _winner(where: str, figures: list[dict[str, Any]]) -> str:
    said = []
    kinds = {
        "": [f for f in figures if f["lossless"]],
        "LOSSY: ": [f for f in figures if not f["lossless"]],
    }
    for kind, own in kinds.items():
        named = []
        for what, words in (
            ("tokens_per_step", "tokens/step"),
            ("tokens_per_second", "tok/s"),
        ):
            ranked = sorted(own, key=lambda f: f[what]["median"], reverse=True)
            if ranked:
                named.append(f"most {words} {_against_next(ranked, what)}")
        if named:
            said.append(kind + ", ".join(named))
    return f"{where}: " + "; ".join(said) + "."


def _against_next(ranked: list[dict[str, Any]], what: str) -> str:
    """The best of some figures, and how far the next rule is behind it."""
    first = ranked[0]
    text = f"{_named(first)} ({first[what]['median']:.2f}"
    other = next((f for f in ranked if f["rule"] != first["rule"]), None)
    if other is not None:
        gap = 1 - other[what]["median"] / first[what]["median"]
        text += f", {_named(other)} {100 * gap:.0f} % less"
    return text + ")"


def _named(figure: dict[str, Any]) -> str:
    if figure["shape"] == "none":
        return "plain decoding"
    return f"{figure['rule']} on {figure['shape']}"


def _spread(values: dict[str, float], form: str) -> str:
    middle, low, high = (format(values[k], form) for k in ("median", "min", "max"))
    return middle if low == high else f"{middle} ({low}–{high})"
