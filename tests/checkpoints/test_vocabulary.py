"""Tokenizers against embeddings, and against each other; damaged ones by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.checkpoints.support import write_llama2c_tokenizer
from treespec_jax.checkpoints import describe, load_tokenizer
from treespec_jax.checkpoints.tokenizers import (
    check_pair,
    check_rows,
    compare_vocabularies,
)
from treespec_jax.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tokenizers"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": [7, 8],
}


@pytest.fixture
def checkpoint(tmp_path):
    """Writes config.json beside a copy of a family's tokenizer; weights stay unread."""

    def write(family, rows, name="model", **settings):
        folder = Path(shutil.copytree(GOLDEN / family, tmp_path / name))
        config = {**CONFIG, "vocab_size": rows}
        (folder / "config.json").write_text(json.dumps(config))
        file = folder / "tokenizer_config.json"
        found = json.loads(file.read_text())
        file.write_text(json.dumps({**found, **settings}))
        return folder

    return write


@pytest.fixture(scope="module")
def small():
    return load_tokenizer(GOLDEN / "llama2")  # 360 pieces


@pytest.mark.parametrize("rows", [361, 384, 450])
def test_rows_past_the_tokenizer_are_padding(small, rows):
    note = check_rows(small, rows)
    assert note == (
        f"{small.source} has 360 pieces, the model {rows} embeddings: the last "
        f"{rows - 360} are padding and stand for no text"
    )
    assert small.decode([rows - 1]) == "" and check_rows(small, 360) is None


@pytest.mark.parametrize("rows", [451, 32000])
def test_a_tokenizer_that_is_far_too_small(small, rows):
    with pytest.raises(UserError, match=f"has 360 pieces, the model {rows} embeddings"):
        check_rows(small, rows)
    assert f"the last {rows - 360} are padding" in check_rows(small, rows, chosen=True)


def test_small_vocabularies_are_padded_to_round_numbers(tmp_path):
    tokenizer = load_tokenizer(
        write_llama2c_tokenizer(tmp_path / "tok.bin", [("a", 0.0)])
    )
    assert tokenizer.vocab_size == 260
    assert check_rows(tokenizer, 384)
    with pytest.raises(UserError, match="more than padding explains"):
        check_rows(tokenizer, 385)


def test_a_tokenizer_that_is_too_large(small):
    with pytest.raises(UserError, match="has 360 pieces, the model 359 embeddings"):
        check_rows(small, 359)
    with pytest.raises(UserError, match="give the tokenizer that belongs to it"):
        check_rows(small, 359, chosen=True)
    # But for tokens that were added and whose rows were not.
    added = load_tokenizer(GOLDEN / "mistral")
    assert (added.core_size, added.vocab_size) == (360, 365)
    note = check_rows(added, 363)
    assert note.endswith("the added tokens from '[INST]' on cannot be used")


def test_a_checkpoint_is_refused_before_its_weights_are_read(checkpoint):
    padded = checkpoint("llama2", 400)
    describe(padded)
    for rows, name in ((3600, "few"), (350, "many")):
        with pytest.raises(UserError, match=f"360 pieces, the model {rows} embeddings"):
            describe(checkpoint("llama2", rows, name))
    describe(padded.parent / "few", tokenizer=padded)


