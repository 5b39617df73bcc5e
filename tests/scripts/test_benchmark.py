"""scripts/benchmark.py end to end on tiny models; no figure is judged."""

from __future__ import annotations

import json

import pytest

from treespec_jax.measurement import machine, step_cost


@pytest.fixture
def pair(files, monkeypatch):
    """Flags of the tiny pair; little memory is read, and few lengths are timed."""
    monkeypatch.setattr(machine, "BYTES", 4 << 20)
    monkeypatch.setattr(step_cost, "CURVE_NODES", (1, 2))
    return [f"--target={files.target}", f"--draft={files.draft}", "--max_len=64"]


@pytest.mark.slow
def test_benchmark(run_script, pair, tmp_path):
    (tmp_path / "p.txt").write_text("the cat\na dog\n")
    folder = tmp_path / "new" / "results"
    result = run_script(
        "benchmark.py",
        *pair,
        f"--prompts_file={tmp_path / 'p.txt'}",
        "--shapes=dynamic:3@2",
        "--max_tokens=10",
        "--rounds=1",
        "--record",
        f"--output={folder}",
    )
    assert result.code == 0, result.err
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["results.json", "results.md", "results.png"]
    assert [p.name for p in folder.parent.iterdir()] == ["results"]
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "results.md").read_text()
    assert table.strip() in result.out
    assert "All shapes emitted the tokens of plain decoding." in table

    report = json.loads((folder / "results.json").read_text())
    assert list(report["shapes"]) == ["none", "dynamic:3@2"]
    for figures in report["shapes"].values():
        assert figures["tokens"] == 20
        assert figures["texts_unlike_plain"] == 0
        assert figures["tokens_per_second"]["median"] > 0
        step = figures["step"]
        assert step["step"] > 0 and step["target"] > 0
        assert figures["bandwidth_share"] > 0
    plain, dynamic = report["shapes"].values()
    assert plain["tokens_per_step"]["max"] == 1 and plain["step"]["draft_share"] == 0
    assert plain["ratio_to_plain"]["median"] == 1
    assert plain["reliability"] is None and "mean gap" in table
    assert 0 <= dynamic["reliability"]["mean_gap"] <= 1
    assert len(dynamic["acceptance_by_rank"]) <= 3
    assert len(dynamic["acceptance_by_depth"]) == 2 and dynamic["step"]["draft"] > 0
    assert [point["nodes"] for point in report["cost_curve"]] == [1, 2]
    assert report["cost_curve"][0]["ratio"]["median"] == 1
    assert report["settings"]["engine"]["max_batch"] == 1
    assert {"jax", "device_kind"} <= set(report["versions"])
    assert report["bandwidth"]["method"] and report["target_weight_bytes"] > 0


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
    check("rounds", out, "--rounds=0")
    check("max_tokens", out, "--max_tokens=0")
    check("none.txt", out, f"--prompts_file={tmp_path / 'none.txt'}")
    check("shaps", out, "--shaps=none")
    check("vocabular", out, f"--draft={files.foreign}", "--shapes=chain:1")
    check("/no/such", out, "--target=/no/such")
    check("tokenizer", out, f"--target={files.bare}", "--shapes=none")


def test_bandwidth_takes_samples():
    read = machine.ReadBandwidth(threads=2, size=1 << 20)
    read.sample(2)
    assert len(read.samples) == 2 and read.best == max(read.samples) > 0
    assert "2 threads" in read.method
