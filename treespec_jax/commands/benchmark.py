"""Compares tree shapes on one pair of models; writes a table, JSON and a plot.

All shapes run in one process and in turn.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import Any

from treespec_jax.commands import flags, loading, prompts, runtime, setting_flags
from treespec_jax.commands.settings import Experiment
from treespec_jax.errors import UserError
from treespec_jax.measurement.output import Study, say

# Measurements of each program in the breakdown of a step.
_COST_ROUNDS = 7
_SETTINGS = setting_flags.SettingFlags(
    more=("benchmark",),
    defaults={"engine.max_batch": 1},
    without=("speculative.tree", "sampling.ignore_eos"),
)


def define() -> None:
    _SETTINGS.define()
    flags.define("output", "compilation_cache")


def main(given) -> None:
    settings = _SETTINGS.experiment()
    variants = {name: settings.with_tree(name) for name in settings.benchmark.shapes}
    for name, variant in variants.items():
        if variant.plain and name != "none":
            raise UserError("method 'none' grows no trees; take --shapes=none with it")
    needs_drafter = any(variant.needs_drafter for variant in variants.values())
    settings = settings.with_paths(needs_drafter)
    texts = prompts.read_or_stories(settings.benchmark.prompts_file)

    # Heavy imports only now, so that a bad flag answers at once.
    runtime.set_up(given.compilation_cache)
    from treespec_jax.measurement import plots, shape_table

    measured = functools.partial(measure, settings, texts)
    Study(measured, shape_table.table, plots.save_shapes).carry_out(given.output)


def measure(settings: Experiment, texts: Sequence[str]) -> dict[str, Any]:
    """All figures, as plain values for JSON.

    Raises:
      UserError: an unreadable checkpoint, or settings that do not fit together.
    """
    from treespec_jax.measurement import rounds, step_cost
    from treespec_jax.measurement.machine import ReadBandwidth, versions

    names, repeats = settings.benchmark.shapes, settings.benchmark.rounds
    ids = loading.check(settings, texts, names)
    pair = loading.load_pair(settings)
    llms = loading.make_llms({n: settings.with_tree(n) for n in names}, pair)
    for name in names:
        say(f"compiling {name}")
        step_cost.warm_up(llms[name], ids)
    bandwidth = ReadBandwidth()
    bandwidth.sample()
    runs = []
    for number in range(repeats):
        say(f"round {number + 1} of {repeats}")
        runs.append(rounds.run_round(llms, ids, settings.sampling, number))
        bandwidth.sample()
    costs = {}
    for name in names:
        say(f"taking {name} apart")
        costs[name] = step_cost.step_cost(
            llms[name].engine,
            pair.target.model,
            step_cost.middle_of(llms[name], ids[0], runs[0]["none"].token_ids[0]),
            settings.sampling,
            _COST_ROUNDS,
        )
        bandwidth.sample()
    say("cost of verifying more nodes")
    engine = llms["none"].engine.config
    length = min(len(ids[0]) + settings.sampling.max_tokens // 2, engine.max_len - 1)
    curve = step_cost.cost_curve(pair.target.model, engine, length, _COST_ROUNDS)
    bandwidth.sample()
    weights = step_cost.weight_bytes(pair.target.model)
    values = loading.in_force(settings, llms[names[-1]], "benchmark")
    del values["speculative"]["tree"]
    figures = {}
    for name in names:
        shared = rounds.summary([r[name] for r in runs], [r["none"] for r in runs])
        figures[name] = shared | _of_step(shared, costs[name], weights / bandwidth.best)
    return {
        "settings": values,
        "prompts": list(texts),
        "versions": versions(),
        "target_weight_bytes": weights,
        "bandwidth": {
            "bytes_per_second": bandwidth.best,
            "method": bandwidth.method,
            "samples": bandwidth.samples,
        },
        "shapes": figures,
        "cost_curve": curve,
    }


def _of_step(shared: dict[str, Any], cost, read_seconds: float) -> dict[str, Any]:
    """What a step costs, and how much of the memory's bandwidth it uses.

    Of what `rounds.summary` gave, a `StepCost`, and the seconds that reading the
    weights once takes at full bandwidth.
    """
    seconds = statistics.median(shared["milliseconds_per_step"]["rounds"]) / 1e3
    return {
        "step": dataclasses.asdict(cost),
        "bandwidth_share": read_seconds / cost.target,
        "bandwidth_share_whole": read_seconds / seconds,
    }
