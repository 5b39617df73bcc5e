"""scripts/tpu_report.py: tables, JSON and mistakes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest

from pallas_kernels.aot import compiler
from treespec_jax.models import presets


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


@pytest.mark.slow
def test_types_of_weights(tpu_compiler, report, monkeypatch, tmp_path):
    """int8 halves what lies in memory and what a step has to read of it."""
    narrow = dict(vocab_size=8192, mlp_dim=1024, num_layers=1)
    model = dataclasses.replace(presets.get("llama-3.2-1b"), **narrow)
    monkeypatch.setattr(presets, "get", lambda name: model)
    flags = "--step_only", "--tree=none", "--max_len=128", "--max_batch=1"
    steps = []
    for i, kind in enumerate(("bfloat16", "int8", "int8 --round_rows")):
        out = f"--output={tmp_path / str(i)}"
        result = report(*flags, *f"--weights={kind}".split(), out)
        assert (result.code, result.err) == (0, "")
        assert f"with {kind.partition(' ')[0]} weights" in result.out
        data = json.loads((tmp_path / str(i) / "results.json").read_text())
        assert data["job"]["round_rows"] == ("round" in kind)
        steps.append(data["step"])
    for name in ("argument_bytes", "least_bytes"):
        wide, *narrow = (step[name] for step in steps)
        for size in narrow:
            assert 0.5 < size / wide < 0.55
    # As read, but for one more pass over the table; the products are other ones.
    moved = [sum(step["traffic"].values()) for step in steps]
    assert max(moved[1:]) < 0.8 * moved[0]
    assert steps[2]["flops"] != steps[1]["flops"]


@pytest.mark.parametrize(
    ("expected", "args"),
    [
        ("unknown TPU topology 'v9:2x2'; choose from v4:2x2x1", ["--topology=v9:2x2"]),
        ("no model is called 'llama-9'", ["--target=llama-9"]),
        ("whole numbers", ["--nodes=2,many"]),
        ("nodes must be a whole number >= 1", ["--nodes=0"]),
        ("dtype 'int4' is unknown", ["--dtype=int4"]),
        ("layers must be a whole number >= 0", ["--layers=-1"]),
        ("round_rows is for int8 weights", ["--round_rows", "--weights=bfloat16"]),
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
