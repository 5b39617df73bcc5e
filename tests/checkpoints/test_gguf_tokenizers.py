"""Tokenizers from the metadata of GGUF files, against other readings of the same.

Texts are those of tests/golden/smollm2.json, code, CJK, emoji and control tokens among
them.
"""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers as tk
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tests.checkpoints.gguf_files import sentencepiece_vocabulary
from tests.checkpoints.support import SENTENCES, check_stream
from treespec_jax.checkpoints import load_tokenizer
from treespec_jax.checkpoints.tokenizers.gguf import make_tokenizer, read_notes
from treespec_jax.checkpoints.tokenizers.pretokenizers import PRE_TOKENIZERS
from treespec_jax.errors import UserError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "smollm2.json").read_text())
LINES = GOLDEN["lines"]
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
HELLO = [{"role": "user", "content": "hello"}]


def make(metadata, **changes):
    """The tokenizer of metadata with changes of the tokenizer's keys; None removes."""
    values = {**metadata, **{f"tokenizer.ggml.{k}": v for k, v in changes.items()}}
    values = {key: value for key, value in values.items() if value is not None}
    return make_tokenizer(values, "some/model.gguf")


@functools.cache
def byte_pairs():
    """Vocabulary and merges of the texts, trained over words as GPT-2 cuts them."""
    made = tk.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = tk.trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([*LINES, *SENTENCES], trainer)
    model = json.loads(made.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return [*model["vocab"]], merges


@pytest.fixture
def byte_level():
    """Metadata of a byte-level vocabulary: control tokens, then an added and an unused
    one behind the pieces."""
    pieces, merges = byte_pairs()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*CONTROLS, *pieces, "<tool>", "[PAD1]"],
        "tokenizer.ggml.token_type": [3] * 3 + [1] * len(pieces) + [4, 5],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def oracle(metadata, pre, normalizer=None):
    """The pipeline as published with models: no regular expression of ours."""
    tokens, types = (metadata[f"tokenizer.ggml.{k}"] for k in ("tokens", "token_type"))
    merges = [tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]]
    made = tk.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    made.pre_tokenizer, made.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    for text, kind in zip(tokens, types, strict=True):
        if kind in (3, 4):
            made.add_tokens([tk.AddedToken(text, special=kind == 3, normalized=False)])
    return made


