"""measure_costs end to end on tiny models; no time is judged."""

from __future__ import annotations

import json

import pytest

from treespec_jax import LLM
from treespec_jax.cost_file import CostFile
from treespec_jax.engine.costs import Known, Load
from treespec_jax.trees import shapes


@pytest.mark.slow
def test_costs_are_measured_kept_and_read(run_script, files, tmp_path):
    sizes = dict(max_len=64, steps_per_dispatch=2, max_batch=2)
    result = run_script(
        "measure_costs.py",
        f"--target={files.target}",
        f"--draft={files.draft}",
        "--method=draft_model",
        *(f"--{name}={value}" for name, value in sizes.items()),
        "--nodes=4",
        "--contexts=9,20",
        f"--output={tmp_path / 'out'}",
    )
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert (tmp_path / "out/results.png").stat().st_size > 10_000
    one = found["contexts"]["20"]
    assert [rows for rows, _ in one["verify"]] == [2, 4, 8]
    assert all(seconds > 0 for _, seconds in one["verify"])
    assert [s["shape"] for s in one["shapes"]][0] == "none"
    assert "| dynamic:31@7 |" in result.out and "After 9 tokens" in result.out
    # The same models and sizes find them.
    llm = LLM(
        files.target,
        speculative={"method": "draft_model", "model": files.draft},
        **sizes,
    )
    costs, load = llm.engine.costs, Load.of(1, 20)
    for shape in one["shapes"]:
        relative = costs.relative(shapes.parse(shape["shape"]), load)
        assert relative == pytest.approx(shape["relative"])


def test_files_that_cannot_be_used_are_like_none(costs_folder):
    file = CostFile({"device": "x"}, True, False, 1)
    known = Known(steps={(Load.of(1, 0), "dynamic:7@4"): [1.5, 2.0]})
    file.write(known)
    assert file.path.parent.parent == costs_folder and file.read() == known
    for wrong in ("{", "{}", '{"about": {"device": "x"}, "curves": 3, "steps": []}'):
        file.path.write_text(wrong)
        assert file.read() == Known()
    other = CostFile({"device": "y"}, True, False, 1)
    assert other.path != file.path and other.read() == Known()
    file.path.unlink()
    file.path.mkdir()
    file.write(known)
    assert file.read() == Known()


def test_mistakes(run_script, files):
    def check(words: str, *flags: str):
        result = run_script("measure_costs.py", f"--target={files.target}", *flags)
        assert result.code == 2 and words in result.err, result.err
        assert result.err.count("\n") == 1

    check("--contexts is empty", "--contexts=")
    check("lower it or raise --max_len", "--contexts=60", "--max_len=64")
    check("contexts must be", "--contexts=0")
    check("nodes must be", "--nodes=1")
    check("leaves nothing to choose", "--method=none")
