"""The benchmark's comparison of chosen trees with fixed ones."""

from __future__ import annotations

import dataclasses

import pytest

from treespec_jax.measurement import choices
from treespec_jax.measurement.grid import Combination

AUTO = Combination("ngram", "auto", "exact", 0.0, 2)
CHAIN = dataclasses.replace(AUTO, shape="chain:3")
TREE = dataclasses.replace(AUTO, shape="dynamic:7@4")
PLAIN = AUTO.baseline
# Seconds of decoding by pass: two of each round, as a batch has two of four questions.
SECONDS = {
    PLAIN: [2.0, 2.0, 2.0, 2.0],
    CHAIN: [1.0, 2.4, 2.4, 2.4],
    TREE: [1.5, 1.5, 1.5, 4.1],
    AUTO: [1.0, 2.0, 2.0, 2.0],
}


def answers(combination, seconds=SECONDS, prefill=0.5, rounds=2):
    """Journal lines: every question of a pass has half of its time, and 12 tokens."""
    values = dataclasses.asdict(combination)
    return [
        {
            **values,
            "round": number,
            "question": str(question),
            "tokens": 12,
            "prefill_seconds": prefill,
            "wall_seconds": seconds[combination][2 * number + question // 2] / 2
            + (prefill or 0),
        }
        for number in range(rounds)
        for question in range(4)
    ]


def cells(rows):
    """Those of the first row of the table."""
    row = choices.lines(rows)[2].splitlines()[2]
    return [cell.strip() for cell in row[1:-1].split("|")]


def test_the_best_by_hindsight_and_held_out():
    (row,) = choices.results({way: answers(way) for way in SECONDS})
    assert row["passes"] == 4 and row["shape"] == "auto"
    # Sums are 8, 8.2, 8.6 and 7.
    assert row["best"] == "none" and row["best_plain_ratio"] == 1
    assert row["ratio"]["value"] == pytest.approx(8 / 7)
    # Without the first pass plain decoding is the best, without the second one the
    # chain (5.8), likewise without the third, and without the last one the tree (4.5).
    assert row["held_out"] == pytest.approx((2.0 + 2.4 + 2.4 + 4.1) / 7)


def test_errors_are_those_of_the_jackknife():
    row = choices.results({way: answers(way) for way in SECONDS})[0]["plain_ratio"]
    ratios = [6 / 6, 6 / 5, 6 / 5, 6 / 5]
    mean = sum(ratios) / 4
    variance = 3 / 4 * sum((ratio - mean) ** 2 for ratio in ratios)
    assert row == {
        "value": pytest.approx(8 / 7),
        "error": pytest.approx(variance**0.5),
    }


def test_plain_decoding_beside_itself():
    """Its slowest round over its quickest: the noise of a ratio to it."""
    slower = {**SECONDS, PLAIN: [2.0, 2.0, 3.0, 2.0]}
    (row,) = choices.results({way: answers(way, slower) for way in SECONDS})
    assert row["plain_rounds"] == pytest.approx(4 / 5)
    assert "plain × itself 0.80 to 0.80. " in "\n".join(choices.lines([row]))


def test_a_single_pass_has_no_error():
    ways = {way: answers(way, rounds=1)[:2] for way in SECONDS}
    (row,) = choices.results(ways)
    assert (row["passes"], row["held_out"], row["plain_rounds"]) == (1, None, None)
    assert "itself 0" not in "\n".join(choices.lines([row]))
    assert row["best"] == "chain:3" and row["ratio"] == {"value": 1, "error": None}
    expected = ["ngram", "0", "2", "1", "2.00", "chain:3", "2.00", "1.00", "-"]
    assert cells([row]) == expected


def test_rows_are_of_those_that_choose_and_have_company():
    batch, other = (
        dataclasses.replace(AUTO, **v) for v in ({"batch": 1}, {"rule": "x"})
    )
    alone = {way: answers(way) for way in (PLAIN, AUTO)}
    assert choices.results(alone) == []
    assert choices.results({PLAIN: answers(PLAIN), TREE: answers(TREE)}) == []
    unlike = {one: answers(AUTO) for one in (batch, other)}
    assert choices.results({**alone, **unlike, batch.baseline: answers(PLAIN)}) == []
    untimed = {way: answers(way, prefill=None) for way in SECONDS}
    assert choices.results(untimed) == []
    assert choices.lines([]) == []


def test_table():
    rows = choices.results({way: answers(way) for way in SECONDS})
    expected = ["ngram", "0", "2", "4", "1.14 ± 0.15", "none", "1.00", "1.14 ± 0.15"]
    assert cells(rows) == [*expected, "1.56"]
    shown = "\n".join(choices.lines(rows))
    assert "mean of 1: 1.143; held out, of 1: 1.557; least auto × plain 1.14" in shown
