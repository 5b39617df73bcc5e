"""Tokenizers and chat templates as families differ, against transformers.

tests/golden/make_varieties.py and make_templates.py made the files.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from treespec_jax.checkpoints import load_tokenizer
from treespec_jax.checkpoints.chat import ChatTemplate, TemplateSource
from treespec_jax.checkpoints.tokenizers import TextStream
from treespec_jax.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
VARIETIES = json.loads((GOLDEN / "varieties.json").read_text("utf-8"))
TEMPLATES = json.loads((GOLDEN / "templates.json").read_text("utf-8"))


@pytest.fixture(scope="module", params=VARIETIES["kinds"])
def variety(request, tmp_path_factory):
    case = VARIETIES["kinds"][request.param]
    folder = tmp_path_factory.mktemp("variety")
    (folder / "tokenizer.json").write_text(json.dumps(case["tokenizer"]))
    (folder / "tokenizer_config.json").write_text(json.dumps(case["config"]))
    return load_tokenizer(folder), case


def test_texts_become_the_same_tokens(variety):
    reader, case = variety
    for text, ids in zip(VARIETIES["texts"], case["ids"], strict=True):
        assert reader.encode(text) == ids, text


def test_tokens_become_the_same_texts(variety):
    reader, case = variety
    for ids, text in zip(case["ids"], case["decoded"], strict=True):
        assert reader.decode(ids) == text
        stream = TextStream(reader)
        assert "".join(stream.push([i]) for i in ids) + stream.flush() == text


@pytest.mark.parametrize("name", TEMPLATES["programs"])
def test_conversations_become_the_same_texts(name):
    source = TemplateSource({"default": TEMPLATES["programs"][name]}, name)
    template = ChatTemplate(source, TEMPLATES["tokens"])
    for talk, messages in TEMPLATES["conversations"].items():
        for given, variables in TEMPLATES["variables"].items():
            want = TEMPLATES["rendered"][f"{name}, {talk}, {given}"]
            if "error" in want:
                with pytest.raises(UserError) as caught:
                    template.render(messages, variables)
                assert want["error"] in str(caught.value)
            else:
                assert template.render(messages, variables) == want["text"], talk
