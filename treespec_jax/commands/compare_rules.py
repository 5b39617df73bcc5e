"""Compares acceptance rules on tree shapes and temperatures; table, JSON and plot.

Every rule runs on every shape that it takes, all on one pair of models and in turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from treespec_jax import limits
from treespec_jax.acceptance import compatibility
from treespec_jax.commands import flags, loading, prompts, runtime, setting_flags
from treespec_jax.commands.settings import Experiment
from treespec_jax.drafting import METHODS
from treespec_jax.errors import UserError
from treespec_jax.measurement.output import Study, say
from treespec_jax.trees import shapes

# Rule and shape; plain decoding samples by the noise of the exact rule.
Combination = tuple[str, str]
PLAIN: Combination = ("exact", "none")
_SETTINGS = setting_flags.SettingFlags(
    more=("comparison",),
    # A machine by itself is measured, and in minutes.
    defaults={"engine.max_batch": 1, "sampling.max_tokens": 32},
    without=(
        *("speculative.tree", "speculative.rule", "speculative.proposal"),
        *("sampling.temperature", "sampling.ignore_eos"),
    ),
)


def define() -> None:
    _SETTINGS.define()
    flags.define("output", "compilation_cache")


def main(given) -> None:
    settings = _SETTINGS.experiment()
    if settings.speculative.method == "none":
        raise UserError("method 'none' grows no trees to compare; leave it out")
    method = limits.resolve(settings.speculative).method
    settings = settings.with_paths(METHODS[method].takes_model)
    possible, refused = combinations(settings)
    if not possible:
        raise UserError(f"no rule takes any of the trees: {refused[0]['reason']}")
    texts = prompts.read_or_stories(settings.comparison.prompts_file)
    ids = loading.check(settings, texts, settings.comparison.shapes)

    # Heavy imports only now, so that a bad flag answers at once.
    runtime.set_up(given.compilation_cache)
    from treespec_jax.measurement import plots, rule_table

    def measured() -> dict[str, Any]:
        figures = measure(settings, possible, ids)
        return figures | {"prompts": texts, "refused": refused}

    Study(measured, rule_table.table, plots.save_rules).carry_out(given.output)


def combinations(
    settings: Experiment,
) -> tuple[dict[Combination, Experiment], list[dict[str, str]]]:
    """What can be measured, and what a rule refuses, with its reason."""
    possible, refused = {}, []
    for shape in settings.comparison.shapes:
        for rule in settings.comparison.rules:
            try:
                variant = settings.with_tree(shape, rule=rule, proposal="")
            except UserError as error:
                refused.append({"rule": rule, "shape": shape, "reason": str(error)})
            else:
                possible[rule, shape] = variant
    return possible, refused


def measure(
    settings: Experiment,
    possible: Mapping[Combination, Experiment],
    ids: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """Figures of every combination at every temperature, as plain values for JSON.

    Args:
      settings: with their paths looked up.
      possible: what to measure.
      ids: token ids of the prompts.

    Raises:
      UserError: an unreadable checkpoint, or settings that do not fit together.
    """
    from treespec_jax.measurement import rounds, step_cost
    from treespec_jax.measurement.machine import versions

    pair = loading.load_pair(settings)
    llms = loading.make_llms({PLAIN: settings.with_tree("none"), **possible}, pair)
    for (rule, shape), llm in llms.items():
        say(f"compiling {rule} on {shape}")
        step_cost.warm_up(llm, ids)
    comparison = settings.comparison
    runs: dict[float, list[dict[Combination, rounds.Run]]] = {}
    for number in range(comparison.rounds):
        for temperature in comparison.temperatures:
            say(f"round {number + 1} of {comparison.rounds}, T={temperature:g}")
            sampling = dataclasses.replace(
                settings.sampling,
                temperature=temperature,
                seed=(settings.sampling.seed + number * len(ids)) % 2**32,
            )
            done = rounds.run_round(llms, ids, sampling, number)
            runs.setdefault(temperature, []).append(done)
    values = loading.in_force(settings, llms[next(iter(possible))])
    for name in ("tree", "rule", "proposal"):
        del values["speculative"][name]
    return {
        "settings": values,
        "comparison": dataclasses.asdict(comparison),
        "versions": versions(),
        "figures": [
            {"rule": rule, "shape": shape, "temperature": temperature}
            | {"proposal": _proposal(possible.get((rule, shape)))}
            | rounds.summary([r[rule, shape] for r in done], [r[PLAIN] for r in done])
            for temperature, done in runs.items()
            for rule, shape in llms
        ],
    }


def _proposal(variant: Experiment | None) -> str | None:
    """How the trees of a variant are proposed; None: of plain decoding."""
    if variant is None:
        return None
    spec = variant.speculative
    tree = shapes.parse(spec.tree)
    return compatibility.choose_proposal(spec.rule, spec.proposal, tree, spec.cascade)
