"""Tokenizers made of arrays, as formats without tokenizer files hold them."""

from __future__ import annotations

import dataclasses
import json
import struct

import pytest

from treespec_jax.checkpoints import load_tokenizer
from treespec_jax.checkpoints.chat import TemplateSource
from treespec_jax.checkpoints.tokenizers.llama2c import Llama2cTokenizer
from treespec_jax.checkpoints.tokenizers.sentencepiece import SentencePieceTokenizer
from treespec_jax.checkpoints.tokenizers.settings import AddedToken, TokenizerSettings
from treespec_jax.checkpoints.tokenizers.tokenizer_json import HuggingFaceTokenizer
from treespec_jax.errors import UserError

SPACE = "\u2581"
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
PIECES += [SPACE, "t", "h", "e", f"{SPACE}t", "he", f"{SPACE}the"]
SCORES = [0.0] * 259 + [-7.0, -8.0, -9.0, -10.0, -1.0, -2.0, -3.0]
MERGES = [[SPACE, "t"], ["h", "e"], [f"{SPACE}t", "he"]]
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
HELLO = [{"role": "user", "content": "the"}]
SETTINGS = TokenizerSettings(
    source="model.gguf",
    bos_id=1,
    eos_ids=(2,),
    named={"bos_token": AddedToken("<s>", True)},
    added={266: AddedToken("<|end|>", True), 267: AddedToken("<tool>", rstrip=True)},
    legacy=False,
    template=TemplateSource(
        {"default": "{{ bos_token }}{{ messages[0].content }}<|end|>", "tool": "x"},
        "model.gguf",
    ),
)


def sentencepiece_model() -> bytes:
    """A `ModelProto` of byte pair merges, field by field."""

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        return varint(number << 3 | 2) + varint(len(value)) + value

    def varint(value: int) -> bytes:
        low, rest = value & 127, value >> 7
        return bytes([low | 128]) + varint(rest) if rest else bytes([low])

    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 7]
    rows = [
        field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + field(3, kind)
        for text, score, kind in zip(PIECES, SCORES, kinds, strict=True)
    ]
    trainer = field(3, 2) + field(35, 1)
    return b"".join(
        [*(field(1, row) for row in rows), field(2, trainer), field(3, b"")]
    )


def tokenizer_json() -> bytes:
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    front = [{"type": "Prepend", "prepend": SPACE}, mark]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    model = {
        "type": "BPE",
        "vocab": {piece: index for index, piece in enumerate(PIECES)},
        "merges": MERGES,
        "byte_fallback": True,
        "unk_token": "<unk>",
    }
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": front},
            "model": model,
            "decoder": {"type": "Sequence", "decoders": steps},
        }
    ).encode()


def llama2c_file() -> bytes:
    texts = [piece.replace(SPACE, " ").encode() for piece in PIECES]
    rows = [
        struct.pack("<fi", score, len(text)) + text
        for text, score in zip(texts, SCORES, strict=True)
    ]
    return struct.pack("<i", max(map(len, texts))) + b"".join(rows)


KINDS = {
    SentencePieceTokenizer: sentencepiece_model,
    HuggingFaceTokenizer: tokenizer_json,
    Llama2cTokenizer: llama2c_file,
}


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return request.param(KINDS[request.param](), SETTINGS)


def test_texts(tokenizer):
    assert tokenizer.encode("the") == [1, 265]
    assert tokenizer.decode([1, 265, 264]) == "thehe"
    assert tokenizer.encode("é", add_bos=False)[-2:] == [3 + 0xC3, 3 + 0xA9]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.source == "model.gguf"
    with pytest.raises(UserError, match="model.gguf is not a .*, or is damaged"):
        type(tokenizer)(b"?", SETTINGS)


@pytest.mark.parametrize("kind", [SentencePieceTokenizer, HuggingFaceTokenizer])
def test_saved_settings_read_back(kind, tmp_path):
    made = kind(KINDS[kind](), SETTINGS)
    assert (made.core_size, made.vocab_size) == (266, 268)
    assert made.encode("the<|end|>", add_bos=False) == [265, 266]
    chat = made.encode_chat(HELLO)
    assert (chat[0], chat[-1]) == (1, 266)
    made.save(tmp_path)
    again = load_tokenizer(tmp_path, SETTINGS.bos_id, SETTINGS.eos_ids)
    assert again.encode_chat(HELLO) == chat
    for text in ("the<tool> the", "the the<|end|>the"):
        assert again.encode(text) == made.encode(text)
    read = again._settings
    template = dataclasses.replace(read.template, source="model.gguf")
    assert (
        dataclasses.replace(
            read, source="model.gguf", template=template, companions=None
        )
        == SETTINGS
    )


def test_a_tokenizer_without_a_template():
    bare = dataclasses.replace(SETTINGS, template=None)
    with pytest.raises(UserError, match="no chat template beside model.gguf"):
        HuggingFaceTokenizer(tokenizer_json(), bare).encode_chat(HELLO)