def test_texts_of_the_smollm_kind(byte_level):
    """Digits one by one, then GPT-2's words."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    expected = oracle(byte_level, pre_tokenizers.Sequence([digits, words]))
    found = make(byte_level)
    for text in [*LINES, "a <tool>b  <tool>", "[PAD1] 2024"]:
        assert found.encode(text) == expected.encode(text).ids, text
        assert found.decode(found.encode(text)) == expected.decode(
            expected.encode(text).ids
        )
    assert found.encode("[PAD1]")[0] != found.vocab_size - 1
    check_stream(found, "".join(LINES[:60]).replace("<|", ""), 0.3)


def test_texts_of_the_gpt2_kind(byte_level):
    expected = oracle(byte_level, pre_tokenizers.ByteLevel(add_prefix_space=False))
    found = make(byte_level, pre="gpt-2")
    for text in LINES:
        assert found.encode(text) == expected.encode(text).ids, text


def words(name: str, text: str) -> list[str]:
    patterns = PRE_TOKENIZERS[name].patterns
    cuts = [pre_tokenizers.Split(tk.Regex(p), "isolated") for p in patterns]
    return [w for w, _ in pre_tokenizers.Sequence(cuts).pre_tokenize_str(text)]


@pytest.mark.parametrize("name", GOLDEN["words"])
def test_words_are_those_of_transformers(name):
    for text, expected in zip(LINES, GOLDEN["words"][name], strict=False):
        assert words(name, text) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("default", "It|'|s| x|+=|2| |123|4|.|\n\n| b| 😀|你"),
        ("seed-coder", "It|'s| x|+=|2| |1|2|3|4|.|\n\n| b| 😀|你"),
        ("deepseek-coder", "It|'|s| x|+=|2| |1|2|3|4|.|\n|\n| b| 😀|你"),
        ("deepseek-llm", "It|'|s| x|+=|2| |1|2|3|4|.|\n|\n| b| 😀|你"),
    ],
)
def test_words_of_other_kinds(name, expected):
    """Of one text, cut by hand."""
    assert words(name, expected.replace("|", "")) == expected.split("|")


def test_qwen_composes_characters(byte_level):
    pattern = PRE_TOKENIZERS["qwen2"].patterns[0]
    split = pre_tokenizers.Split(tk.Regex(pattern), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre = pre_tokenizers.Sequence([split, spell])
    expected = oracle(byte_level, pre, normalizers.NFC())
    found = make(byte_level, pre="qwen2")
    for text in LINES:
        assert found.encode(text) == expected.encode(text).ids, text
    assert found.encode("e\u0301") == found.encode("é")
    gpt2 = make(byte_level, pre="gpt-2")
    assert gpt2.encode("e\u0301") != gpt2.encode("é")


def test_whole_words_of_llama3(byte_level):
    """A token that no merges lead to."""
    byte_level["tokenizer.ggml.tokens"][-1] = "zzyzx"
    byte_level["tokenizer.ggml.token_type"][-1] = 1
    token = len(byte_level["tokenizer.ggml.tokens"]) - 1
    assert make(byte_level, pre="llama-bpe").encode("zzyzx") == [1, token]
    assert make(byte_level, pre="smaug-bpe").encode("zzyzx") != [token]


def test_beginnings_and_ends(byte_level):
    found = make(byte_level)
    assert (found.bos_id, found.eos_ids) == (None, (2,))
    assert make(byte_level, add_bos_token=True).encode("") == [1]
    assert make(byte_level, pre="llama3").bos_id == 1
    assert make(byte_level, pre="llama3", add_bos_token=False).bos_id is None
    # Without the key, the control token by which turns end.
    assert make(byte_level, eos_token_id=0).eos_ids == (0, 2)
    assert make(byte_level, eos_token_id=0, eot_token_id=1).eos_ids == (0, 1)
    assert make(byte_level, eom_token_id=5, eot_token_id=1).eos_ids == (2, 1, 5)
    # A word that fills batches stays a word.
    plain = byte_level["tokenizer.ggml.tokens"].index("!")
    filled = make(byte_level, padding_token_id=plain, unknown_token_id=plain)
    assert filled.encode("a!!") == found.encode("a!!")
    assert filled.token_bytes(plain) == b"!"


def test_conversations(byte_level, tmp_path):
    found = make(byte_level)
    text = found.chat_template().render(HELLO)
    assert text == "<|im_start|>hello"
    assert found.encode_chat(HELLO)[0] == 1
    found.save(tmp_path)
    again = load_tokenizer(tmp_path, found.bos_id, found.eos_ids)
    assert again.encode_chat(HELLO) == found.encode_chat(HELLO)
    assert (again.bos_id, again.eos_ids) == (found.bos_id, found.eos_ids)
    for text in [*LINES, "a <tool>b"]:
        assert again.encode(text) == found.encode(text)
    byte_level["tokenizer.chat_template.tool"] = "x"
    assert make(byte_level).encode_chat(HELLO) == found.encode_chat(HELLO)
    del (
        byte_level["tokenizer.chat_template"],
        byte_level["tokenizer.chat_template.tool"],
    )
    with pytest.raises(UserError, match="no chat template beside some/model.gguf"):
        make(byte_level).encode_chat(HELLO)


@functools.cache
def pieces(prefix: bool, bos: str):
    """A sentencepiece model: Llama's way, or Gemma's, whose spaces are pieces."""
    user = (
        ["<tool>"] if prefix else ["\n\n", "\u2581\u2581", "\u2581\u2581\u2581", "<b>"]
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*SENTENCES, *LINES[:40]]),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=[*user, "<end_of_turn>"],
        bos_piece=bos,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), user


def scored(prefix: bool = True, bos: str = "<s>"):
    """What the converter writes of such a model, and the model."""
    model, user = pieces(prefix, bos)
    values = sentencepiece_vocabulary(model, ("<end_of_turn>",))
    types = values["tokenizer.ggml.token_type"]
    tokens = values["tokenizer.ggml.tokens"]
    for text in user:
        token = tokens.index(text)
        types[token] = 4
        # The converter does not ask for the score of an added token.
        values["tokenizer.ggml.scores"][token] = -1000.0
        tokens[token] = text.replace("\u2581", " ")
    values |= {
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.chat_template": TEMPLATE,
    }
    return values, model


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_make_the_model_they_come_from(prefix):
    values, model = scored(prefix)
    found = make(values)
    assert found.bos_id == model.bos_id()
    assert found.eos_ids == (model.eos_id(), model.piece_to_id("<end_of_turn>"))
    for text in LINES:
        ids = model.encode(text)
        assert found.encode(text, add_bos=False) == ids, text
        assert found.decode(ids) == model.decode(ids)
    check_stream(found, "".join(LINES[:60]), 0.6)


def test_spaces_that_are_pieces():
    """Gemma's: runs of spaces and line breaks, which files spell as such."""
    values, model = scored(False, "<bos>")
    found = make(values)
    text = "a  b   c\n\nd<b>e    f"
    assert found.encode(text, add_bos=False) == model.encode(text)
    run = model.piece_to_id("\u2581\u2581\u2581")
    assert run in found.encode("a   b") and found.token_bytes(run) == b"   "
    assert found.chat_template().render(HELLO) == "<bos>hello"
    assert found.encode_chat(HELLO)[0] == model.bos_id()


