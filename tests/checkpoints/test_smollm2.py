"""SmolLM2-135M-Instruct from its GGUF file, against transformers.

tests/golden/make_smollm2.py made the expectations. The file is 98 MB and no part of the
repository: `python scripts/fetch_model.py smollm2-135m-instruct` puts it where this
looks for it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints.support import forward
from treespec_jax.checkpoints import convert, describe, load
from treespec_jax.checkpoints.catalogue import CATALOGUE

MODEL = CATALOGUE["smollm2-135m-instruct"].path
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "smollm2.json").read_text())
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not MODEL.is_file(),
        reason=f"{MODEL} is not there; scripts/fetch_model.py fetches it",
    ),
]


@pytest.fixture(scope="module")
def about():
    return describe(MODEL)


def test_is_the_file_of_the_expectations():
    assert hashlib.sha256(MODEL.read_bytes()).hexdigest() == GOLDEN["file"]


def test_tokens_of_varied_lines(about):
    assert len(GOLDEN["lines"]) == 200
    for text, ids in zip(GOLDEN["lines"], GOLDEN["ids"], strict=True):
        assert about.tokenizer.encode(text) == ids, text


def test_greedy_text(about):
    """Ten prompts, 64 tokens each; every token follows from those before it.

    Where two tokens are nearly as likely, either may come first.
    """
    model, answers = load(about, "float32").model, GOLDEN["answers"]
    texts = [answer["prompt"] + answer["tokens"] for answer in answers]
    rows = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, ids in zip(rows, texts, strict=True):
        row[: len(ids)] = ids
    logits = np.asarray(forward(model, rows)[0])
    near = {(tie["answer"], tie["step"]): tie["other"] for tie in GOLDEN["near_ties"]}
    for index, answer in enumerate(answers):
        tokens, start = answer["tokens"], len(answer["prompt"]) - 1
        assert len(tokens) == 64
        found = logits[index, start : start + len(tokens)].argmax(axis=-1)
        for step in np.flatnonzero(found != tokens):
            assert found[step] == near.get((index, step)), (index, step)
        assert about.tokenizer.decode(tokens) == answer["text"]


def test_converts_with_tokenizer_and_template(about, tmp_path):
    """In bfloat16; a conversation becomes the same tokens as in the expectations."""
    convert(about, tmp_path / "out", "bfloat16")
    again = describe(tmp_path / "out")
    assert again.config == about.config
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = again.tokenizer.encode_chat(messages)
    assert (
        ids == about.tokenizer.encode_chat(messages) == GOLDEN["answers"][0]["prompt"]
    )
