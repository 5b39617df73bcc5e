"""Figures of a benchmark by the protocol of Spec-Bench (Xia et al., 2401.07851).

An answer is a line of the journal (`suite_run`): plain values of one question by one
combination in one round. docs/benchmark.md defines every figure.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from treespec_jax.checks import from_mapping
from treespec_jax.engine.stats import Stats, total
from treespec_jax.measurement.timing import paired, spread
from treespec_jax.tuning import calibration

Answers = Sequence[Mapping[str, Any]]
# The task that stands for all questions.
OVERALL = "overall"


def figures(
    answers: Answers, plain: Answers, streams: Answers = (), first: Answers = ()
) -> dict[str, Any]:
    """Figures of one combination on some questions, as plain values for JSON.

    Args:
      answers: of all rounds.
      plain: those of plain decoding to the same questions in the same rounds.
      streams: lines of the pass that timed its streams; answers of peers have their
        arrivals themselves.
      first: those of plain decoding by the first type of weights, if there are several.
    """
    rounds, plain_rounds = _by_round(answers), _by_round(plain)
    stats = total([_stats(a) for a in answers], 0.0, 0.0)
    speeds, plain_speeds = _each(mean_speed, rounds), _each(mean_speed, plain_rounds)
    whole, plain_whole = (
        _each(overall_speed, rounds),
        _each(overall_speed, plain_rounds),
    )
    decode, plain_decode = (
        _each(decode_speed, rounds),
        _each(decode_speed, plain_rounds),
    )
    known = decode and None not in decode
    first_decode = _each(decode_speed, _by_round(first))
    return {
        "questions": len(rounds[0]),
        "mean_length": stats.tokens / len(answers),
        "acceptance_rate": stats.accepted / stats.drafted if stats.drafted else None,
        "tokens_per_step": stats.tokens_per_step,
        "tokens_per_second": spread(speeds),
        "speed_up": spread(paired(speeds, plain_speeds)),
        "overall_ratio": spread(paired(whole, plain_whole)),
        "decode_tokens_per_second": spread(decode) if known else None,
        "decode_ratio": spread(paired(decode, plain_decode)) if known else None,
        "decode_ratio_first": (
            spread(paired(decode, first_decode)) if known and first else None
        ),
        **latency([*answers, *streams]),
        "memory_bytes": answers[0]["memory_bytes"],
        "tokens": stats.tokens,
        "steps": stats.steps,
        "nodes_per_step": stats.nodes_per_step,
        "lossless": stats.lossless,
        "acceptance_by_depth": stats.acceptance_by_depth,
        "acceptance_by_rank": stats.acceptance_by_rank,
        "accepted_by_source": stats.accepted_by_source,
        "reliability": _reliability(answers),
        # Of the first round.
        "texts_unlike_plain": unlike(rounds[0], plain_rounds[0]),
    }


def by_task(
    answers: Answers, plain: Answers, streams: Answers = (), first: Answers = ()
) -> dict[str, dict[str, Any]]:
    """`figures` of every category, and of all questions as OVERALL."""
    lines, found = (answers, plain, streams, first), {}
    for category in dict.fromkeys(answer["category"] for answer in answers):
        some = ([a for a in each if a["category"] == category] for each in lines)
        found[category] = figures(*some)
    return {**found, OVERALL: figures(*lines)}


def question_speed(answer: Mapping[str, Any]) -> float:
    """Tokens per second of one question, prefill included."""
    return answer["tokens"] / answer["seconds"]


def mean_speed(answers: Answers) -> float:
    """The mean over the questions of their tokens per second."""
    return statistics.fmean(map(question_speed, answers))


def overall_speed(answers: Answers) -> float:
    """All tokens over all seconds on the wall."""
    return _sum(answers, "tokens") / _sum(answers, "wall_seconds")


def decode_speed(answers: Answers) -> float | None:
    """The same without the seconds of prefill; None where they are not known."""
    if any(answer["prefill_seconds"] is None for answer in answers):
        return None
    seconds = _sum(answers, "wall_seconds") - _sum(answers, "prefill_seconds")
    return _sum(answers, "tokens") / seconds


def latency(lines: Answers) -> dict[str, float | None]:
    """Seconds to the first token (median), and between tokens (p50, p95).

    Of the lines that have arrivals. Tokens that arrive together share the time since
    the previous arrival equally.
    """
    first, gaps, weights = [], [], []
    for line in lines:
        for turn in line["arrivals"] or ():
            first.append(turn[0][0])
            for (before, _), (now, count) in zip(turn, turn[1:], strict=False):
                gaps.append((now - before) / count)
                weights.append(count)
    names = "inter_token_p50", "inter_token_p95"
    shared = np.repeat(gaps, weights) if gaps else None
    between = (None, None) if shared is None else np.percentile(shared, [50, 95])
    return {
        "first_token_seconds": statistics.median(first) if first else None,
        **{
            n: None if v is None else float(v)
            for n, v in zip(names, between, strict=True)
        },
    }


def unlike(answers: Answers, plain: Answers) -> int:
    """How many questions got other tokens than by plain decoding."""
    theirs = {answer["question"]: answer["token_ids"] for answer in plain}
    return sum(a["token_ids"] != theirs[a["question"]] for a in answers)


def _by_round(answers: Answers) -> list[list[Mapping[str, Any]]]:
    numbers = sorted({answer["round"] for answer in answers})
    return [[a for a in answers if a["round"] == number] for number in numbers]


def _each(speed, rounds) -> list[float]:
    return [speed(answers) for answers in rounds]


def _stats(answer: Mapping[str, Any]) -> Stats:
    return from_mapping(Stats, answer["stats"], "stats of the journal")


def _sum(answers: Answers, name: str) -> float:
    return sum(answer[name] for answer in answers)


def _reliability(answers: Answers) -> dict[str, Any] | None:
    """As `rounds.reliability` gives it for one answer, over all of them."""
    known = [a["reliability"]["bins"] for a in answers if a["reliability"]]
    if not known:
        return None
    bins = calibration.merged(known)
    return {"bins": bins, "mean_gap": calibration.error(bins)}
