"""scripts/benchmark.py: what it combines, refuses and resumes; end to end when slow."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest

from treespec_jax.commands import benchmark, benchmark_job
from treespec_jax.commands.settings import BenchmarkSettings, Experiment
from treespec_jax.config import SpeculativeConfig
from treespec_jax.errors import UserError
from treespec_jax.measurement import (
    machine,
    peers,
    suite,
)
from treespec_jax.measurement.grid import Combination, schedule
from treespec_jax.measurement.journal import FILE

KINDS = "float32", "int8"


def test_an_interrupted_run_goes_on(bench, fake, tmp_path):
    """It asks what is missing, and ends as if nothing had happened."""
    folder = tmp_path / "results"
    fake.stop_after = 7
    stopped = bench("--rounds=2", "--latency_tokens=4")
    assert stopped.code == 130 and stopped.err.splitlines()[-1] == "interrupted"
    assert "repeat the command" in stopped.err
    # All answers of the first round are there, and the stream of one.
    lines = (folder / FILE).read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["header", *["answer"] * 6, "stream"]
    assert [p.name for p in folder.iterdir()] == [FILE]
    fake.asked.clear()
    fake.stop_after = 10**9
    # A killed process may leave a part of a line.
    (folder / FILE).write_text("\n".join([*lines, lines[-1][:40]]))
    done = bench("--rounds=2", "--latency_tokens=4")
    assert done.code == 0, done.err
    assert len(fake.asked) == (6 - 1) + 6
    assert (folder / FILE).read_text().splitlines()[:8] == lines
    shown = (folder / "results.md").read_text()
    assert shown.strip() in done.out and "2 rounds" in shown
    report = json.loads((folder / "results.json").read_text())
    plain, chain = (figure["tasks"]["overall"] for figure in report["figures"])
    assert plain["questions"] == chain["questions"] == 3
    assert chain["speed_up"]["rounds"] == [pytest.approx(2.0)] * 2
    assert chain["tokens_per_step"] == 2 and chain["acceptance_rate"] == 1
    assert chain["inter_token_p50"] == pytest.approx(0.05)
    assert chain["first_token_seconds"] == pytest.approx(0.1)
    assert (chain["memory_bytes"], plain["texts_unlike_plain"]) == (80, 0)
    again = bench("--rounds=2", "--latency_tokens=4")
    assert again.code == 0 and again.out == done.out
    assert len(fake.asked) == (6 - 1) + 6, "all was there"


def test_results_of_other_settings_stay(bench, fake, refuses, pair, tmp_path):
    folder = tmp_path / "results"
    assert bench("--rounds=1").code == 0
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for flag, expected in {
        "--seed=3": "sampling.seed=0, not 3",
        "--rounds=2": "benchmark.rounds=1, not 2",
        "--shapes=chain:2": 'benchmark.shapes=["chain:1"], not ["chain:2"]',
        "--questions=2": "benchmark.questions=0, not 2",
    }.items():
        told = bench("--rounds=1", flag)
        assert told.code == 2 and told.out == ""
        assert len(told.err.splitlines()) == 1 and expected in told.err, told.err
        assert "--overwrite" in told.err
    (tmp_path / "p.txt").write_text("another\n")
    assert "questions=" in bench("--rounds=1").err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert bench("--rounds=1", "--overwrite").code == 0
    report = json.loads((folder / "results.json").read_text())
    assert report["suite"]["questions"] == 1


def test_a_grid_runs_all_that_can_be(bench, fake, tmp_path):
    told = bench(
        "--rounds=1",
        "--methods=none,ngram,draft_model",
        "--shapes=chain:1,dynamic:3@2",
        "--rules=exact,block",
        "--temperatures=0,1",
        "--batches=1,2",
    )
    assert told.code == 0, told.err
    skipped = [s for s in told.err.splitlines() if s.startswith("skipped")]
    names = ["ngram dynamic:3@2 block", "draft_model dynamic:3@2 block"]
    assert [s.split(": ")[1] for s in skipped] == names
    assert all("chains only" in line for line in skipped)
    report = json.loads((tmp_path / "results" / "results.json").read_text())
    labels = [figure["label"] for figure in report["figures"]]
    one = ["none", *(f"{m} {s}" for m in ("ngram", "draft_model") for s in SHAPES)]
    assert labels == one * 4
    shown = (tmp_path / "results" / "results.md").read_text()
    for title in ("T=0, batch 1", "T=1, batch 1", "T=0, batch 2", "T=1, batch 2"):
        assert f"### {title}" in shown


SHAPES = ("chain:1", "chain:1 block", "dynamic:3@2")


def test_questions_that_do_not_fit_are_left_out(bench, fake, tmp_path):
    (tmp_path / "p.txt").write_text("a dog\n" + "a very long tale " * 20 + "\n")
    told = bench("--rounds=1", "--max_len=64")
    assert told.code == 0 and "left out, too long for max_len: 2" in told.err
    report = json.loads((tmp_path / "results" / "results.json").read_text())
    assert report["left_out"] == ["2"] and report["suite"]["questions"] == 1
    assert bench("--max_len=14").code == 2
    assert "no question of suite" in bench("--max_len=14").err


def combinations(grid, **changes):
    settings = Experiment(benchmark=BenchmarkSettings(**grid), **changes)
    return benchmark_job.combinations(settings)


def test_plain_decoding_is_always_there():
    possible, skipped = combinations({"shapes": ("chain:2",), "batches": (1, 4)})
    chain = Combination("auto", "chain:2", "exact", 0.0, 1)
    assert list(possible)[:2] == [chain.baseline, chain] and skipped == []
    assert [c.batch for c in possible] == [1, 1, 4, 4]
    assert possible[chain].engine.max_batch == 1 and possible[chain.baseline].plain
    possible, _ = combinations({"shapes": ("chain:2", "none"), "methods": ("none",)})
    assert all(combination.plain for combination in possible)


def test_types_of_weights_take_turns_with_each_other():
    grid = {"shapes": ("chain:2",), "weights": KINDS, "peers": ("transformers",)}
    possible, skipped = combinations({**grid, "batches": (1,)}, weights="bfloat16")
    ours = [(c.weights, c.shape) for c in possible if not c.peer]
    assert ours == [(w, shape) for w in KINDS for shape in ("none", "chain:2")]
    assert all(one.weights == c.weights for c, one in possible.items())
    assert {c.weights for c in possible if c.peer} == {"float32"}
    assert any("floating point" in one["reason"] for one in skipped)
    question = suite.Question("1", "a", ("once",))
    tasks = list(schedule([c for c in possible if not c.peer], [question], 1))
    assert [task.combination.weights for task in tasks] == ["float32"] * 2 + [
        "int8"
    ] * 2
    # Without the flag the one type of the settings stays.
    possible, _ = combinations({"shapes": ("chain:2",)}, weights="int8")
    assert [c.label for c in possible] == ["int8 none", "int8 auto chain:2"]
    with pytest.raises(UserError, match="weights must be one of"):
        BenchmarkSettings(weights=("float32", "int4"))


def test_types_of_weights_need_room_together(bench, fake, monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 5_000)
    assert bench("--rounds=1", "--weights=int8").code == 0
    told = bench("--rounds=1", "--weights=float32,int8", "--overwrite")
    assert told.code == 2 and "in memory together" in told.err
    assert "give fewer types" in told.err.splitlines()[-1]


def test_peers_decode_one_text_at_a_time():
    grid = {"shapes": ("none",), "peers": ("transformers",), "batches": (1, 2)}
    spec = SpeculativeConfig(model="there")
    possible, skipped = combinations(grid)
    found = [c.label for c in possible if c.peer]
    assert found == ["transformers plain", "transformers prompt_lookup"]
    reasons = {one["what"]: one["reason"] for one in skipped}
    assert "needs a drafter" in reasons["transformers assisted, batch 1"]
    assert "one text at a time" in reasons["transformers plain, batch 2"]
    named = combinations({"shapes": ("chain:2",)}, speculative=spec)[0]
    assert [c.method for c in named] == ["none", "draft_model"]
    possible, _ = combinations(grid, speculative=spec)
    assert [c.shape for c in possible if c.peer] == list(peers.KINDS)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(UserError, match="nothing to compare: ngram regular:2 block"):
        combinations(
            {"methods": ("ngram",), "shapes": ("regular:2",), "rules": ("block",)}
        )


def test_quick_gives_way_to_flags_and_wins_over_files(
    run_script, monkeypatch, tmp_path
):
    found = []

    def make(settings):
        found.append(settings)
        raise UserError("enough")

    monkeypatch.setattr(benchmark_job, "make", make)
    (tmp_path / "c.py").write_text(
        "from treespec_jax.commands.settings import default_config\n"
        "def get_config():\n    config = default_config()\n"
        "    config.benchmark.rounds = 9\n    config.sampling.seed = 4\n"
        "    return config\n"
    )
    run_script(
        "benchmark.py",
        "--output=x",
        "--quick",
        f"--config={tmp_path / 'c.py'}",
        "--max_tokens=99",
    )
    (settings,) = found
    quick = {key.split(".")[1]: value for key, value in benchmark._QUICK.items()}
    for name, value in quick.items():
        if name != "max_tokens":
            assert getattr(settings.benchmark, name) == value
    assert settings.sampling.max_tokens == 99 and settings.sampling.seed == 4


@pytest.mark.slow
def test_benchmark(run_script, pair, tmp_path):
    """All of it, on the tiny pair."""
    rows = [
        {"question_id": 1, "category": "cats", "turns": ["the cat", "a dog"]},
        {"question_id": 2, "category": "dogs", "turns": ["a dog"]},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "new" / "results"
    command = (
        "benchmark.py",
        *pair,
        "--max_len=64",
        "--prefill_chunks=16",
        f"--suite=file:{tmp_path / 'q.jsonl'}",
        "--shapes=dynamic:3@2",
        "--weights=float32,int8",
        "--max_tokens=10",
        "--latency_tokens=4",
        "--rounds=1",
        "--record",
        "--ignore_eos",
        "--verify_lossless",
        f"--output={folder}",
    )
    result = run_script(*command)
    assert result.code == 0, result.err
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["results.json", "results.md", "results.png", FILE]
    assert [p.name for p in folder.parent.iterdir()] == ["results"]
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "results.md").read_text()
    assert table.strip() in result.out
    assert "Whatever keeps the text emitted the tokens of plain decoding." in table
    assert "mean gap" in table and "### Parts of a step" in table

    report = json.loads((folder / "results.json").read_text())
    labels = [figure["label"] for figure in report["figures"]]
    drafted = "draft_model dynamic:3@2"
    assert labels == [f"{w} {way}" for w in KINDS for way in ("none", drafted)]
    plain, dynamic, int8_plain, _ = report["figures"]
    assert int8_plain["tasks"]["overall"]["decode_ratio_first"]["median"] > 0
    both = [
        figure["tasks"]["overall"]["memory_bytes"] for figure in (plain, int8_plain)
    ]
    assert both[0] > 1.5 * both[1]
    for figure in report["figures"]:
        assert list(figure["tasks"]) == ["cats", "dogs", "overall"]
        overall = figure["tasks"]["overall"]
        assert overall["tokens"] == 30 and overall["mean_length"] == 15
        assert overall["texts_unlike_plain"] == 0 and overall["memory_bytes"] > 1000
        assert 0 < overall["inter_token_p50"] <= overall["inter_token_p95"]
        assert overall["first_token_seconds"] > 0
        assert overall["decode_tokens_per_second"]["median"] > 0
    assert plain["tasks"]["cats"]["speed_up"]["median"] == 1
    overall = dynamic["tasks"]["overall"]
    assert 0 <= overall["reliability"]["mean_gap"] <= 1
    assert len(overall["acceptance_by_depth"]) == 2
    assert overall["memory_bytes"] > plain["tasks"]["overall"]["memory_bytes"]

    verified = report["exactness"]
    assert [one["weights"] for one in verified] == list(KINDS)
    assert [(v["texts"], v["equal"], v["tokens"]) for v in verified] == [
        (3, 30, 30)
    ] * 2
    assert verified[0]["probe"]["rows"] == 4

    found = report["breakdown"]
    plain_step, dynamic_step, int8_step, _ = found["steps"]
    sizes = [step["target_weight_bytes"] for step in (plain_step, int8_step)]
    assert sizes[0] > 3 * sizes[1] > 0
    assert plain_step["draft_share"] == 0 and dynamic_step["draft"] > 0
    for step in found["steps"]:
        assert step["step"] > 0 and step["target"] > 0 and step["bandwidth_share"] > 0
    curve, int8_curve = found["cost_curves"]
    assert (curve["weights"], int8_curve["weights"]) == KINDS
    assert [point["nodes"] for point in curve["points"]] == [1, 2]
    assert curve["points"][0]["ratio"]["median"] == 1
    assert found["bandwidth"]["method"]
    assert report["settings"]["engine"]["max_batch"] == 1
    assert {"jax", "device_kind"} <= set(report["versions"])
    again = run_script(*command)
    assert again.out == result.out and "compiling" not in again.err


def test_mistakes(refuses, pair, files, tmp_path):
    def check(expected, *args):
        refuses(expected, "benchmark.py", *pair, *args)
        assert list(tmp_path.iterdir()) == before

    taken = tmp_path / "taken"
    taken.write_text("")
    out = f"--output={tmp_path / 'results'}"
    before = list(tmp_path.iterdir())
    check("--output")
    check("taken", f"--output={taken}")
    check("taken", f"--output={taken / 'results'}")
    check("regular:0", out, "--shapes=none,regular:0")
    check("--shapes=chain:3", out, "--shapes=")
    check("rounds", out, "--rounds=0")
    check("max_tokens", out, "--max_tokens=0")
    check("latency_tokens", out, "--latency_tokens=-1")
    check("none.txt", out, f"--suite=file:{tmp_path / 'none.txt'}")
    check("suite 'minni' is unknown", out, "--suite=minni")
    check("method 'ngrm' is unknown", out, "--methods=ngrm")
    check("rule 'exakt' is unknown", out, "--rules=exakt")
    check("peer 'vllm' is unknown", out, "--peers=vllm")
    check("--batches=1,x", out, "--batches=1,x")
    check("batches", out, "--batches=0")
    check("temperature", out, "--temperatures=-1")
    check("shaps", out, "--shaps=none")
    check("vocabular", out, f"--draft={files.foreign}", "--shapes=chain:1")
    check("/no/such", out, "--target=/no/such")
    check("tokenizer", out, f"--target={files.bare}", "--shapes=none")
    check("nothing to compare", out, "--shapes=regular:2", "--rules=block")
    verify = out, "--verify_lossless"
    check("promises those of plain decoding", *verify, "--shapes=none")
    sampled = "--shapes=chain:1", "--rules=block", "--temperature=1"
    check("promises those of plain decoding", *verify, *sampled)
    check("max_time=2 ends texts anywhere", *verify, "--max_time=2")
    alone = "--distributed", "--nobreakdown"
    check("--verify_lossless runs in one process", *verify, *alone)


def test_a_bad_flag_answers_before_jax_starts(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys\nfrom treespec_jax import cli\n"
        "try:\n    cli.main(['treespec', 'benchmark', '--output=x', '--suite=minni'])\n"
        "except SystemExit as e:\n"
        "    print(e.code, *sorted({'jax', 'torch'} & set(sys.modules)))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert told.stdout.splitlines()[-1] == "2", told


def test_bandwidth_takes_samples():
    read = machine.ReadBandwidth(threads=2, size=1 << 20)
    read.sample(2)
    assert len(read.samples) == 2 and read.best == max(read.samples) > 0
    assert "2 threads" in read.method


def test_peak_memory_is_that_of_this_process():
    before = machine.peak_rss_bytes()
    block = np.ones(32 << 20, np.uint8)
    assert machine.peak_rss_bytes() >= before > 16 << 20
    assert machine.peak_device_bytes() is None and block.nbytes


def test_experiment_keeps_grid_values_once():
    grid = BenchmarkSettings(temperatures=(0, "0.0", 1), methods="ngram")
    assert grid.temperatures == (0.0, 1.0) and grid.methods == ("ngram",)
    assert dataclasses.replace(grid, shapes=("chain:1",) * 2).shapes == ("chain:1",)
    with pytest.raises(UserError, match="breakdown"):
        BenchmarkSettings(breakdown="no")
