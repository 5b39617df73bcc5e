"""Fits tau, a drafter's temperature of its own estimates; keeps it beside its weights.

Read as the default from then on wherever the drafter is used.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from absl.flags import DEFINE_string

from treespec_jax.checkpoints import calibration as files
from treespec_jax.checkpoints import drafters
from treespec_jax.checkpoints.names import locate
from treespec_jax.commands import flags, loading, prompts, runtime, setting_flags
from treespec_jax.commands.settings import Experiment
from treespec_jax.errors import UserError
from treespec_jax.measurement import tables
from treespec_jax.trees import shapes
from treespec_jax.tuning import calibration

_SETTINGS = setting_flags.SettingFlags(
    # The tree must branch.
    defaults={"speculative.tree": "regular:8x1", "sampling.temperature": 1.0},
    without=(
        *("speculative.method", "speculative.recycle_table"),
        *("sampling.ignore_eos", "engine.record"),
    ),
)


def define() -> None:
    _SETTINGS.define()
    words = "file to write instead of calibration.json in the drafter's folder"
    DEFINE_string("output", "", words)
    flags.define("prompts_file", "compilation_cache")


def main(given) -> None:
    settings = _SETTINGS.experiment()
    tree = settings.speculative.tree
    shape = shapes.parse(tree)
    if shape.depth in (0, shape.num_nodes - 1):
        raise UserError(
            f"--tree={tree} has no siblings to compare; take regular:8x1, or another "
            "tree that branches"
        )
    method = settings.speculative.method
    if method not in drafters.METHODS:
        method = "draft_model"
    settings = settings.with_tree(tree, method=method).with_paths()
    engine = dataclasses.replace(settings.engine, record=True)
    settings = dataclasses.replace(settings, engine=engine)

    # Heavy imports only now, so that a bad flag answers at once.
    runtime.set_up(given.compilation_cache)
    run(settings, given.prompts_file, given.output)


def run(settings: Experiment, prompts_file: str | None, output: str) -> None:
    """Decodes the prompts, prints reliability before and after, writes the tau.

    Raises:
      UserError: nowhere to write, an unreadable prompt or checkpoint, or texts in which
        the drafter was never right.
    """
    from treespec_jax.measurement import machine, rounds

    drafter = locate(settings.speculative.model, "drafter")
    file = files.output_file(drafter.path, output)
    texts = prompts.read_or_stories(prompts_file)
    loading.check(settings, texts, [settings.speculative.tree])
    pair = loading.load_pair(settings)
    llm = loading.make_llms({"": settings}, pair)[""]
    params = rounds.seeded(settings.sampling, len(texts))
    records = [record for one in llm.generate(texts, params) for record in one.records]
    before = llm.drafter.tau
    try:
        tau, families = calibration.fit_tau(records, before)
    except ValueError:
        raise UserError(
            "the drafter was never right on these prompts; give more of them, or "
            "another drafter"
        ) from None
    after = calibration.retempered(records, before, tau)
    ranks = calibration.accepted_by_rank(records)
    found = {"before": rounds.reliability(records), "after": rounds.reliability(after)}
    values = {
        "tau": tau,
        "temperature": settings.sampling.temperature,
        "families": families,
        "target": Path(settings.target).name,
        "accepted_by_rank": ranks,
        "versions": machine.versions(),
    }
    for name, figures in found.items():
        values[f"error_{name}"] = figures["mean_gap"]
        values[f"reliability_{name}"] = figures["bins"]
    files.write(file, values)
    names = f"before, tau={before:.3g}", f"after, tau={tau:.3g}"
    print(*tables.reliability(dict(zip(names, found.values(), strict=True))), sep="\n")
    shares = tables.percents([count / max(1, sum(ranks)) for count in ranks])
    print(f"Accepted nodes by rank among siblings: {shares}")
    print(f"\ntau {tau:.3f} (was {before:g}), of {families} families; wrote {file}")
