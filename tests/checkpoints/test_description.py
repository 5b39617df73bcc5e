"""Checkpoints described without their weights; limits checked on descriptions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from treespec_jax import limits
from treespec_jax.checkpoints import describe, load, save
from treespec_jax.checkpoints.tokenizers import check_pair
from treespec_jax.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def test_weights_are_not_read(tmp_path):
    save(load(GOLDEN / "llama_tied"), tmp_path / "native")
    for file in (tmp_path / "native" / "params").rglob("*"):
        if file.is_file():
            file.unlink()
    describe(tmp_path / "native")
    with pytest.raises(UserError):
        load(tmp_path / "native")


@pytest.mark.parametrize("read", [describe, load])
def test_paths_that_hold_no_checkpoint(tmp_path, read):
    with pytest.raises(UserError, match="no checkpoint at .*nowhere; check the path"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no checkpoint; give .* metadata.json"):
        read(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"text")
    with pytest.raises(UserError, match="a.txt is of an unknown kind; give .*config.j"):
        read(tmp_path / "a.txt")


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
    assert check_pair(target, short) == check_pair(target, None) == []
    with pytest.raises(UserError, match="the drafter has 3 tokens"):
        check_pair(target, wide)
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
