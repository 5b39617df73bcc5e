"""scripts/tune_kernel.py: a table, resumed at once, and mistakes."""

from __future__ import annotations

import pytest

from pallas_kernels.tree_attention import tuning


@pytest.fixture
def small_space(monkeypatch):
    space = {"block_rows": (256,), "unroll": (1, 2), "rows": (64,)}
    monkeypatch.setattr(tuning, "_SPACE", space)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_search_and_resume(
    tpu_compiler, small_space, run_script, tmp_path, monkeypatch
):
    given = ["--rows=16", "--kv_heads=2", "--max_batch=2", f"--work={tmp_path}"]
    first = run_script("tune_kernel.py", *given)
    assert first.code == 0, first
    assert "TPU v5 lite: cost is compiler's estimate" in first.out
    (row,) = [line for line in first.out.splitlines() if line.startswith("| 16 ")]
    cost, default = (float(cell) for cell in row.split("|")[5:7])
    assert 0 < cost <= default
    monkeypatch.setattr(tuning, "estimate_trial", lambda *_: pytest.fail("again"))
    assert run_script("tune_kernel.py", *given).out == first.out


@pytest.mark.parametrize(
    ("expected", "args"),
    [
        ("--rows=8,9 must be of 8, 16, 32", ["--rows=8,9"]),
        ("unknown TPU topology 'v9'", ["--topology=v9"]),
        ("--measure needs a TPU", ["--measure"]),
    ],
)
def test_mistakes(tpu_compiler, refuses, monkeypatch, tmp_path, expected, args):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    refuses(expected, "tune_kernel.py", f"--work={tmp_path}", *args)
