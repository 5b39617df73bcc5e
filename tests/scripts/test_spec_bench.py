"""Figures of the benchmark against numbers worked out by hand, and their tables."""

from __future__ import annotations

import dataclasses
import types

import pytest

from treespec_jax.engine.stats import Stats
from treespec_jax.measurement import plots, spec_bench, suite_report
from treespec_jax.measurement.grid import Combination
from treespec_jax.tuning import calibration

PLAIN = Combination("none", "none", "exact", 0.0, 1)
CHAIN = Combination("ngram", "chain:2", "exact", 0.0, 1)


def line(combination, question, seconds, counts, *, number=0, category="a", **more):
    """A journal line; `counts` are the tokens that each step emitted."""
    stats = Stats(
        tokens=sum(counts),
        steps=len(counts),
        drafted=0 if combination.plain else 2 * len(counts),
        sources=() if combination.plain else ("copy", "guess"),
        source_counts=[] if combination.plain else [3, 1],
        emitted_counts=[counts.count(n) for n in range(4)],
    )
    values = {
        "round": number,
        "question": question,
        "category": category,
        "tokens": stats.tokens,
        "seconds": seconds,
        "wall_seconds": seconds,
        "prefill_seconds": 1.0,
        "stats": dataclasses.asdict(stats),
        "token_ids": [list(range(stats.tokens))],
        "arrivals": None,
        "memory_bytes": 5_000_000,
        "peak_rss_bytes": 9_000_000,
        "peak_device_bytes": None,
        "reliability": None,
        "process": "1",
    }
    return {**dataclasses.asdict(combination), **values, **more}


# Two questions, the second of another task and thrice as long.
PLAIN_LINES = [
    line(PLAIN, "1", 4.0, [1] * 8),  # 2 tokens per second
    line(PLAIN, "2", 6.0, [1] * 24, category="b"),  # 4
]
CHAIN_LINES = [
    line(CHAIN, "1", 2.0, [3, 3, 2]),  # 4
    line(CHAIN, "2", 4.0, [3] * 6 + [1] * 6, category="b"),  # 6
]


def test_the_formulas_of_spec_bench():
    found = spec_bench.figures(CHAIN_LINES, PLAIN_LINES)
    assert found["questions"] == 2 and found["mean_length"] == 16
    # 15 steps emitted 32 tokens, of which 17 were drafted by two nodes a step.
    assert found["tokens_per_step"] == pytest.approx(32 / 15)
    assert found["acceptance_rate"] == pytest.approx(17 / 30)
    assert found["tokens_per_second"]["median"] == pytest.approx(5.0)
    # (4 + 6) / 2 over (2 + 4) / 2, not the mean of 4 / 2 and 6 / 4.
    assert found["speed_up"]["median"] == pytest.approx(5 / 3)
    assert found["overall_ratio"]["median"] == pytest.approx((32 / 6) / (32 / 10))
    assert found["decode_tokens_per_second"]["median"] == pytest.approx(32 / 4)
    assert found["decode_ratio"]["median"] == pytest.approx((32 / 4) / (32 / 8))
    # Nine steps of 15 accepted a node at depth 1 and another at depth 2, but for one.
    assert found["acceptance_by_depth"] == [
        pytest.approx(9 / 15),
        pytest.approx(8 / 15),
    ]
    assert found["texts_unlike_plain"] == 0 and found["first_token_seconds"] is None
    plain = spec_bench.figures(PLAIN_LINES, PLAIN_LINES)
    assert plain["tokens_per_step"] == 1 and plain["acceptance_rate"] is None
    assert plain["speed_up"]["median"] == plain["overall_ratio"]["median"] == 1


def test_ratios_are_paired_within_a_round():
    """A machine twice as slow in the second round changes no ratio."""
    slow = {"number": 1}
    plain = [*PLAIN_LINES, line(PLAIN, "1", 8.0, [1] * 8, **slow)]
    plain.append(line(PLAIN, "2", 12.0, [1] * 24, category="b", **slow))
    chain = [*CHAIN_LINES, line(CHAIN, "1", 4.0, [3, 3, 2], **slow)]
    chain.append(line(CHAIN, "2", 8.0, [3] * 6 + [1] * 6, category="b", **slow))
    found = spec_bench.figures(chain, plain)
    assert found["tokens_per_second"]["rounds"] == [5.0, 2.5]
    assert found["speed_up"]["min"] == found["speed_up"]["max"] == pytest.approx(5 / 3)
    assert found["questions"] == 2 and found["mean_length"] == 16


