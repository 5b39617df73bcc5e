"""scripts/benchmark_attention.py end to end on a tiny layer; no figure is judged."""

from __future__ import annotations

import json

import pytest

TINY = [
    "--max_batch=2", "--prefix=20", "--nodes=1,3", "--heads=4", "--kv_heads=2",
    "--head_dim=16", "--page_size=8", "--dtype=float32", "--copy_mib=1", "--matrix=32",
    "--rounds=2", "--calls=2",
]  # fmt: skip


@pytest.mark.slow
def test_benchmark_attention(run_script, tmp_path):
    folder = tmp_path / "results"
    result = run_script("benchmark_attention.py", *TINY, f"--output={folder}")
    assert result.code == 0, result.err
    table = (folder / "results.md").read_text()
    assert table.strip() in result.out and "2 texts × 20 tokens" in table
    report = json.loads((folder / "results.json").read_text())
    assert report["ceilings"]["copy_bytes_per_s"] > 0
    assert report["ceilings"]["matmul_flop_per_s"] > 0
    assert {"jax", "device_kind"} <= set(report["versions"])
    entries = {(r["method"], r["nodes"]): r for r in report["results"]}
    methods = ("tree_attention", "xla gathered", "nn xla", "nn cudnn")
    assert list(entries) == [(m, T) for T in (1, 3) for m in methods]
    for (method, T), entry in entries.items():
        if method == "nn cudnn":  # not on a CPU; the rest goes on
            assert "cuDNN" in entry["unavailable"] and "error" not in entry
            continue
        assert entry["error"] < 1e-5
        assert len(entry["samples"]) == 2
        assert entry["seconds"]["least"] <= entry["seconds"]["median"]
        assert entry["bandwidth_share"] > 0 and entry["matmul_share"] > 0
        ratio = entry["paired"]["median"]
        assert ratio == 1 if T == 1 else ratio > 0


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--nodes=1,x", "--nodes=1,x: give whole numbers"),
        ("--nodes=0", "nodes=(0,): want one or more positive numbers"),
        ("--kv_heads=3", "kv_heads=3 does not divide heads=4"),
        ("--dtype=int8", "dtype=int8: want bfloat16, float16 or float32"),
        ("--rounds=0", "rounds=0: want at least 1"),
    ],
)
def test_mistakes_are_one_line(refuses, flag, message):
    refuses(message, "benchmark_attention.py", *TINY, flag)


def test_an_implementation_that_cannot_run_says_why(run_script):
    result = run_script("benchmark_attention.py", *TINY, "--implementation=magic")
    assert result.code == 2
    assert "no implementation 'magic'" in result.err
