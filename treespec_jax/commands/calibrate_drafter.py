"""Fits tau, a drafter's temperature of its own estimates; keeps it beside its weights.

Read as the default from then on wherever the drafter is used.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl.flags import DEFINE_string

from treespec_jax.checkpoints import calibration as files
from treespec_jax.commands import flags, loading, prompts, runtime, setting_flags
from treespec_jax.commands.settings import Experiment
from treespec_jax.errors import UserError
from treespec_jax.measurement.tables import markdown
from treespec_jax.trees import shapes
from treespec_jax.tuning import calibration


def define() -> SimpleNamespace:
    """Defines the flags."""
    return SimpleNamespace(
        settings=setting_flags.define(
            "sampling",
            "speculative",
            "engine",
            # The tree must branch.
            defaults={"speculative.tree": "regular:8x1", "sampling.temperature": 1.0},
            without=("sampling.ignore_eos", "engine.record"),
        ),
        prompts_file=flags.define_prompts_file(),
        output=DEFINE_string(
            "output",
            "",
            "file to write instead of calibration.json in the drafter's folder",
        ),
        compilation_cache=flags.define_compilation_cache(),
    )


def main(given: SimpleNamespace) -> None:
    """Runs the command."""
    settings = given.settings.experiment().with_paths(needs_drafter=True)
    check_tree(settings.speculative.tree)
    engine = dataclasses.replace(settings.engine, record=True)
    settings = dataclasses.replace(settings, engine=engine)

    runtime.set_up(given.compilation_cache.value)
    run(settings, given.prompts_file.value, given.output.value)


def check_tree(tree: str) -> None:
    """Raises UserError: a tree in which no node has a sibling."""
    shape = shapes.parse(tree)
    if shape.depth in (0, shape.num_nodes - 1):
        raise UserError(
            f"--tree={tree} has no siblings to compare; take regular:8x1, or another "
            "tree that branches"
        )


def run(settings: Experiment, prompts_file: str | None, output: str) -> None:
    """Decodes the prompts, prints reliability before and after, writes the tau.

    Raises:
      UserError: nowhere to write, an unreadable prompt or checkpoint, or texts in which
        the drafter was never right.
    """
    from treespec_jax.measurement import rounds, versions

    file = files.place(settings.speculative.model, output)
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
    tables = [calibration.reliability(trees) for trees in (records, after)]
    values = {
        "tau": tau,
        "temperature": settings.sampling.temperature,
        "families": families,
        "target": Path(settings.target).name,
        "error_before": calibration.error(tables[0]),
        "error_after": calibration.error(tables[1]),
        "reliability_before": tables[0],
        "reliability_after": tables[1],
        "accepted_by_rank": calibration.accepted_by_rank(records),
        "versions": versions.versions(),
    }
    files.write(file, values)
    print(table(records, after, before, tau))
    print(f"\ntau {tau:.3f} (was {before:g}), of {families} families; wrote {file}")


def table(records, after, before: float, tau: float) -> str:
    """Reliability under both, and ranks, as Markdown."""
    rows = [("estimated probability",)]
    columns = [calibration.reliability(x) for x in (records, after)]
    for value in (before, tau):
        rows[0] += (f"nodes, tau={value:.3g}", "estimated", "realised")
    for pair in zip(*columns, strict=True):
        row = (f"{pair[0]['low']:.1f}–{pair[0]['high']:.1f}",)
        for one in pair:
            row += (str(one["nodes"]), _percent(one, "estimated"))
            row += (_percent(one, "realised"),)
        rows.append(row)
    gaps = [f"{100 * calibration.error(x):.1f} %" for x in columns]
    ranks = calibration.accepted_by_rank(records)
    shares = [f"{100 * count / max(1, sum(ranks)):.0f}" for count in ranks]
    return "\n".join(
        [
            markdown(rows),
            "",
            f"mean gap between estimate and outcome: {gaps[0]} before, {gaps[1]} after",
            f"accepted nodes by rank among siblings: {' '.join(shares)} %",
        ]
    )


def _percent(row: dict[str, Any], name: str) -> str:
    return f"{100 * row[name]:.0f} %" if row["nodes"] else "-"
