"""scripts/gpu_report.py, and how it reads what XLA compiled."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.conftest import TINY
from treespec_jax.measurement import gpu_kernels
from treespec_jax.models import presets

# Shaped like a module that XLA compiled for a GPU: kernels of every kind in a loop, a
# conditional in it, and a fusion whose inside launches nothing.
MODULE = """
HloModule jit_run

%fused (p.1: f32[4]) -> f32[4] {
  %p.1 = f32[4]{0} parameter(0)
  ROOT %add.1 = f32[4]{0} add(%p.1, %p.1)
}

%branch_a (p.2: f32[4]) -> f32[4] {
  %p.2 = f32[4]{0} parameter(0)
  ROOT %loop_fusion.2 = f32[4]{0} fusion(%p.2), kind=kLoop, calls=%fused
}

%branch_b (p.3: f32[4]) -> f32[4] {
  ROOT %p.3 = f32[4]{0} parameter(0)
}

%condition (p.4: (f32[4], s32[])) -> pred[] {
  %p.4 = (f32[4]{0}, /*index=1*/s32[]) parameter(0)
  ROOT %compare_fusion = pred[] fusion(%p.4), kind=kLoop, calls=%fused
}

%body (p.5: (f32[4], s32[])) -> (f32[4], s32[]) {
  %p.5 = (f32[4]{0}, /*index=1*/s32[]) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p.5), index=0
  %gemm_fusion_dot.1 = f32[4]{0} fusion(%x), kind=kCustom, calls=%fused
  %gemm = f32[4]{0} custom-call(%x), custom_call_target="__cublas$gemm"
  %call.1 = f32[4]{0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton"
  %top = (f32[2]{0}, s32[2]{0}) custom-call(%x), custom_call_target="__gpu$TopK"
  %sorted = f32[4]{0} sort(%x), dimensions={0}, to_apply=%compare
  %copy.1 = f32[4]{0} copy(%x)
  %loop_fusion.1 = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %chosen = f32[4]{0} conditional(%i, %x, %x), branch_computations={%branch_a, %branch_b}
  ROOT %all = (f32[4]{0}, s32[]) tuple(%chosen, %i)
}

ENTRY %main (a: f32[4]) -> (f32[4], s32[]) {
  %a = f32[4]{0} parameter(0)
  %copy.2 = f32[4]{0} copy(%a)
  ROOT %while.1 = (f32[4]{0}, /*index=1*/s32[]) while(%t), condition=%condition, body=%body
}
"""  # noqa: E501


def test_kernels_of_a_module():
    """Those of one turn of the loop, its condition and both branches included."""
    found = gpu_kernels.kernels_of_loop(MODULE)
    assert found == gpu_kernels.Kernels(
        products=2,
        attention=1,
        sorts=2,
        copies=1,
        fusions=3,
        conditionals=1,
        loops=0,
    )
    assert found.total == 9


def test_a_module_without_a_loop_is_refused():
    with pytest.raises(ValueError, match="no loop"):
        gpu_kernels.kernels_of_loop(MODULE.replace(" while(", " call("))


@pytest.fixture
def report(run_script, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return lambda *args: run_script("gpu_report.py", *args)


def test_report(report, tmp_path):
    """What needs no compiler, and what is said where there is none."""
    sizes = ["--target=llama-3.2-1b", "--tree=dynamic:3@2", "--max_len=128"]
    found = report("--lowered_only", *sizes, f"--output={tmp_path / 'out'}")
    assert (found.code, found.err) == (0, "")
    assert "lowered for CUDA" in found.out and "not asked for" in found.out
    data = json.loads((tmp_path / "out/results.json").read_text())
    assert set(data["programs"]) == {
        "greedy",
        "temperature 1",
        "temperature 1, top-p 0.9",
    }
    for program in data["programs"].values():
        counts = program["lowered"]
        assert counts["loops"] == 1
        assert counts["inner_loops"] == counts["conditionals"] == 0
        assert counts["calls"]["__gpu$xla.gpu.triton"] > 16


def test_types_of_weights(report, monkeypatch, tmp_path, refuses):
    """Scales are one operation more per product, rounded rows are several."""
    monkeypatch.setattr(presets, "get", lambda name: TINY)
    flags = "--lowered_only", "--tree=none", "--max_len=64", "--page_size=16"
    kinds = "--weights=bfloat16", "--weights=int8", "--weights=int8 --round_rows"
    counts = []
    for i, kind in enumerate(kinds):
        found = report(*flags, *kind.split(), f"--output={tmp_path / str(i)}")
        assert (found.code, found.err) == (0, "")
        assert f"with {kind.split()[0].partition('=')[2]} weights" in found.out
        assert ("rows rounded to int8" in found.out) == ("round" in kind)
        data = json.loads((tmp_path / str(i) / "results.json").read_text())
        counts.append(data["programs"]["greedy"]["lowered"]["operations"])
    products = 4 * TINY.num_layers
    assert counts[0] + products < counts[1] < counts[1] + products < counts[2]
    mistake = "round_rows is for int8 weights"
    refuses(mistake, "gpu_report.py", *flags, "--round_rows")


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(gpu_kernels.CompilerUnavailable, match="no CUDA plugin"):
        gpu_kernels.device()