def test_control_tokens_within_a_text():
    """Behind each begins a stretch with a space in front, as in llama.cpp."""
    values, model = scored()
    found = make(values)
    end, tool = (model.piece_to_id(t) for t in ("<end_of_turn>", "<tool>"))
    ids = found.encode("the cat<end_of_turn>the dog<tool>the ball")
    expected = [1, *model.encode("the cat"), end, *model.encode("the dog"), tool]
    assert ids == expected + model.encode("the ball")
    assert found.decode([end]) == "" and found.decode([tool]) == "<tool>"


def test_files_of_scored_pieces_read_back(tmp_path):
    values, _ = scored(False, "<bos>")
    found = make(values)
    found.save(tmp_path)
    again = load_tokenizer(tmp_path, found.bos_id, found.eos_ids)
    for text in [*LINES, "x<end_of_turn>  y\n\nz"]:
        assert again.encode(text) == found.encode(text)
    assert again.encode_chat(HELLO) == found.encode_chat(HELLO)


def test_pieces_without_scores_of_their_own():
    """Some converters lack them; the order of the pieces is that of the merges."""
    values, model = scored()
    size = model.vocab_size()
    found = make(values, scores=[-1000.0] * size)
    for text in LINES[:60]:
        assert found.encode(text, add_bos=False) == model.encode(text)


def test_flags_of_scored_pieces():
    values, _ = scored()
    assert (
        make(values, add_bos_token=False).encode("the")
        == make(values).encode("the")[1:]
    )
    # llama.cpp's defaults.
    bare = make(values, add_space_prefix=None, bos_token_id=None, eos_token_id=None)
    assert bare.encode("the cat") == make(values).encode("the cat")
    assert bare.eos_ids[0] == 2


def test_files_that_name_no_pre_tokeniser(byte_level):
    del byte_level["tokenizer.ggml.pre"]
    (note,) = read_notes(byte_level, "some/model.gguf")
    assert note.startswith("some/model.gguf lacks tokenizer.ggml.pre")
    assert make(byte_level).encode("1234") == make(byte_level, pre="default").encode(
        "1234"
    )
    assert read_notes(scored()[0], "x") == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model='bert' is not supported, only gpt2"),
        ({"pre": "kimi-k2"}, "tokenizer.ggml.pre='kimi-k2' is not supported, only def"),
        ({"tokens": None}, "lacks tokenizer.ggml.tokens; download it again"),
        ({"merges": None}, "lacks tokenizer.ggml.merges"),
        ({"tokens": ["a", "a"]}, "token 'a' is there twice"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens=[1, 2] is not supported, only"),
        ({"token_type": [1, 1]}, "token_type=[1, 1] is not supported, only "),
        ({"merges": ["q zz"]}, "tokens, types and merges of its tokenizer do not fit"),
        ({"merges": ["zz"]}, "tokens, types and merges of its tokenizer do not fit"),
        ({"bos_token_id": 5000}, "bos_token_id=5000 is not supported, only numbers"),
        ({"bos_token_id": None, "pre": "llama3"}, "lacks tokenizer.ggml.bos_token_id"),
        ({"add_bos_token": 1}, "add_bos_token=1 is not supported, only true or false"),
    ],
)
def test_what_does_not_fit_is_one_line(byte_level, changes, message):
    with pytest.raises(UserError) as caught:
        make(byte_level, **changes)
    error = str(caught.value)
    assert error.startswith("some/model.gguf") and "\n" not in error
    assert message in error


def test_scores_that_do_not_fit():
    values, _ = scored()
    with pytest.raises(UserError, match="lacks tokenizer.ggml.scores"):
        make(values, scores=None)
    with pytest.raises(UserError, match=r"scores=\[1.0\] is not supported, only 6"):
        make(values, scores=[1.0])
    types = [6] * len(values["tokenizer.ggml.tokens"])
    with pytest.raises(UserError, match="do not fit together"):
        make(values, token_type=types)


def test_without_a_vocabulary():
    assert make({}) is None
    assert make({"tokenizer.ggml.model": "none"}) is None
