"""Checkpoints described without their weights; limits checked on descriptions."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from treespec_jax import limits
from treespec_jax.checkpoints import describe, load, save
from treespec_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"


def test_description_is_that_of_the_loaded_model(tmp_path):
    loaded = load(GOLDEN / "llama_tied")
    save(loaded, tmp_path / "native", "bfloat16")
    for path in (GOLDEN / "llama_tied", tmp_path / "native"):
        about = describe(path)
        assert about.config == loaded.config == load(path).config
        assert about.path == path
    assert about.dtype == "bfloat16"


def test_weights_are_not_read(tmp_path):
    save(load(GOLDEN / "llama_tied"), tmp_path / "native")
    for file in (tmp_path / "native" / "params").rglob("*"):
        if file.is_file():
            file.unlink()
    describe(tmp_path / "native")
    with pytest.raises(UserError):
        load(tmp_path / "native")


def test_missing_and_unknown(tmp_path):
    for path in (tmp_path / "none", tmp_path, ROOT / "LICENSE"):
        with pytest.raises(UserError, match=path.name):
            describe(path)


def test_jax_is_not_started():
    code = (
        "import sys; from treespec_jax import checkpoints, limits\n"
        f"checkpoints.describe({str(GOLDEN / 'llama_tied')!r})\n"
        "print('jax' in sys.modules, 'flax' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.stdout == "False False\n", result.stderr


def test_limits():
    target = describe(GOLDEN / "llama_tied")
    positions = target.config.max_positions
    short = dataclasses.replace(
        target, config=dataclasses.replace(target.config, max_positions=8)
    )
    wide = dataclasses.replace(
        target,
        config=dataclasses.replace(target.config, vocab_size=3),
        tokenizer=None,
    )
    assert limits.check_pair(target, short) == limits.check_pair(target, None) == []
    with pytest.raises(UserError, match="the drafter has 3 tokens"):
        limits.check_pair(target, wide)
    assert limits.text_length(None, target, None) == min(positions, 4096)
    assert limits.text_length(None, target, short) == 8
    assert limits.text_length(7, target, short) == 7
    with pytest.raises(UserError, match="max_len=9 is past the drafter's 8"):
        limits.text_length(9, target, short)
    limits.check_tree(7, 8)
    with pytest.raises(UserError, match="depth 8 does not fit max_len=8"):
        limits.check_tree(8, 8)
    limits.check_tokens([0, 111], 112)
    for token in (-1, 112):
        with pytest.raises(UserError, match=f"id {token} is outside the vocabulary of"):
            limits.check_tokens([3, token], 112)
    limits.check_prompt([1] * 7, 8)
    with pytest.raises(UserError, match="8 tokens"):
        limits.check_prompt([1] * 8, 8)
    with pytest.raises(UserError, match="empty"):
        limits.check_prompt([], 8)
