"""Packing, shuffling and the data position."""

from __future__ import annotations

import numpy as np
import pytest

from treespec_jax.errors import UserError
from treespec_jax.training import data
from treespec_jax.training.settings import DataConfig, Source
from treespec_jax.training.vocabulary import BOS, EOS


def _rows(counts, weights):
    """Rows that hold their source and number."""
    parts = tuple(
        np.stack([np.full(n, source), np.arange(n)], axis=1)
        for source, n in enumerate(counts)
    )
    return data.Rows(parts, tuple(weights), parts[0][:1], "")


def test_every_token_is_predicted_once():
    documents = [[10, 11, 12], [20], [30, 31, 32, 33]]
    rows = data.pack(documents, 4)
    stream = [BOS, 10, 11, 12, EOS, BOS, 20, EOS, BOS, 30, 31, 32, 33, EOS]
    assert rows.shape == (3, 5)
    np.testing.assert_array_equal(rows[:, 1:].ravel(), stream[1:13])
    np.testing.assert_array_equal(rows[1:, 0], rows[:-1, -1])


def test_weights_and_epochs():
    batches = data.Batches(_rows([10, 20], [1.0, 0.5]), 5, seed=3)
    assert batches.per_epoch == 4
    epochs = [
        np.concatenate([batches[e * 4 + i] for i in range(4)]).tolist()
        for e in range(2)
    ]
    for epoch in epochs:
        seen = [row for source, row in epoch if source == 0]
        assert sorted(seen) == list(range(10))
    # Half of the second source each time: two epochs show all of it.
    halves = [row for epoch in epochs for source, row in epoch if source == 1]
    assert sorted(halves) == list(range(20))
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_its_step_alone():
    rows = _rows([13, 8], [1.0, 1.5])
    forward = data.Batches(rows, 3, seed=1)
    expected = [forward[step].copy() for step in range(30)]
    other = data.Batches(rows, 3, seed=1)
    for step in (29, 0, 17, 16, 5):
        np.testing.assert_array_equal(other[step], expected[step])


def test_cleaning(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One DAY--x\n\nno\n\nA second tale ", encoding="utf-8")
    source = Source(
        str(path),
        separator="\n\n",
        lower=True,
        replace=(("-+", " "),),
        min_chars=3,
    )
    assert data.read_documents(source) == ["one day x", "a second tale"]


def _load(config, texts):
    return data.load_rows(config, texts, lambda ts: [[3] * len(t) for t in ts])


def test_held_out_rows_are_not_trained_on():
    config = DataConfig((Source("a"),), row_tokens=4, batch_rows=2, micro_rows=1)
    rows = data.load_rows(config, [["x"]], lambda _: [list(range(3, 203))])
    assert len(rows.held_out) == 1
    assert not set(rows.train[0][:, 1:].ravel()) & set(rows.held_out[:, 1:].ravel())


def test_bad_text(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.txt: No such file"):
        data.read_documents(Source(str(tmp_path / "none.txt")))
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(UserError, match="empty.txt holds no text"):
        data.read_documents(Source(str(empty)))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.txt is not UTF-8"):
        data.read_documents(Source(str(binary)))
    config = DataConfig((Source("a"),), row_tokens=4, batch_rows=8, micro_rows=8)
    with pytest.raises(UserError, match="a is too short: 1 rows"):
        _load(config, [["12345"]])
    with pytest.raises(UserError, match="batch_rows=8 exceeds the 4 rows"):
        _load(config, [["1234567890123456789012"]])
