"""scripts/calibrate_drafter.py end to end on tiny models, and who reads its result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from treespec_jax import LLM, SamplingParams
from treespec_jax.checkpoints.calibration import NAME
from treespec_jax.config import DEFAULT_TAU
from treespec_jax.tuning.calibration import accepted_by_rank


@pytest.mark.slow
def test_calibration(run_script, files, tmp_path):
    """The tau is read as the default from then on; a given one wins."""
    draft = tmp_path / "draft"
    shutil.copytree(files.draft, draft)
    before = sorted(p.name for p in draft.iterdir())
    (tmp_path / "p.txt").write_text("the cat\na dog\n")
    result = run_script(
        "calibrate_drafter.py",
        f"--target={files.target}",
        f"--draft={draft}",
        f"--prompts_file={tmp_path / 'p.txt'}",
        "--tree=regular:4",
        "--max_tokens=20",
        "--max_batch=2",
        "--max_len=48",
    )
    assert result.code == 0, result.err
    assert sorted(p.name for p in draft.iterdir()) == sorted([*before, NAME])
    kept = json.loads((draft / NAME).read_text())
    assert kept["tau"] > 0 and kept["families"] > 0 and kept["temperature"] == 1.0
    for name in ("before", "after"):
        bins = kept[f"reliability_{name}"]
        assert len(bins) == 10 and sum(row["nodes"] for row in bins) > 0
    assert sum(kept["accepted_by_rank"]) == kept["families"]
    assert f"tau {kept['tau']:.3f} (was {DEFAULT_TAU:g})" in result.out
    assert (
        "estimated probability" in result.out and "by rank among siblings" in result.out
    )

    def tau(**more):
        llm = LLM(
            files.target,
            speculative=dict(model=str(draft), tree="regular:4", **more),
            max_batch=2,
            max_len=48,
            record=True,
        )
        return llm

    llm = tau()
    assert llm.drafter.tau == kept["tau"]
    assert tau(tau=0.3).drafter.tau == 0.3
    # One record a step, whose accepted nodes are those of the statistics.
    (one,) = llm.generate([[5, 6]], SamplingParams(max_tokens=12, ignore_eos=True))
    assert len(one.records) == one.stats.steps
    accepted = sum(len(record.accepted) for record in one.records)
    assert accepted - one.stats.accepted in (0, 1), "but for what max_tokens cut off"
    by_rank = accepted_by_rank(one.records[:-1])
    last = one.records[-1].accepted
    for rank, count in enumerate(one.stats.rank_counts):
        known = by_rank[rank] if rank < len(by_rank) else 0
        assert known <= count <= known + len(last)


def test_mistakes(refuses, files, tmp_path):
    def check(expected, *args):
        refuses(expected, "calibrate_drafter.py", *pair, *args)
        assert not (Path(files.draft) / NAME).exists()

    pair = [f"--target={files.target}", f"--draft={files.draft}"]
    check("no siblings", "--tree=chain:3")
    check("no siblings", "--tree=none", f"--draft={files.draft}")
    check("none.txt", f"--prompts_file={tmp_path / 'none.txt'}")
    check("cannot write", f"--output={tmp_path / 'none' / 'x.json'}")
    check("temperature", "--temperature=-1")
    check("/no/such", "--draft=/no/such")
