"""scripts/tpu_report.py: tables, JSON and mistakes."""

from __future__ import annotations

import importlib.util
import json

import pytest

from pallas_kernels.aot import compiler


@pytest.fixture
def report(run_script, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return lambda *args: run_script("tpu_report.py", *args)


def test_kernel(tpu_compiler, report, tmp_path):
    given = ["--kernel_only", "--target=llama-3-8b", "--nodes=2,16", "--max_len=1024"]
    result = report(*given, f"--output={tmp_path / 'out'}")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("Compiler's estimates, not measurements: TPU v5 lite")
    rows = [line.split("|")[1:3] for line in result.out.splitlines() if "|" in line]
    assert [[x.strip() for x in row] for row in rows[2:]] == [["2", "8"], ["16", "64"]]
    assert (tmp_path / "out/results.md").read_text() in result.out
    data = json.loads((tmp_path / "out/results.json").read_text())
    assert data["source"] == "compiler's estimates"
    assert set(data["kernel"]) == {"2", "16"} and "step" not in data
    assert data["kernel"]["16"]["prefix"]["copied"] == 65536


@pytest.mark.parametrize(
    ("expected", "args"),
    [
        ("unknown TPU topology 'v9:2x2'; choose from v4:2x2x1", ["--topology=v9:2x2"]),
        ("no model is called 'llama-9'", ["--target=llama-9"]),
        ("whole numbers", ["--nodes=2,many"]),
        ("nodes must be a whole number >= 1", ["--nodes=0"]),
        ("dtype 'int4' is unknown", ["--dtype=int4"]),
        ("layers must be a whole number >= 0", ["--layers=-1"]),
        ("give tensor:N", ["--mesh=4"]),
        ("tree", ["--tree=shrub", "--step_only"]),
    ],
)
def test_mistakes(refuses, monkeypatch, expected, args):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    refuses(expected, "tpu_report.py", *args)


def test_missing_compiler(refuses, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        compiler.importlib.util,
        "find_spec",
        lambda name, *a: None if name == "libtpu" else find(name, *a),
    )
    refuses("pip install 'jax[tpu]'", "tpu_report.py", "--kernel_only", "--nodes=2")
