"""Tokenizers, templates and messages that trip programs.

tests/golden/make_oddities.py made oddities.json with transformers.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treespec_jax.checkpoints import load_tokenizer
from treespec_jax.checkpoints.chat import ChatTemplate, TemplateSource, check_messages
from treespec_jax.checkpoints.tokenizers import TextStream
from treespec_jax.errors import UserError

ODDITIES = json.loads(
    (Path(__file__).resolve().parents[1] / "golden" / "oddities.json").read_text(
        "utf-8"
    )
)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module", params=ODDITIES)
def odd(request, tmp_path_factory):
    case = ODDITIES[request.param]
    folder = tmp_path_factory.mktemp("odd")
    (folder / "tokenizer.json").write_text(json.dumps(case["tokenizer"]))
    (folder / "tokenizer_config.json").write_text(json.dumps(case["config"]))
    return request.param, load_tokenizer(folder), case


def test_tokens_are_those_of_transformers(odd):
    """A begin token is put where the class of the tokenizer does, and nowhere else."""
    _, reader, case = odd
    for text, ids in zip(case["texts"], case["ids"], strict=True):
        assert reader.encode(text) == ids


def test_texts_are_those_of_transformers(odd):
    """Without a decoder with spaces; added tokens are what they say."""
    name, reader, case = odd
    for text, ids, want in zip(
        case["texts"], case["ids"], case["decoded"], strict=True
    ):
        if name == "accents":
            # transformers takes the letters of such a token for bytes.
            want = text.replace("<end>", "")
        assert reader.decode(ids) == want
        stream = TextStream(reader)
        assert "".join(stream.push([i]) for i in ids) + stream.flush() == want


def test_a_text_without_a_decoder_goes_on_with_a_space(odd):
    name, reader, _ = odd
    if name == "words":
        assert TextStream(reader, reader.encode("the")).push(reader.encode("cat")) == (
            " cat"
        )


def test_null_is_as_good_as_missing(odd):
    _, reader, case = odd
    for messages, want in zip(case["conversations"], case["rendered"], strict=True):
        assert reader.chat_template().render(messages) == want


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        ([{"type": "input_text", "text": "a"}], "a"),
        ([{"text": "a"}, "b"], "a\nb"),
        ([], ""),
    ],
)
def test_parts_of_a_text(content, text):
    (found,) = check_messages([{"role": "user", "content": content}])
    assert found == {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            {"content": [{"type": "image_url", "image_url": {}}]},
            "part of type 'image_u",
        ),
        ({"content": [{"type": "text"}]}, 'needs a "content" that is a text'),
        ({"content": [b"a"]}, 'needs a "content" that is a text'),
        ({"content": {"type": "text", "text": 3}}, 'needs a "content" that is a text'),
        ({"content": None, "name": "lily"}, 'needs a "content" that is a text'),
        ({"content": None, "tool_calls": None}, 'needs a "content" that is a text'),
        ({"content": "a\ud83d"}, r"message 0 \(user\) holds '\\ud83d', which is no"),
        ({"content": "a", "x": {"y": "\udc80"}}, r"message 0 \(user\) holds '\\udc80'"),
    ],
)
def test_messages_that_are_none(message, expected):
    with pytest.raises(UserError, match=expected) as caught:
        check_messages([{"role": "user", **message}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "program",
    [
        "{% break %}",
        "{% if true %}{% continue %}{% endif %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "(" * 150 + "1" + ")" * 150 + " }}",
        "{{ " + "[" * 300 + "]" * 300 + " }}",
        "{{ " + "9" * 5000 + " }}",
        "{{ 1" + "+1" * 20000 + " }}",
        "{% for x in y %}" * 40 + "{% endfor %}" * 40,
        "{% macro x() %}{{ x() }}{% endmacro %}{{ x() }}",
        "{{ (10 ** 5000) | string }}",
        "{{ 'a' | nofilter }}",
        "{{ \ud800 }}",
    ],
    ids=lambda program: program[:20].encode("ascii", "replace").decode(),
)
def test_a_program_that_breaks_the_compiler_is_one_line(program):
    source = TemplateSource({"default": program}, "chat_template.jinja")
    try:
        ChatTemplate(source, {}).render(HELLO)
    except UserError as error:
        assert "chat template" in str(error) and "\n" not in str(error)


def test_what_the_compiler_says_is_told():
    source = TemplateSource({"default": "{% break %}"}, "chat_template.jinja")
    with pytest.raises(UserError, match="jinja: the chat template .*'break' outside"):
        ChatTemplate(source, {})


@pytest.mark.parametrize("text", ["\ud800", "a\udcff b", "\udfff<end>"])
def test_halves_of_characters_are_refused(odd, text):
    _, reader, _ = odd
    with pytest.raises(UserError, match=r"the text holds '\\ud.*; give text in UTF-8"):
        reader.encode(text)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(), max_size=12))
def test_any_text_is_encoded_or_refused(text):
    reader = _llama()
    try:
        reader.encode(text)
        reader.encode_chat([{"role": "user", "content": text}])
    except UserError as error:
        assert "\n" not in str(error)
        assert any("\ud800" <= char <= "\udfff" for char in text)


@functools.cache
def _llama():
    return load_tokenizer(
        Path(__file__).resolve().parents[1] / "golden" / "tokenizers" / "llama2"
    )


def test_a_decoder_with_a_regular_expression_says_so(tmp_path):
    data = dict(ODDITIES["words"]["tokenizer"])
    pattern = {"Regex": "a+"}
    data["decoder"] = {"type": "Replace", "pattern": pattern, "content": "b"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"the regular expression 'a\+' finds, which"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_pointers_of_git_lfs(tmp_path, name):
    case = ODDITIES["words"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(case["tokenizer"]))
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid 0\n")
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer, .*git lfs pull"):
        load_tokenizer(tmp_path)
