"""The trained vocabulary gives every text back."""

from __future__ import annotations

import pytest

from treespec_jax import checkpoints
from treespec_jax.errors import UserError
from treespec_jax.training import vocabulary


@pytest.fixture(scope="module")
def model_path(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / vocabulary.FILE_NAME
    path.write_bytes(vocabulary.train([text], 320))
    return path


@pytest.mark.parametrize(
    "words",
    [
        "anna has a boat.\nanna likes the boat.",
        "\n\nben\n",
        "a dragon 🐉 and a family 👨‍👩‍👧\n",
        "  two  spaces \t tab",
        "naïve Ünïcödé ﬁ ½ \u00a0 漢字",
    ],
)
def test_round_trip(model_path, words):
    tokenizer = vocabulary.load(model_path)
    assert tokenizer.decode(tokenizer.encode(words)) == words
    ours = checkpoints.load_tokenizer(model_path)
    assert ours.decode(ours.encode(words, add_bos=False)) == words


def test_special_tokens(model_path):
    tokenizer = vocabulary.load(model_path)
    ids = tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()
    assert ids == (vocabulary.UNK, vocabulary.BOS, vocabulary.EOS) == (0, 1, 2)
    assert tokenizer.pad_id() == -1
    assert tokenizer.get_piece_size() == 320
    newline = tokenizer.piece_to_id("\n")
    assert tokenizer.encode("ben\n\nben").count(newline) == 2


def test_training_is_deterministic(text, model_path):
    assert vocabulary.train([text], 320) == model_path.read_bytes()


def test_too_little_text():
    with pytest.raises(UserError, match="cannot train a vocabulary of 2048 pieces"):
        vocabulary.train(["a few words"], 2048)


def test_not_a_vocabulary(tmp_path):
    with pytest.raises(UserError, match="cannot read the vocabulary"):
        vocabulary.load(tmp_path / "none.model")
    bad = tmp_path / "bad.model"
    bad.write_bytes(b"not a model")
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        vocabulary.load(bad)
