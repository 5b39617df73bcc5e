"""scripts/evaluate.py: the loss of a text is that of one causal pass."""

from __future__ import annotations

import json

import numpy as np

from tests.oracles import full_logits
from treespec_jax.checkpoints import load
from treespec_jax.commands.prompts import STORIES

BUNDLED = "treespec_jax/bundled/target"


def test_loss_of_a_text(run_script, tmp_path):
    file, folder = tmp_path / "text.txt", tmp_path / "out"
    file.write_text(" ".join(STORIES))
    kinds = "float32,int8"
    result = run_script(
        "evaluate.py", f"--text={file}", f"--target={BUNDLED}", "--window=16",
        f"--weights={kinds}", "--tokens=40", f"--output={folder}",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "| int8 |" in result.out and "100%" in result.err
    found = json.loads((folder / "results.json").read_text())
    assert list(found["weights"]) == kinds.split(",") and found["tokens"] == 30
    loaded = load(BUNDLED, "float32")
    losses = []
    ids = loaded.tokenizer.encode(file.read_text())
    for window in (ids[:16], ids[16:32]):
        logits = full_logits(loaded.model, window)[:-1].astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        losses += [-log_probs[i, token] for i, token in enumerate(window[1:])]
    full, rounded = found["weights"].values()
    assert abs(full["loss"] - np.mean(losses)) < 1e-4
    assert np.isclose(full["perplexity"], np.exp(full["loss"]))
    assert 0 < abs(rounded["loss"] - full["loss"]) < 0.05
    assert full["same_best"] == 1 and rounded["bytes"] < 0.3 * full["bytes"]


def test_int8_in_bitwise_arithmetic(run_script, tmp_path):
    file, folder = tmp_path / "text.txt", tmp_path / "out"
    file.write_text(" ".join(STORIES))
    result = run_script(
        "evaluate.py", f"--text={file}", f"--target={BUNDLED}", "--window=16",
        "--weights=int8", "--tokens=40", f"--output={folder}", "--exact=bitwise",
    )  # fmt: skip
    assert result.code == 0, result.err
    found = json.loads((folder / "results.json").read_text())["weights"]
    assert list(found) == ["int8", "int8, bitwise"]
    usual, bitwise = found.values()
    assert 0 < abs(usual["loss"] - bitwise["loss"]) < 0.05
    assert usual["bytes"] == bitwise["bytes"]


def test_what_cannot_be(refuses, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("short")
    text = f"--text={file}"
    refuses("int4", "evaluate.py", text, "--weights=int4")
    refuses("--dtype=int8", "evaluate.py", text, "--dtype=int8")
    refuses("--weights=int8", "evaluate.py", text, "--exact=bitwise")
    bitwise = text, "--exact=bitwise", "--weights=int8"
    refuses("--dtype=float32", "evaluate.py", *bitwise, "--dtype=bfloat16")
    refuses("check the path", "evaluate.py", f"--text={tmp_path / 'absent'}")
    refuses("smaller --window", "evaluate.py", text, f"--target={BUNDLED}")