def test_ends_of_text_of_all_files_count(checkpoint):
    """config.json, generation_config.json and the tokenizer's own, a chat's end."""
    folder = checkpoint("llama3", 346)
    (folder / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    about = describe(folder)
    end = about.tokenizer.encode("<|end|>", add_bos=False)
    assert about.config.eos_ids == (7, 8, 9, *end)
    assert about.config.bos_id == about.tokenizer.encode("<|begin|>")[0]


@pytest.mark.parametrize(
    ("asked", "family", "added"),
    [
        # A generic class leaves that to the post-processor.
        (True, "smollm", False),
        (False, "smollm", False),
        (None, "smollm", False),
        (True, "sentencepiece", True),
        (False, "sentencepiece", False),
        (None, "sentencepiece", True),
    ],
)
def test_a_configuration_asks_for_a_token_in_front(checkpoint, asked, family, added):
    tokenizer = load_tokenizer(checkpoint(family, 402, add_bos_token=asked))
    assert (tokenizer.bos_id is not None) == added
    assert len(tokenizer.encode("the")) == len(tokenizer.encode("the", False)) + added


def test_a_token_behind_a_text_is_left_out(tmp_path, small):
    """What comes next is for the model to say."""
    import tokenizers as tk

    model = tk.Tokenizer.from_file(small.source)
    model.post_processor = tk.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None
    assert tokenizer.encode("the cat") == small.encode("the cat", add_bos=False)


def test_ids_with_holes_between_them(tmp_path):
    import tokenizers as tk

    vocab = {"a": 0, "b": 1, "c": 9}
    model = tk.Tokenizer(tk.models.BPE(vocab, []))
    model.decoder = tk.decoders.Fuse()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 10
    assert tokenizer.encode("abc") == [0, 1, 9]
    assert tokenizer.piece(5) == "" and tokenizer.decode([0, 5, 9]) == "ac"


def test_a_vocabulary_that_goes_on(small):
    """Either way round it is noted, and does no harm."""
    longer = load_tokenizer(GOLDEN / "mistral")
    assert compare_vocabularies(small, small) is None
    assert compare_vocabularies(longer, small) == (
        "the drafter's vocabulary is the first 360 of the target's 365 tokens; it "
        "never proposes the others"
    )
    assert "the others are never accepted" in compare_vocabularies(small, longer)


@pytest.mark.parametrize("token", [0, 261, 359])
def test_a_token_that_differs_is_named(small, tmp_path, token):
    text = Path(small.source).read_text()
    piece = small.piece(token)
    ours, theirs = json.dumps(piece, ensure_ascii=False), '"other"'
    assert text.count(f"{ours}:") == 1
    values = json.loads(text.replace(f"{ours}:", f"{theirs}:"))
    # What goes with the piece that is gone.
    values["added_tokens"] = []
    values["post_processor"] = None
    values["model"]["unk_token"] = None
    values["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    other = load_tokenizer(tmp_path)
    with pytest.raises(UserError) as caught:
        compare_vocabularies(small, other)
    message = f"token {token} is {piece!r} in the target and 'other' in the drafter"
    assert message in str(caught.value)


def test_special_tokens_that_differ_are_named(checkpoint):
    one = load_tokenizer(GOLDEN / "smollm")
    added = json.loads((GOLDEN / "smollm" / "tokenizer_config.json").read_text())
    added["added_tokens_decoder"]["342"]["content"] = "<|stop|>"
    added["eos_token"] = "<|stop|>"
    other = load_tokenizer(checkpoint("smollm", 344, **added))
    assert other.vocab_size == one.vocab_size
    with pytest.raises(UserError, match=r"token 342 is '<\|end\|>' in .* '<\|stop\|>'"):
        compare_vocabularies(one, other)


def test_pairs_are_noted_in_full(checkpoint):
    target = describe(checkpoint("mistral", 384, "target"))
    draft = describe(checkpoint("llama2", 360, "draft"))
    notes = check_pair(target, draft)
    assert len(notes) == 2
    assert "has 365 pieces, the model 384 embeddings" in notes[0]
    assert "the first 360 of the target's 365 tokens" in notes[1]


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("tokenizer.json", '{"version": "1.0", "mo', "is not a tokenizer.json, or is"),
        ("tokenizer_config.json", '{"bos_tok', "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("special_tokens_map.json", "?", "special_tokens_map.json is not JSON"),
        ("added_tokens.json", '{"<x>": "y"}', "'y' is no token id"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"7": {}}}',
            "{} is no token",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"7": {"content": "<new>"}}}',
            "added token '<new>' is 360 there and 7 in tokenizer_config.json",
        ),
    ],
)
def test_damaged_files_are_named(checkpoint, file, text, expected):
    folder = checkpoint("llama2", 360)
    (folder / file).write_text(text)
    with pytest.raises(UserError) as caught:
        describe(folder)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_files_cut_short_are_named(tmp_path, name, share):
    family = "sentencepiece" if name.endswith("model") else "gemma"
    data = (GOLDEN / family / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=f"{name} is not a .*, or is damaged"):
        load_tokenizer(tmp_path)