def test_tasks_are_apart_and_together():
    found = spec_bench.by_task(CHAIN_LINES, PLAIN_LINES)
    assert list(found) == ["a", "b", "overall"]
    assert found["a"]["speed_up"]["median"] == pytest.approx(2.0)
    assert found["b"]["speed_up"]["median"] == pytest.approx(1.5)
    assert found["b"]["mean_length"] == 24


def test_tokens_of_a_step_share_the_time_since_the_last():
    turns = [[(0.5, 2), (0.8, 3), (1.0, 1)], [(0.25, 1)]]
    found = spec_bench.latency([line(CHAIN, "1", 1.0, [1], arrivals=turns)])
    # Tokens after the first arrival: three of 0.1 s and one of 0.2 s.
    assert found["first_token_seconds"] == pytest.approx(0.375)
    assert found["inter_token_p50"] == pytest.approx(0.1)
    assert found["inter_token_p95"] == pytest.approx(0.1 + 0.85 * 0.1)
    # A text of one arrival has no time between tokens.
    short = spec_bench.latency([line(CHAIN, "1", 1.0, [1], arrivals=[[(0.25, 1)]])])
    assert short["first_token_seconds"] == 0.25 and short["inter_token_p50"] is None


def test_estimates_of_several_answers_are_weighed_by_nodes():
    one = [{"low": 0.0, "high": 1.0, "nodes": 3, "estimated": 0.2, "realised": 0.0}]
    two = [{**one[0], "nodes": 1, "estimated": 0.6, "realised": 1.0}]
    (row,) = calibration.merged([one, two])
    assert (row["nodes"], row["estimated"]) == (4, pytest.approx(0.3))
    assert row["realised"] == 0.25
    nothing = {**one[0], "nodes": 0, "estimated": 0.0}
    assert calibration.merged([[nothing], [nothing]]) == [nothing]


@pytest.fixture
def results():
    lines = [*PLAIN_LINES, *CHAIN_LINES]
    lines[2] |= {"token_ids": [[9]]}
    # The process ended within the round.
    lines[3] |= {"process": "2"}
    typical = dataclasses.replace(CHAIN, rule="typical")
    stats = {**CHAIN_LINES[0]["stats"], "rule": "typical"}
    for number, question in enumerate("12"):
        more = {"category": "ab"[number], "prefill_seconds": None, "stats": stats}
        lines.append(line(typical, question, 1.0, [3], **more))
    header = {
        "in_force": {
            "dtype": "float32",
            "sampling": {"max_tokens": 24},
            "engine": {"cache_dtype": "int8"},
            "benchmark": {"rounds": 1, "weights": []},
        },
        "versions": {"jax": "0.10", "device_kind": "cpu", "cpus": 2},
    }
    found = {"answer": lines}
    cell = {**dataclasses.asdict(CHAIN), "round": 0, "question": "1", "category": "a"}
    found["stream"] = [{**cell, "arrivals": [[(0.02, 1), (0.03, 2)]]}]
    found["step"] = [
        {"method": "ngram", "shape": "chain:2", "rule": "exact"}
        | {"batch": 1, "weights": ""}
        | {"step": 0.01, "target": 0.008, "draft": 0.001, "target_share": 0.8}
        | {"draft_share": 0.1, "rest_share": 0.1, "target_weight_bytes": 8_000_000}
    ]
    points = [{"nodes": n, "seconds": n / 1e3, "ratio": spread(n)} for n in (1, 2)]
    found["curve"] = [{"batch": 1, "weights": "", "points": points}]
    found["bandwidth"] = [{"samples": [1e9, 2e9], "method": "a reading"}]
    journal = types.SimpleNamespace(header=header, all=lambda kind: found.get(kind, ()))
    suite = {"name": "mini", "questions": 2, "digest": ""}
    details = {"suite": suite, "left_out": ["7"]}
    details["skipped"] = [{"what": "ngram x", "reason": "it cannot be"}]
    return suite_report.results(journal, [PLAIN, CHAIN, typical], details)


def spread(value):
    return {"median": value, "min": value, "max": value, "rounds": [value]}


