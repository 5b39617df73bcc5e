"""`--verify_lossless` of all commands that generate: what is refused, probed, said."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable

from treespec_jax.commands.settings import Experiment
from treespec_jax.config import SamplingParams
from treespec_jax.errors import UserError
from treespec_jax.measurement import tables


def check_whole(params: Iterable[SamplingParams]) -> None:
    """Refuses deadlines where texts are compared: they would end anywhere.

    Raises:
      UserError: such settings of a text.
    """
    for one in params:
        if one.max_time is not None:
            raise UserError(
                f"max_time={one.max_time:g} ends texts anywhere, which cannot be "
                "compared; leave it out, or --compare and --verify_lossless"
            )


def check_same_text(settings: Experiment, params: Iterable[SamplingParams]) -> None:
    """Refuses settings under which a tree may give another text by intention.

    Args:
      settings: how texts are decoded.
      params: of the texts; none: those of `settings`.

    Raises:
      UserError: such a rule or a cascade.
    """
    hottest = max((one.temperature for one in params), default=None)
    if hottest is not None:
        sampling = dataclasses.replace(settings.sampling, temperature=hottest)
        settings = dataclasses.replace(settings, sampling=sampling)
    if not settings.plain and tables.verdict(settings.as_dict()):
        raise UserError(
            "--verify_lossless compares tokens, and rule "
            f"{settings.speculative.rule!r} does not promise the same ones here; take "
            "--rule=exact without a cascade"
        )


def check_alone(given, *names: str) -> None:
    """Refuses what runs the model beside an engine, where processes share it.

    Args:
      given: the flags.
      *names: of those that do.

    Raises:
      UserError: one of them, with --distributed.
    """
    for name in names:
        if given.distributed and given[name].value:
            raise UserError(
                f"--{name} runs in one process; leave it out, or --distributed"
            )


def probe(llm, target):
    """The `exactness.Probe` of a target's model, for the trees of an `LLM`."""
    # Not above: commands start without jax.
    from treespec_jax.measurement import exactness

    nodes = max(shape.num_nodes for shape in llm.engine.speculation.shapes)
    return exactness.probe(target, llm.engine.config, nodes)


def report(verdict, quiet: bool = False, name: str = "") -> int:
    """Says on stderr what a comparison found, and returns the command's exit code.

    Args:
      verdict: an `exactness.Verdict`.
      quiet: say it only if more differs than rounding explains.
      name: of what was compared, to stand in front.

    Returns:
      0; 1 if a text is not that of plain decoding.
    """
    if not (quiet and verdict.lossless):
        print(f"{name}: {verdict}" if name else verdict, file=sys.stderr, flush=True)
    return 0 if verdict.lossless else 1
