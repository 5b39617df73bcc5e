"""Files of recycled successors: what they hold, and what they refuse; no jax."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import types
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import TINY
from treespec_jax.checkpoints import load_tokenizer, recycle_table
from treespec_jax.checkpoints.recycle_table import Table, TableFile
from treespec_jax.checkpoints.tokenizers import fingerprint
from treespec_jax.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tokenizers"
V, K = 23, 4


def model(pieces: str = "abcdefghijklmnopqrstuvw", vocab: int = V):
    """A target of one letter a token; without a tokenizer if there are no letters."""
    tokenizer = types.SimpleNamespace(
        vocab_size=len(pieces), piece=lambda token: pieces[token]
    )
    config = dataclasses.replace(TINY, vocab_size=vocab)
    return types.SimpleNamespace(config=config, tokenizer=tokenizer if pieces else None)


@pytest.fixture
def table() -> Table:
    """Some tokens have fewer successors than others, some none."""
    rng = np.random.default_rng(3)
    best = np.argsort(rng.random((V, V)), axis=1)[:, :K].astype(np.int32)
    logits = -np.sort(rng.normal(size=(V, K)).astype(np.float32))
    logits[np.arange(K) >= rng.integers(0, K + 1, V)[:, None]] = -np.inf
    return Table(best, logits)


@pytest.fixture
def file(tmp_path, table) -> Path:
    path = tmp_path / "table.npz"
    TableFile(path, model()).write(table)
    return path


def same(one: Table, other: Table) -> None:
    for name in ("best", "logits"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype


def test_what_is_written_is_read(file, table):
    same(TableFile(file, model()).read(), table)
    TableFile(file, model()).write(Table(table.best[::-1], table.logits[::-1]))
    same(TableFile(file, model()).read(), Table(table.best[::-1], table.logits[::-1]))
    assert [p.name for p in file.parent.iterdir()] == ["table.npz"]
    # No ending is added to a name.
    other = file.with_name("t.table")
    TableFile(str(other), model()).write(table)
    same(TableFile(other, model()).read(), table)


def test_a_file_that_is_not_there_is_no_table(tmp_path):
    assert TableFile(tmp_path / "none.npz", model()).read() is None


def test_fewer_successors_are_the_best_and_more_are_unknown(table):
    same(table.resized(K), table)
    same(table.resized(2), Table(table.best[:, :2], table.logits[:, :2]))
    more = table.resized(K + 3)
    assert more.best.shape == more.logits.shape == (V, K + 3)
    same(more.resized(K), table)
    assert (more.logits[:, K:] == -np.inf).all()
    assert (more.best.dtype, more.logits.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (model(vocab=V + 1), f"successors of {V} tokens, the target has {V + 1}"),
        (model("abcdefghijklmnopqrstuvx"), "of another vocabulary"),
        (model("acbdefghijklmnopqrstuvw"), "of another vocabulary"),
    ],
)
def test_another_vocabulary_is_refused(file, target, expected):
    with pytest.raises(UserError, match=expected) as caught:
        TableFile(file, target).read()
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_tokenizer_sizes_are_all_that_is_compared(file, table):
    same(TableFile(file, model("")).read(), table)
    bare = file.with_name("bare.npz")
    TableFile(bare, model("")).write(table)
    same(TableFile(bare, model()).read(), table)


def rewritten(file: Path, **changes) -> None:
    """The same file with other arrays, or other words about them."""
    with np.load(file) as arrays:
        held = dict(arrays)
    about = json.loads(str(held["about"])) | changes.pop("about", {})
    held = {**held, "about": np.array(json.dumps(about)), **changes}
    data = io.BytesIO()
    np.savez(data, **{name: x for name, x in held.items() if x is not None})
    file.write_bytes(data.getvalue())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"about": {"kind": "weights"}}, "is no recycle table"),
        ({"about": {"version": 9}}, "version 9"),
        ({"logits": None}, "is no recycle table"),
        ({"about": {"vocab_size": "many"}}, "successors of many tokens"),
        ({"best": np.zeros((V, K + 1), np.int32)}, "is damaged"),
        ({"best": np.full((V, K), V, np.int32)}, "is damaged"),
        ({"best": np.full((V, K), -1, np.int32)}, "is damaged"),
        ({"best": np.zeros((V, K))}, "is damaged"),
        ({"logits": np.full((V, K), np.nan, np.float32)}, "is damaged"),
        ({"logits": np.full((V, K), np.inf, np.float32)}, "is damaged"),
        (
            {n: np.zeros((V, 0), t) for n, t in (("best", "i4"), ("logits", "f4"))},
            "is damaged",
        ),
        ({"best": np.array([["x"]], object)}, "is no recycle table"),
    ],
)
def test_other_contents_are_refused(file, changes, expected):
    rewritten(file, **changes)
    with pytest.raises(UserError, match=expected) as caught:
        TableFile(file, model()).read()
    assert str(file) in str(caught.value) and "another file" in str(caught.value)


def test_damage_is_found_wherever_it_is(file, table):
    """Cut short, or with a byte changed: read as it was, or refused in one line."""
    data, rng = file.read_bytes(), np.random.default_rng(0)
    cuts = [data[:n] for n in (0, 1, 40, len(data) // 2, len(data) - 1)]
    flips = []
    for place in rng.integers(0, len(data), 150):
        flips.append(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
    refused = 0
    for damaged in [*cuts, *flips, b"a text\n"]:
        file.write_bytes(damaged)
        try:
            same(TableFile(file, model()).read(), table)
        except UserError as error:
            assert "\n" not in str(error) and str(file) in str(error)
            refused += 1
    assert refused > 100


def test_nothing_half_written_stays(file, table, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        TableFile(file, model()).write(table)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        TableFile(file, model()).write(table)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("path", ["no/such/folder/t.npz", ".", "file/t.npz"])
def test_nowhere_to_write(tmp_path, table, path):
    (tmp_path / "file").write_text("")
    path = tmp_path / path
    for refused in (
        lambda: recycle_table.check_output(path),
        lambda: TableFile(path, model()).write(table),
    ):
        with pytest.raises(UserError, match="cannot write"):
            refused()
    if path.is_dir():
        with pytest.raises(UserError, match="cannot be read: Is a directory"):
            TableFile(path, model()).read()


def test_fingerprints_are_of_spellings_alone():
    """Whatever format a vocabulary comes in."""
    llama, new = (load_tokenizer(GOLDEN / n) for n in ("sentencepiece", "llama3"))
    assert fingerprint(llama) != fingerprint(new)
    pieces = [llama.piece(token) for token in range(llama.vocab_size)]
    spelt = types.SimpleNamespace(vocab_size=len(pieces), piece=pieces.__getitem__)
    assert fingerprint(spelt) == fingerprint(llama)
    pieces[5], pieces[6] = pieces[5] + pieces[6][:1], pieces[6][1:]
    assert fingerprint(spelt) != fingerprint(llama)
