"""scripts/measure_rules.py end to end on a tiny target; no figure is judged."""

from __future__ import annotations

import dataclasses
import json

import pytest

from treespec_jax.measurement import rule_cost


@pytest.mark.slow
def test_measurement(run_script, tmp_path, monkeypatch):
    tiny = dict(vocab_size=256, embed_dim=16, mlp_dim=16, num_heads=2, num_kv_heads=1)
    target = dataclasses.replace(rule_cost._TARGET, head_dim=8, **tiny)
    monkeypatch.setattr(rule_cost, "_TARGET", target)
    cases = [c for c in rule_cost.CASES if c.split()[0] in ("terminal", "typical")]
    monkeypatch.setattr(rule_cost, "CASES", tuple(cases))
    folder = tmp_path / "results"
    result = run_script("measure_rules.py", "--rounds=1", f"--output={folder}")
    assert result.code == 0, result.err
    assert f"(2 of {len(cases)})" in result.err
    assert "round 1 of 1, about " in result.err and "s to go" in result.err
    assert sorted(p.name for p in folder.iterdir()) == ["results.json", "results.md"]
    assert (folder / "results.md").read_text().strip() in result.out
    report = json.loads((folder / "results.json").read_text())
    assert (report["nodes"], report["vocab"], report["rounds"]) == (64, 256, 1)
    assert set(report["rules"]) == set(cases)
    for figures in report["rules"].values():
        assert figures["draw_seconds"] > 0
        for kind in "usual", "most":
            assert figures[kind]["seconds"]["median"] > 0


def test_mistakes(refuses, tmp_path):
    out = f"--output={tmp_path / 'results'}"
    refuses("--output", "measure_rules.py")
    refuses("rounds", "measure_rules.py", out, "--rounds=0")
    refuses("top_p", "measure_rules.py", out, "--top_p=0")
    refuses("temperature", "measure_rules.py", out, "--temperature=-1")
    assert list(tmp_path.iterdir()) == []
