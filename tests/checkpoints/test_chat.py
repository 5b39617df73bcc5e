"""Chat templates: where they are found, what they see, and how they fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from treespec_jax.checkpoints import load_tokenizer
from treespec_jax.checkpoints.chat import (
    TEMPLATE_FILES,
    ChatTemplate,
    TemplateSource,
    check_conversations,
    check_messages,
    find_template,
)
from treespec_jax.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tokenizers"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def render():
    def run(program, messages=HELLO, variables=None, **tokens):
        source = TemplateSource({"default": program}, "tokenizer_config.json")
        return ChatTemplate(source, tokens).render(messages, variables)

    return run


def test_templates_are_found_where_checkpoints_keep_them(tmp_path):
    shutil.copy(GOLDEN / "llama2" / "tokenizer.json", tmp_path)

    def found():
        return load_tokenizer(tmp_path).chat_template().render(HELLO)

    assert not load_tokenizer(tmp_path).has_chat_template
    with pytest.raises(UserError, match=r"no chat template beside .*tokenizer\.json:"):
        found()
    (tmp_path / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert found() == "processor" and load_tokenizer(tmp_path).has_chat_template
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": null}')
    assert found() == "processor"
    config.write_text('{"chat_template": "config"}')
    assert found() == "config"
    named = [{"name": n, "template": n} for n in ("tool_use", "default")]
    config.write_text(json.dumps({"chat_template": named}))
    assert found() == "default"
    config.write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(UserError, match=r"named 'default' \(there is: 'tool_use'\)"):
        found()
    (tmp_path / "chat_template.jinja").write_text("file")
    assert found() == "file"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        found()


def test_a_malformed_template_hinders_conversations_only(tmp_path):
    shutil.copy(GOLDEN / "llama2" / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the cat")
    with pytest.raises(UserError, match="chat_template.jinja: the chat template is ma"):
        tokenizer.encode_chat(HELLO)


@pytest.mark.parametrize("name", ["tokenizer_config.json", TEMPLATE_FILES[1]])
def test_a_damaged_configuration_is_named(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} is not JSON"):
        find_template({name: b'{"chat_template": "'}, tmp_path)


def test_a_template_sees_what_transformers_shows_it(render):
    assert render("{{ bos_token }}|{{ eos_token }}", bos_token="<s>") == "<s>|"
    assert render("{{ add_generation_prompt }} {{ tools is none }}") == "True True"
    assert render("{{ x }}", variables={"x": 1}) == "1"
    said = [{"role": "user", "content": "<é> & 'q'"}]
    assert render("{{ messages[0].content | tojson }}", said) == "\"<é> & 'q'\""
    assert render("{{ {'a': [1]} | tojson(indent=1) }}") == '{\n "a": [\n  1\n ]\n}'
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    loop = "{% for m in messages %}{% if true %}{% break %}{% endif %}x{% endfor %}"
    assert render(loop) == ""
    assert render("{% generation %}a{% endgeneration %}b") == "ab"
    # Lines that hold nothing but a block leave nothing.
    assert render("a\n  {% if true %}\nb\n  {% endif %}\n") == "a\nb\n"


def test_templates_cannot_reach_out(render):
    for source in (
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
    ):
        with pytest.raises(UserError, match="the chat template fails"):
            render(source)


def test_a_template_does_not_change_the_messages(render):
    messages = [{"role": "user", "content": "a", "parts": ["b"]}]
    before = json.dumps(messages)
    with pytest.raises(UserError, match="fails"):
        render("{{ messages[0].parts.append(1) }}", messages)
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "refuses: roles must alt"),
        ("{{ messages[0].tools.first }}", "fails: 'dict object' has no attribute"),
        ("{{ messages[7].content }}", "fails: list object has no element 7"),
        ("{{ messages + 1 }}", "fails: can only concatenate list"),
        ("{{ 1 // 0 }}", "fails: integer division"),
        ("{{ 'a' | nofilter }}", "is malformed in line 1: No filter named"),
        ("a\n{% for %}", "is malformed in line 2: "),
    ],
)
def test_failures_are_one_line(render, source, expected):
    with pytest.raises(UserError) as caught:
        render(source)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hello", "messages must be a list"),
        (None, "messages must be a list"),
        ({"role": "user"}, "messages must be a list"),
        ([], "the conversation is empty"),
        (["hello"], "message 0 must be"),
        ([*HELLO, {"content": "x"}], 'message 1 needs a "role"'),
        ([{"role": 3, "content": "x"}], 'message 0 needs a "role"'),
        ([{"role": "user"}], r'message 0 \(user\) needs a "content"'),
        ([{"role": "user", "content": [1]}], "that is a text, got \\[1\\]"),
        ([{**HELLO[0], "f": print}], r"message 0 \(user\) must be plain data"),
    ],
)
def test_malformed_messages_are_named(messages, expected):
    with pytest.raises(UserError, match=expected):
        check_messages(messages)


def test_one_conversation_or_several():
    assert check_conversations(HELLO) == [HELLO]
    assert check_conversations([HELLO, tuple(HELLO)]) == [HELLO, HELLO]
    call = {"role": "assistant", "content": None, "tool_calls": []}
    assert check_messages([call]) == [{"role": "assistant", "tool_calls": []}]
    with pytest.raises(UserError, match="message 0 must be"):
        check_conversations([HELLO, HELLO[0]])
