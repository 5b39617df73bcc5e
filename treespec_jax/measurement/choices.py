"""How choosing a tree at every dispatch compares with the best tree of a benchmark.

The best of several timed shapes looks better than it is, since noise helps the one that
wins. So it is found twice: by hindsight, and *held out*, for every pass the shape that
was best in all other passes (leave-one-out cross-validation; Stone, 1974).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from treespec_jax.measurement import tables
from treespec_jax.measurement.grid import Combination

Answers = Sequence[Mapping[str, Any]]

_HEAD = (
    *("method", "T", "batch", "passes", "auto × plain", "best fixed"),
    *("its × plain", "auto / best", "held out"),
)
_LEGEND = (
    "Decoding alone. A pass is a batch of questions in one round. The best fixed shape "
    "is that of all passes together, plain decoding among them; held out, for each "
    "pass that of all others. ± is a standard error over passes (jackknife). Plain × "
    "itself: its slowest round over its quickest, the least and the most of all rows."
)


def results(answers_of: Mapping[Combination, Answers]) -> list[dict[str, Any]]:
    """Figures of every combination that chooses, beside those that do not.

    Args:
      answers_of: answers of all rounds, by combination.

    Returns:
      Plain values for JSON, a row for each combination that chooses and has a fixed
      tree beside it.
    """
    found = []
    for combination in answers_of:
        if not _chooses(combination):
            continue
        fixed = [other for other in answers_of if _is_beside(other, combination)]
        ways = [combination, combination.baseline, *fixed]
        if fixed and all(_is_timed(answers_of[way]) for way in ways):
            passes = np.array([_passes(answers_of[way]) for way in ways])
            row = _figures(passes, [way.shape for way in ways[1:]])
            rounds = len({answer["round"] for answer in answers_of[combination]})
            row["plain_rounds"] = _between_rounds(passes[1], rounds)
            found.append({**dataclasses.asdict(combination), **row})
    return found


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table of `results`, and the mean; none without rows."""
    if not rows:
        return []
    cells = [
        (
            " ".join(filter(None, (row["weights"], row["method"]))),
            f"{row['temperature']:g}",
            f"{row['batch']}",
            f"{row['passes']}",
            _with_error(row["plain_ratio"]),
            row["best"],
            f"{row['best_plain_ratio']:.2f}",
            _with_error(row["ratio"]),
            f"{row['held_out']:.2f}" if row["held_out"] else "-",
        )
        for row in rows
    ]
    ratios = [row["ratio"]["value"] for row in rows]
    held_out = [row["held_out"] for row in rows if row["held_out"]]
    means = f"auto / best, mean of {len(rows)}: {statistics.fmean(ratios):.3f}"
    if held_out:
        means += f"; held out, of {len(held_out)}: {statistics.fmean(held_out):.3f}"
    least = min(row["plain_ratio"]["value"] for row in rows)
    means += f"; least auto × plain {least:.2f}"
    plain = [row["plain_rounds"] for row in rows if row["plain_rounds"]]
    if plain:
        means += f"; plain × itself {min(plain):.2f} to {max(plain):.2f}"
    return [
        "### Trees chosen at every dispatch beside fixed ones",
        "",
        tables.markdown([_HEAD, *cells]),
        "",
        f"{means}. {_LEGEND}",
        "",
    ]


def _chooses(combination: Combination) -> bool:
    return combination.shape.split(":")[0] == "auto"


def _is_beside(other: Combination, choosing: Combination) -> bool:
    """Whether it differs in its shape alone, and has one."""
    same = dataclasses.replace(other, shape=choosing.shape) == choosing
    return same and not _chooses(other)


def _is_timed(answers: Answers) -> bool:
    return all(answer["prefill_seconds"] is not None for answer in answers)


def _passes(answers: Answers) -> np.ndarray:
    """float [P, 2]: tokens and seconds of decoding of every pass."""
    sums: dict[tuple[int, int], np.ndarray] = {}
    counts: dict[int, int] = {}
    for answer in answers:
        number = counts.get(answer["round"], 0)
        counts[answer["round"]] = number + 1
        seconds = answer["wall_seconds"] - answer["prefill_seconds"]
        key = answer["round"], number // answer["batch"]
        sums[key] = sums.get(key, 0) + np.array([answer["tokens"], seconds])
    return np.array([sums[key] for key in sorted(sums)])


def _between_rounds(passes: np.ndarray, rounds: int) -> float | None:
    """Speed of the slowest round over that of the quickest; None of one round.

    Args:
      passes: float [P, 2], see `_passes`; as many of every round.
      rounds: of them.
    """
    if rounds == 1:
        return None
    speeds = _speed(passes.reshape(rounds, -1, 2))
    return float(speeds.min() / speeds.max())


def _figures(passes: np.ndarray, shapes: Sequence[str]) -> dict[str, Any]:
    """Figures of a row.

    Args:
      passes: float [1 + F, P, 2]: see `_passes`; whoever chooses comes first, plain
        decoding next.
      shapes: F names of the fixed ones.
    """
    ours, fixed = passes[0], passes[1:]
    count = len(ours)
    best = int(np.argmax(_speed(fixed)))
    held_out = None
    if count > 1:
        others = [np.delete(fixed, number, axis=1) for number in range(count)]
        chosen = [int(np.argmax(_speed(some))) for some in others]
        theirs = fixed[chosen, np.arange(count)]
        held_out = float(_speed(ours) / _speed(theirs))

    def ratio(number: int) -> dict[str, Any]:
        return _estimate(
            lambda some: _speed(ours[some]) / _speed(fixed[number][some]), count
        )

    return {
        "passes": count,
        "plain_ratio": ratio(0),
        "best": shapes[best],
        "best_plain_ratio": float(_speed(fixed[best]) / _speed(fixed[0])),
        "ratio": ratio(best),
        "held_out": held_out,
    }


def _speed(passes: np.ndarray) -> np.ndarray:
    """Tokens per second [...] of passes [..., P, 2] together."""
    tokens, seconds = np.moveaxis(passes.sum(-2), -1, 0)
    return tokens / seconds


def _estimate(of: Callable[[np.ndarray], Any], count: int) -> dict[str, Any]:
    """A figure over all passes, and its standard error without each of them."""
    every = np.arange(count)
    value = float(of(every))
    if count == 1:
        return {"value": value, "error": None}
    without = np.array([of(np.delete(every, number)) for number in every])
    error = np.sqrt((count - 1) * np.var(without))
    return {"value": value, "error": float(error)}


def _with_error(figure: Mapping[str, Any]) -> str:
    error = figure["error"]
    return f"{figure['value']:.2f}" + ("" if error is None else f" ± {error:.2f}")
