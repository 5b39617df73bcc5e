"""Fits tau, a drafter's temperature of its own estimates; keeps it beside its weights.

Read as the default from then on wherever the drafter is used. --draft is a small model,
an EAGLE layer or Medusa heads; --chat fits it on answers of a chat model:

  calibrate_drafter --target=CHAT_MODEL --draft=EAGLE_FOLDER --chat

A picture of how often estimates came true, before and after, is drawn beside the file.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl.flags import DEFINE_bool, DEFINE_multi_string, DEFINE_string

from treespec_jax.checkpoints import calibration as files
from treespec_jax.checkpoints import drafters
from treespec_jax.checkpoints.names import here, locate
from treespec_jax.commands import (
    flags,
    loading,
    prompts,
    runtime,
    setting_flags,
    suites,
)
from treespec_jax.commands.prompts import Prompt
from treespec_jax.commands.settings import Experiment
from treespec_jax.errors import UserError
from treespec_jax.measurement import tables
from treespec_jax.trees import shapes
from treespec_jax.tuning import calibration

_SETTINGS = setting_flags.SettingFlags(
    # The tree must branch.
    defaults={"speculative.tree": "regular:8x1", "sampling.temperature": 1.0},
    without=("speculative.recycle_table", "sampling.ignore_eos", "engine.record"),
)


def define() -> None:
    _SETTINGS.define()
    words = "file to write instead of calibration.json in the drafter's folder"
    DEFINE_string("output", "", words)
    DEFINE_bool("chat", False, "prompts are questions to answer by the chat template")
    DEFINE_string("system", None, "system message, with --chat")
    DEFINE_multi_string(
        "chat_option", None, "NAME=JSON for the chat template to see; repeatable"
    )
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
    settings = settings.with_tree(tree, method=_method(settings)).with_paths()
    engine = dataclasses.replace(settings.engine, record=True)
    settings = dataclasses.replace(settings, engine=engine)

    asked, options = _prompts(given), prompts.options(given.chat_option)
    drafter = locate(settings.speculative.model, "drafter")
    file = files.output_file(drafter.path, given.output)
    loading.check(settings, asked, [tree], options)

    # Heavy imports only now, so that a bad flag answers at once.
    runtime.set_up(given.compilation_cache)
    run(settings, asked, options, file)


def _method(settings: Experiment) -> str:
    """What --draft is, or else what --method says."""
    draft = settings.speculative.model
    path = here(draft) if draft else None
    found = drafters.method_of(path) if path is not None else ""
    method = found or settings.speculative.method
    return method if method in drafters.METHODS else "draft_model"


def _prompts(given) -> list[Prompt]:
    """Texts to continue or, with --chat, conversations to answer.

    Raises:
      UserError: what `prompts.gather` raises, of a file; --system without --chat.
    """
    if given.system is not None and not given.chat:
        raise UserError("--system needs --chat; add it")
    if given.prompts_file is None and not given.chat:
        return list(prompts.STORIES)
    if given.prompts_file is not None:
        lines, _ = prompts.gather(given.chat, None, given.prompts_file, given.system)
        return [line.prompt for line in lines]
    opening = prompts.opening(given.system)
    return [
        [*opening, {"role": "user", "content": question.turns[0]}]
        for question in suites.find("", chat=True).questions
    ]


def run(
    settings: Experiment, asked: Sequence[Prompt], options: dict[str, Any], file: Path
) -> None:
    """Decodes the prompts, prints reliability before and after, writes the tau.

    Args:
      settings: with their paths looked up.
      asked: texts or conversations.
      options: further values for a chat template to see.
      file: for the tau.

    Raises:
      UserError: an unreadable checkpoint, or texts in which the drafter was never
        right.
    """
    from treespec_jax.measurement import machine, rounds

    pair = loading.load_pair(settings)
    llm = loading.make_llms({"": settings}, pair)[""]
    params = rounds.seeded(settings.sampling, len(asked))
    generation, _ = rounds.decode(llm, asked, params, options)
    records = [record for one in generation for record in one.records]
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
    shown = dict(zip(names, found.values(), strict=True))
    print(*tables.reliability(shown), sep="\n")
    shares = tables.percents([count / max(1, sum(ranks)) for count in ranks])
    print(f"Accepted nodes by rank among siblings: {shares}")
    print(f"\ntau {tau:.3f} (was {before:g}), of {families} families; wrote {file}")
    _draw(shown, file.with_suffix(".png"))


def _draw(shown: dict[str, Any], file: Path) -> None:
    from treespec_jax.measurement import plots
    from treespec_jax.measurement.output import say

    if importlib.util.find_spec("matplotlib") is None:
        say("no plot: matplotlib is missing; pip install 'treespec-jax[train]'")
        return
    plots.save_reliability(shown, file)
    print(f"drew {file}")