def test_tables(results):
    shown = suite_report.table(results).splitlines()
    assert shown[0] == (
        "suite mini, 2 questions, 24 tokens a turn at most, 1 rounds; float32, int8 "
        "cache; jax 0.10, cpu, 2 CPUs"
    )
    cells = [[c.strip() for c in s[1:-1].split("|")] for s in shown]
    assert ["speed-up", "a", "b", "overall", "tokens/step"] in cells
    assert ["ngram chain:2", "2.00", "1.50", "1.67", "2.13"] in cells
    first = ["a", "none", "8.0", "-", "1.00", "2.0", "1.00", "1.00", "-", "-", "-", "5"]
    assert first in cells
    chain = ["", "ngram chain:2", "8.0", "83 %", "2.67", "4.0", "2.00", "2.00"]
    assert [*chain, "20.0", "5.0", "5.0", "5"] in cells
    sources = "copy 75 %, guess 25 %"
    assert ["ngram chain:2", "8.0", "2.00", "2.13", "60 53 %", "-", sources] in cells
    # Prefill is not known: nothing is told of decoding alone.
    assert ["ngram chain:2 typical", "-", "-"] in [row[:3] for row in cells]
    step = ["ngram chain:2", "1", "10.00", "10 %", "80 %", "10.0 %", "50 %", "40 %"]
    assert step in cells and ["× one node", "1.00", "2.00"] in cells
    text = "\n".join(shown)
    assert "DIFFER FROM PLAIN DECODING: ngram chain:2, T=0, batch 1: 1" in text
    assert "LOSSY: ngram chain:2 typical, T=0, batch 1." in text
    assert "ngram chain:2, T=0, batch 1: a drafter that learns" in text
    assert "target weights 8 MB, read" in text and "\nbatch 1:" in text
    assert "skipped: ngram x: it cannot be" in text and "max_len: 7" in text
    assert "Peak resident memory of the run 9 MB." in text
    for row in (s for s in shown if s.startswith("|")):
        assert row.endswith("|")


def test_types_of_weights_are_compared_with_the_first_one(results, tmp_path):
    """Speed-ups are those over plain decoding of the same weights."""
    kinds = "float32", "int8"
    combinations, lines = [], []
    for kind, quicker in zip(kinds, (1.0, 0.5), strict=True):
        for way, answers in ((PLAIN, PLAIN_LINES), (CHAIN, CHAIN_LINES)):
            combinations.append(dataclasses.replace(way, weights=kind))
            for one in answers:
                seconds = 1 + (one["seconds"] - 1) * quicker
                timed = {"seconds": seconds, "wall_seconds": seconds, "weights": kind}
                lines.append({**one, **timed})
    steps = [
        {"method": "none", "shape": "none", "rule": "exact", "batch": 1}
        | {"weights": kind, "step": 0.01, "target": 0.008, "draft": 0.0}
        | {"draft_share": 0.0, "target_share": 0.8, "rest_share": 0.2}
        | {"target_weight_bytes": size}
        for kind, size in zip(kinds, (8_000_000, 2_000_000), strict=True)
    ]
    points = [{"nodes": n, "seconds": n / 1e3, "ratio": spread(n)} for n in (1, 2)]
    found = {"answer": lines, "stream": [], "step": steps}
    found["curve"] = [{"batch": 1, "weights": kind, "points": points} for kind in kinds]
    found["bandwidth"] = [{"samples": [1e9], "method": "a reading"}]
    header = {"in_force": dict(results["settings"]), "versions": results["versions"]}
    header["in_force"]["benchmark"] = {"rounds": 1, "weights": list(kinds)}
    journal = types.SimpleNamespace(header=header, all=lambda kind: found.get(kind, ()))
    details = {name: results[name] for name in ("suite", "skipped", "left_out")}
    made = suite_report.results(journal, combinations, details)
    ratios = {
        figure["label"]: [
            figure["tasks"]["overall"][name]["median"]
            for name in ("decode_ratio", "decode_ratio_first")
        ]
        for figure in made["figures"]
    }
    assert ratios == {
        "float32 none": [1, 1],
        "float32 ngram chain:2": [2, 2],
        "int8 none": [1, 2],
        "int8 ngram chain:2": [2, 4],
    }
    shown = suite_report.table(made)
    assert "× plain | × float32 plain |" in shown
    assert "; float32, float32 / int8 weights, int8 cache;" in shown
    assert "target weights 8 MB float32, 2 MB int8, read" in shown
    assert "\nfloat32 batch 1:" in shown and "\nint8 batch 1:" in shown
    plots.save_suite(made, tmp_path / "plot.png")


def test_plot(results, tmp_path):
    plots.save_suite(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rule", "temperature", "lossless", "promised"),
    [
        ("exact", 1.0, True, True),
        ("token", 0.0, True, True),
        ("token", 1.0, True, False),
        ("exact", 0.0, False, False),
        ("typical", 0.0, False, False),
    ],
)
def test_which_texts_are_promised_to_be_those_of_plain_decoding(
    rule, temperature, lossless, promised
):
    figure = {"method": "ngram", "rule": rule, "temperature": temperature}
    assert suite_report.keeps_text(figure, lossless) == promised
    peer = {**figure, "method": "transformers"}
    assert not suite_report.keeps_text(peer, lossless)
