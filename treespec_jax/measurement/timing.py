"""Programs timed in turn, and the spread of what came out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def in_turn(
    programs: Mapping[str, Callable[[], float]],
    rounds: int,
    tell: Callable[[int, float], Any] | None = None,
) -> dict[str, list[float]]:
    """Runs programs in turn and in rotated order; each returns its seconds.

    Whatever else the machine does falls on all of them, and figures of one round may
    be compared. A first run of each is not counted.

    Args:
      programs: by name.
      rounds: runs of each that count.
      tell: called before every round with its number, from 0, and the seconds that the
        runs which are not counted took: about those of a round.
    """
    names = list(programs)
    seconds = {name: [] for name in names}
    began = time.perf_counter()
    for program in programs.values():
        program()
    each = time.perf_counter() - began
    for turn in range(rounds):
        if tell is not None:
            tell(turn, each)
        for name in rotated(names, turn):
            seconds[name].append(programs[name]())
    return seconds


def rotated(names: Sequence[Any], turn: int) -> list[Any]:
    """The names in the order of one turn: another one comes first in the next."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def timed(program: Callable, *args, passes: int = 1) -> Callable[[], float]:
    """A function that runs a program and returns seconds per pass.

    Args:
      program: returns arrays, which are waited for.
      *args: of the program.
      passes: that a call of the program consists of.
    """
    import jax

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(*args))
        return (time.perf_counter() - began) / passes

    return run


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and extremes of the rounds, and the rounds."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "rounds": list(values),
    }


def paired(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Ratios of two programs' figures, round by round."""
    return [a / b for a, b in zip(values, others, strict=True)]
