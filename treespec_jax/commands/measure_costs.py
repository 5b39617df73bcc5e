"""Measures what steps cost on this machine, which --tree=auto goes by.

Times the target's pass over 1, 2, 4, … nodes, a level of the drafter and the rest of a
step, for a model, a drafter and --max_batch, after texts of --contexts tokens. Runs of
`auto` find these costs out while they decode; this command tells them beforehand, and
prints them. --output is a folder for the table and a plot.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from absl.flags import DEFINE_bool, DEFINE_integer, DEFINE_list

from treespec_jax import limits
from treespec_jax.checks import check_int
from treespec_jax.commands import flags, loading, runtime, setting_flags
from treespec_jax.commands.settings import Experiment
from treespec_jax.errors import UserError
from treespec_jax.measurement.output import Study, say
from treespec_jax.trees import shapes

# What the rest of a step is measured on, besides plain steps.
_SAMPLE = "regular:3x2x1"
_SETTINGS = setting_flags.SettingFlags(
    defaults={"engine.max_batch": 1},
    without=(
        *("speculative.tree", "speculative.recycle_table", "sampling.ignore_eos"),
        *("sampling.max_tokens", "engine.record"),
    ),
)


def define() -> None:
    _SETTINGS.define()
    DEFINE_integer("nodes", 64, "nodes of a pass at most, the root included")
    DEFINE_list("contexts", "256", "tokens in front, one or more numbers")
    DEFINE_bool("keep", True, "keep the costs for runs of --tree=auto")
    flags.define("output", "compilation_cache")


def main(given) -> None:
    check_int("nodes", given.nodes, 2)
    contexts = sorted(set(flags.numbers("contexts", given.contexts)))
    settings = _SETTINGS.experiment()
    if not contexts:
        raise UserError("nothing to measure: --contexts is empty")
    if limits.resolve(settings.speculative).method == "none":
        raise UserError("method 'none' leaves nothing to choose; name another one")
    settings = settings.with_tree("auto").with_paths()
    _, limit = loading.check_models(settings, ["none"])
    reach = settings.engine.steps_per_dispatch * (shapes.parse(_SAMPLE).depth + 1)
    for context in contexts:
        check_int("contexts", context, 1)
        if context + reach >= limit:
            raise UserError(
                f"--contexts={context}: texts have at most {limit} tokens, and "
                f"{reach} are emitted after it; lower it or raise --max_len"
            )

    # Heavy imports only now, so that a bad flag answers at once.
    runtime.set_up(given.compilation_cache)
    from treespec_jax.measurement import cost_tables

    study = Study(
        lambda: measure(settings, contexts, given.nodes, given.keep),
        cost_tables.table,
        cost_tables.save,
    )
    study.carry_out(given.output, must_write=False)


def measure(
    settings: Experiment, contexts: list[int], nodes: int, keep: bool
) -> dict[str, Any]:
    """Costs as plain values for JSON, and in the user's cache folder if `keep`.

    Raises:
      UserError: an unreadable checkpoint, or sizes that do not fit.
    """
    from treespec_jax.cost_file import CostFile
    from treespec_jax.measurement import cost_tables, shape_costs, step_cost
    from treespec_jax.measurement.machine import versions

    pair = loading.load_pair(settings)
    trees = {"auto": settings, "none": settings.with_tree("none")}
    trees[_SAMPLE] = settings.with_tree(_SAMPLE)
    llms = loading.make_llms(trees, pair)
    auto, target = llms["auto"], pair.target.model
    file = CostFile.of(target, auto.drafter, auto.engine.config)
    text, curves = [0] * max(contexts), {}
    for name in ("none", _SAMPLE):
        say(f"compiling {name}")
        step_cost.warm_up(llms[name], [text])
    for context in contexts:
        say(f"measuring after {context} tokens")
        bench = shape_costs.Bench(
            llms["none"], llms[_SAMPLE], target, text[:context], settings.sampling
        )
        curves[context] = cost_tables.curve(
            bench.measure(nodes), auto.engine.config.max_batch
        )
    known = cost_tables.merged(file.read(), curves)
    if keep:
        file.write(known)
        say(f"kept in {file.path}")
    ladder = auto.engine.speculation.shapes
    return {
        "about": file.about,
        "versions": versions(),
        "contexts": {
            str(context): dataclasses.asdict(curve)
            | {"shapes": cost_tables.shapes_of(curve, ladder, file.slots)}
            for context, curve in curves.items()
        },
        "steps": known.as_dict()["steps"],
    }
