"""Every family's tokenizer and chat template against transformers' reading of them.

tests/golden/make_tokenizers.py made the files.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints.support import CHARACTERS, check_stream
from treespec_jax.checkpoints import load_tokenizer
from treespec_jax.checkpoints.tokenizers import TextStream
from treespec_jax.checkpoints.tokenizers.sentencepiece import SentencePieceTokenizer
from treespec_jax.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tokenizers"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir())


@functools.cache
def loaded(name):
    return load_tokenizer(GOLDEN / name)


@pytest.fixture(params=FAMILIES)
def family(request):
    folder = GOLDEN / request.param
    return loaded(request.param), json.loads((folder / "expected.json").read_text())


def comparable(reader, text: str) -> bool:
    """Whether transformers agrees with the sentencepiece library.

    It converts such models, and a stretch of text that begins with a space gets no
    second one in front, as the library would give it.
    """
    if not isinstance(reader, SentencePieceTokenizer):
        return True
    return not re.search(r"(^|<s>|</s>|<\|end\|>|<tool>)\s", text)


def test_all_families_are_here():
    assert FAMILIES == [
        "gemma",
        "llama2",
        "llama3",
        "mistral",
        "qwen",
        "sentencepiece",
        "sentencepiece_new",
        "smollm",
    ]


def test_texts_become_the_same_tokens(family):
    reader, expected = family
    assert reader.vocab_size == expected["size"]
    for text, ids in zip(expected["texts"], expected["ids"], strict=True):
        if comparable(reader, text):
            assert reader.encode(text) == ids, text
            front = [] if reader.bos_id is None else [reader.bos_id]
            assert front + reader.encode(text, add_bos=False) == ids


def test_tokens_become_the_same_texts(family):
    reader, expected = family
    for ids, text in zip(expected["ids"], expected["decoded"], strict=True):
        assert reader.decode(ids) == text
        stream = TextStream(reader)
        assert "".join(stream.push([i]) for i in ids) + stream.flush() == text


def test_ends_and_beginnings(family):
    reader, expected = family
    assert reader.eos_ids == (expected["eos"],)
    assert reader.bos_id in (None, expected["bos"])
    assert all(reader.token_bytes(i) == b"" for i in reader.eos_ids)


def test_conversations_become_the_same_texts_and_tokens(family):
    reader, expected = family
    for chat in expected["chats"]:
        if "error" in chat:
            with pytest.raises(UserError) as caught:
                reader.encode_chat(chat["messages"])
            assert str(caught.value) == f"the chat template refuses: {chat['error']}"
            continue
        assert reader.chat_template().render(chat["messages"]) == chat["text"]
        ids = reader.encode_chat(chat["messages"])
        assert reader.bos_id is None or ids.count(reader.bos_id) == 1
        if comparable(reader, chat["text"]):
            assert ids == chat["ids"]


def test_a_template_sees_further_variables(family):
    reader, expected = family
    messages = expected["chats"][0]["messages"]
    text = reader.chat_template().render(messages, {"enable_thinking": False})
    assert text == expected["not_thinking"]


def test_a_copy_behaves_as_the_original(family, tmp_path):
    reader, expected = family
    reader.save(tmp_path)
    for file in tmp_path.iterdir():
        original = Path(reader.source).with_name(file.name)
        assert file.read_bytes() == original.read_bytes()
    again = load_tokenizer(tmp_path)
    for text in expected["texts"]:
        assert again.encode(text) == reader.encode(text)
    chat = expected["chats"][0]
    assert again.encode_chat(chat["messages"]) == chat["ids"]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(text=st.text(CHARACTERS, max_size=16), share=st.floats(0, 1))
def test_a_stream_never_breaks_a_character(name, text, share):
    check_stream(loaded(name), f"{text}<|end|>{text}", share)
