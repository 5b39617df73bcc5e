"""`generate --beams`: the likeliest texts of every prompt, with their scores."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from absl.flags import DEFINE_float, DEFINE_integer

from treespec_jax.commands import loading, runtime, verifying
from treespec_jax.commands.settings import Experiment
from treespec_jax.errors import UserError

# What says how single texts are sampled, shown or kept.
_OTHERS = ("chat", "compare", "output", "show_tree", "trace")


def define() -> None:
    DEFINE_integer("beams", 0, "search for likely texts, so many at once; 0: sample")
    DEFINE_float("length_penalty", 1.0, "with --beams: score is log p / length ** this")
    DEFINE_integer("n_best", 1, "with --beams: texts to print per prompt")


def asked(given) -> dict[str, Any] | None:
    """How to search, fields of `BeamParams`; None if it is not asked for.

    Raises:
      UserError: flags that do not go together.
    """
    if not given.beams:
        for name in ("length_penalty", "n_best"):
            if given[name].value != given[name].default:
                raise UserError(f"--{name} goes with --beams; give --beams=4")
        return None
    for name in _OTHERS:
        if name in given and given[name].value:
            raise UserError(f"--{name} does not go with --beams; leave one away")
    fields = {name: given[name].value for name in ("beams", "length_penalty", "n_best")}
    from treespec_jax.engine.beams import BeamParams

    BeamParams(**fields)
    return fields


def run(
    settings: Experiment,
    prompts: Sequence[str],
    fields: dict[str, Any],
    output,
    verify: bool = False,
) -> int:
    """Loads, searches and prints.

    Args:
      settings: whose `sampling.max_tokens` counts.
      prompts: texts.
      fields: see `asked`.
      output: `generate.Output`.
      verify: search without trees too, and compare.

    Returns:
      the exit code: 1 if a text was to be that of the plain search and is not.
    """
    pair = loading.load_pair(settings)
    llm, verdict = pair.make(settings), None
    probed = verifying.probe(llm, pair.target.model) if verify else None
    if probed:
        output.say(str(probed))
    fields = {**fields, "max_tokens": settings.sampling.max_tokens}
    with loading.keeping_table(llm), runtime.says_compiling(not output.quiet):
        found = llm.beam_search(prompts, **fields)
    if probed:
        with runtime.says_compiling(not output.quiet):
            plain = pair.make(settings.with_tree("none")).beam_search(prompts, **fields)
        from treespec_jax.measurement import exactness

        penalty = fields["length_penalty"]
        verdict = exactness.beam_verdict(found, plain, penalty, probed)
    _show(fields, found, verdict, output)
    if verdict is None:
        return 0
    return verifying.report(verdict, quiet=output.quiet or output.json)


def _show(fields: dict[str, Any], found, verdict, output) -> None:
    """Prints what a search found: texts, or all of it as JSON."""
    if output.json:
        report = {
            "beams": fields,
            "found": [
                {**dataclasses.asdict(texts), "stats": texts.stats.as_dict()}
                for texts in found
            ],
            "stats": found.stats.as_dict(),
            "exactness": verdict and verdict.as_dict(),
        }
        json.dump(report, sys.stdout, indent=2)
        print()
        return
    for texts in found:
        for text in texts:
            print(f"{text.score:.4f} {texts.prompt}{text.text}")
    stats = found.stats
    output.say(
        f"{stats.tokens} levels in {stats.steps} passes of the target, "
        f"{stats.tokens_per_step:.2f} per pass; {stats.decode_seconds:.2f} s"
    )
