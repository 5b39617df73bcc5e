"""Compares tree shapes on one pair of models, all in one process and in turn."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treespec_jax.acceptance import compatibility
from treespec_jax.engine.stats import Stats, total
from treespec_jax.experiments import (
    costs,
    models,
    output,
    plot,
    prompts,
    report,
    runtime,
)
from treespec_jax.experiments.bandwidth import ReadBandwidth
from treespec_jax.experiments.output import say
from treespec_jax.experiments.settings import Experiment
from treespec_jax.trees import shapes
from treespec_jax.tuning import calibration
from treespec_jax.tuning.calibration import TreeRecord

# Measurements of each program in the breakdown of a step.
_COST_ROUNDS = 7


@dataclasses.dataclass
class Run:
    """What one shape did in one round.

    Attributes:
      stats: summed over the prompts; decoding by the clock on the wall.
      wall_steps: steps that ran, a step of a batch counted once.
      token_ids: of every prompt.
      records: of every drafted tree, if they are kept.
    """

    stats: Stats
    wall_steps: int
    token_ids: list[list[int]]
    records: list[TreeRecord]


def run(settings: Experiment, folder: str) -> None:
    """Measures everything and writes table, JSON and plot to `folder`.

    Raises:
      UserError: an unwritable folder, a rule that does not fit a shape, an unreadable
        prompt or checkpoint, or settings that do not fit together.
    """
    for name in settings.benchmark.shapes:
        if shapes.parse(name).depth:
            compatibility.choose_proposal(
                settings.rule, settings.proposal, shapes.parse(name), settings.cascade
            )
    file = settings.benchmark.prompts
    texts = prompts.read(file) if file else list(prompts.STORIES)
    with output.folder(folder) as work:
        draw = plot.save if output.can_plot() else None
        results = measure(settings, texts)
        table = report.table(results)
        output.write(work, results, table, draw)
    print(table)
    print(f"\nwrote {Path(folder) / 'results.md'}, results.json beside it")


def measure(settings: Experiment, texts: Sequence[str]) -> dict[str, Any]:
    """All figures, as plain values for JSON."""
    names = settings.benchmark.shapes
    pair = models.load_pair(settings)
    llms = {}
    for name in names:
        record = settings.benchmark.record
        llms[name] = models.make_llm(settings, pair, name, record)
        ids = models.encode(llms[name], texts, settings.sampling)
    for note in dict.fromkeys(note for llm in llms.values() for note in llm.notes):
        say(f"note: {note}")
    for name in names:
        say(f"compiling {name}")
        models.warm_up(llms[name], ids)
    bandwidth = ReadBandwidth()
    bandwidth.sample()
    rounds = []
    for number in range(settings.benchmark.repeat):
        say(f"round {number + 1} of {settings.benchmark.repeat}")
        rounds.append(run_round(settings, llms, ids, number))
        bandwidth.sample()
    broken_down = {}
    for name in names:
        say(f"taking {name} apart")
        prefix = _prefix(llms[name], ids[0], rounds[0]["none"].token_ids[0])
        broken_down[name] = costs.step_cost(
            llms[name].engine,
            pair.target.model,
            shapes.parse(name),
            prefix,
            settings.sampling,
            _COST_ROUNDS,
        )
        bandwidth.sample()
    say("cost of verifying more nodes")
    engine = llms["none"].engine.config
    length = min(len(ids[0]) + settings.sampling.max_tokens // 2, engine.max_len - 1)
    curve = costs.cost_curve(pair.target.model, engine, length, _COST_ROUNDS)
    bandwidth.sample()
    weights = costs.weight_bytes(pair.target.model)
    values = settings.as_dict()
    values["dtype"] = llms["none"].dtype
    values["engine"] = dataclasses.asdict(engine)
    del values["tree"]
    return {
        "settings": values,
        "prompts": list(texts),
        "versions": runtime.versions(),
        "target_weight_bytes": weights,
        "bandwidth": {
            "bytes_per_second": bandwidth.best,
            "method": bandwidth.method,
            "samples": bandwidth.samples,
        },
        "shapes": {
            name: summarise(name, rounds, broken_down[name], weights / bandwidth.best)
            for name in names
        },
        "cost_curve": _curve(curve),
    }


def run_round(settings: Experiment, llms, ids, number: int) -> dict[str, Run]:
    """Every shape on every prompt; who comes first changes from prompt to prompt."""
    names = list(llms)
    batch = settings.engine.max_batch
    params = models.seeded(settings.sampling, len(ids))
    parts = {name: [] for name in names}
    for turn, start in enumerate(range(0, len(ids), batch)):
        at = (number + turn) % len(names)
        some = slice(start, start + batch)
        for name in names[at:] + names[:at]:
            parts[name].append(models.decode(llms[name], ids[some], params[some]))
    return {name: _joined(*zip(*pairs, strict=True)) for name, pairs in parts.items()}


def _joined(generations, seconds) -> Run:
    completions = [c for generation in generations for c in generation]
    return Run(
        stats=total(
            [c.stats for c in completions],
            sum(g.stats.prefill_seconds for g in generations),
            sum(seconds),
        ),
        wall_steps=sum(max(c.stats.steps for c in g) for g in generations),
        token_ids=[c.token_ids for c in completions],
        records=[record for c in completions for record in c.records],
    )


def summarise(
    name: str,
    rounds: Sequence[dict[str, Run]],
    cost: costs.StepCost,
    read_seconds: float,
) -> dict[str, Any]:
    """Figures of one shape.

    Args:
      name: of the shape.
      rounds: all of them, with plain decoding.
      cost: of one step.
      read_seconds: that reading the weights once takes at full bandwidth.
    """
    mine, plain = [r[name] for r in rounds], [r["none"] for r in rounds]
    speeds = [r.stats.tokens_per_second for r in mine]
    ratios = [s / p.stats.tokens_per_second for s, p in zip(speeds, plain, strict=True)]
    step_ms = [1e3 * r.stats.decode_seconds / r.wall_steps for r in mine]
    stats = mine[0].stats
    differing = sum(
        a != b for a, b in zip(mine[0].token_ids, plain[0].token_ids, strict=True)
    )
    figures = {
        "tokens_per_second": spread(speeds),
        "ratio_to_plain": spread(ratios),
        "milliseconds_per_step": spread(step_ms),
        "prefill_seconds": spread([r.stats.prefill_seconds for r in mine]),
        "tokens": stats.tokens,
        "steps": stats.steps,
        "nodes_per_step": stats.nodes,
        "tokens_per_step": stats.tokens_per_step,
        "acceptance_by_depth": stats.acceptance_by_depth,
        "acceptance_by_rank": stats.acceptance_by_rank,
        "reliability": reliability(mine),
        "texts_unlike_plain": differing,
        "step": dataclasses.asdict(cost),
        "bandwidth_share": read_seconds / cost.target,
    }
    if name == "none":
        figures["bandwidth_share_whole"] = read_seconds / (
            statistics.median(step_ms) / 1e3
        )
    return figures


def reliability(runs: Sequence[Run]) -> dict[str, Any] | None:
    """How often the drafter's estimates came true; None without records."""
    records = [record for run in runs for record in run.records]
    if not any(len(record.parents) > 1 for record in records):
        return None
    rows = calibration.reliability(records)
    return {"bins": rows, "mean_gap": calibration.error(rows)}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and extremes of the rounds, and the rounds."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "rounds": list(values),
    }


def _curve(seconds: dict[int, list[float]]) -> list[dict[str, Any]]:
    return [
        {
            "nodes": nodes,
            "seconds": statistics.median(own),
            "ratio": spread([a / b for a, b in zip(own, seconds[1], strict=True)]),
        }
        for nodes, own in seconds.items()
    ]


def _prefix(llm, prompt: Sequence[int], emitted: Sequence[int]) -> list[int]:
    """The middle of a text that a dispatch still fits behind."""
    config = llm.engine.config
    room = config.max_len - 1 - config.steps_per_dispatch * (llm.drafter.depth + 1)
    text = [*prompt, *emitted[: len(emitted) // 2]]
    return text[: max(1, room)]
