"""scripts/calibrate_drafter.py end to end on tiny models, and who reads its result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from treespec_jax import LLM, SamplingParams
from treespec_jax.checkpoints import load
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
    picture = NAME.replace(".json", ".png")
    assert sorted(p.name for p in draft.iterdir()) == sorted([*before, NAME, picture])
    assert (draft / picture).read_bytes().startswith(b"\x89PNG")
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


@pytest.mark.slow
def test_heads_of_a_chat_model(run_script, chat_pair, tmp_path, monkeypatch):
    """Prompts are conversations, --system in front; what --draft is decides."""
    folder, heads = chat_pair / "target", tmp_path / "heads"
    target = load(folder, "float32")
    width = target.config.embed_dim
    heads.mkdir()
    tensors = {
        "0.0.linear.weight": np.zeros((width, width), np.float32),
        "0.0.linear.bias": np.zeros(width, np.float32),
        # With the noise of the target it is right now and then.
        "0.1.weight": np.ascontiguousarray(np.asarray(target.model.head[...])),
    }
    save_file(tensors, heads / "medusa_lm_head.safetensors")
    (tmp_path / "p.txt").write_text("the cat\na dog\n")
    seen, chat = [], LLM.chat

    def watched(llm, messages, *args, **more):
        seen.extend(messages)
        return chat(llm, messages, *args, **more)

    monkeypatch.setattr(LLM, "chat", watched)
    result = run_script(
        "calibrate_drafter.py",
        f"--target={folder}",
        f"--draft={heads}",
        f"--prompts_file={tmp_path / 'p.txt'}",
        *("--chat", "--system=be kind", "--tree=regular:8", "--max_tokens=24"),
        *("--max_batch=2", "--max_len=128", "--nocheck_drafter"),
    )
    assert result.code == 0, result.err
    opening = {"role": "system", "content": "be kind"}
    assert seen == [
        [opening, {"role": "user", "content": text}] for text in ("the cat", "a dog")
    ]
    found = json.loads((heads / NAME).read_text())
    speculative = dict(model=str(heads), tree="regular:8", check_drafter=False)
    llm = LLM(str(folder), speculative=speculative, max_batch=1, max_len=128)
    assert llm.drafter.tau == found["tau"] and found["families"] > 0


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
    check("--system needs --chat", "--system=be kind")
    check("no chat template", "--chat")
