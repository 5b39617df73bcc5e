"""Conversations: written by the template, answered as any prompt is."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from tests.engine.scripted import follow, scripted
from treespec_jax.checkpoints import load_tokenizer
from treespec_jax.config import SamplingParams
from treespec_jax.errors import UserError
from treespec_jax.llm import LLM

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tokenizers"
HELLO = [{"role": "user", "content": "the cat"}]
LONGER = [
    *HELLO,
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "on the mat"},
]
PARAMS = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDEN / "llama2")


@pytest.fixture(scope="module")
def llm(tokenizer):
    """Answers with a few pieces, an accented e in two bytes among them, and ends."""
    pieces = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    last = tokenizer.encode_chat(HELLO)[-1]
    wanted = ("\u2581the", "<0xC3>", "<0xA9>", "\u2581a", "</s>")
    answer = [pieces[piece] for piece in wanted]
    # A row that pads the embedding, and stands for nothing.
    answer.insert(2, tokenizer.vocab_size + 3)
    model = scripted(
        tokenizer, follow([last, *answer]), vocab_size=tokenizer.vocab_size + 8
    )
    return LLM(
        model,
        speculative={"model": model, "tree": "chain:2"},
        max_batch=2,
        max_len=96,
        page_size=16,
        steps_per_dispatch=4,
        prefill_chunks=(16,),
    )


@pytest.mark.slow
def test_answers_are_those_to_the_written_conversation(llm, tokenizer):
    (one,) = llm.chat(HELLO, PARAMS)
    (same,) = llm.generate(tokenizer.encode_chat(HELLO), PARAMS)
    assert one.token_ids == same.token_ids and len(one.token_ids) == 6
    assert one.finish_reason == "stop" and one.prompt == HELLO
    # An answer begins a text: the space of its first word is not part of it.
    assert (one.text, same.text) == ("the\u00e9 a", " the\u00e9 a")
    several = llm.chat([HELLO, LONGER, HELLO], [PARAMS] * 3)
    assert [c.prompt for c in several] == [HELLO, LONGER, HELLO]
    assert several[0].token_ids == several[2].token_ids == one.token_ids


@pytest.mark.slow
def test_stream_is_the_same_answer(llm):
    stream = llm.stream_chat(HELLO, PARAMS)
    pieces = list(stream)
    assert "".join(pieces) == stream.completion.text == "the\u00e9 a"
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.slow
def test_tasks_get_the_same_answers(llm):
    async def main():
        stream = llm.astream_chat(HELLO, PARAMS)
        several = await llm.achat([HELLO, LONGER], PARAMS)
        return several, [piece async for piece in stream], stream.completion

    several, pieces, completion = asyncio.run(main())
    assert "".join(pieces) == completion.text == several[0].text == "the\u00e9 a"
    assert [c.prompt for c in several] == [HELLO, LONGER]
    assert completion.token_ids == several[0].token_ids


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([*HELLO, *HELLO], "refuses: roles must take turns, the user first"),
        ([{"role": "user"}], 'needs a "content"'),
        ([], "the conversation is empty"),
        ([{"role": "user", "content": "the cat " * 40}], "max_len is 96"),
    ],
)
def test_conversations_that_cannot_be_answered(llm, messages, expected):
    for answer in (llm.chat, llm.stream_chat):
        with pytest.raises(UserError, match=expected) as caught:
            answer(messages, PARAMS)
        assert "\n" not in str(caught.value)


def test_params_are_counted(llm):
    with pytest.raises(UserError, match="2 conversations but 1 sampling parameters"):
        llm.chat([HELLO, HELLO], [PARAMS])


def test_a_model_without_a_template_says_so(tokenizer, tmp_path):
    shutil.copy(GOLDEN / "llama2" / "tokenizer.json", tmp_path)
    bare = load_tokenizer(tmp_path)
    for reader, expected in ((bare, "no chat template beside"), (None, "no tokenizer")):
        model = LLM(
            scripted(reader, {}),
            speculative=None,
            max_batch=1,
            max_len=32,
            page_size=16,
        )
        with pytest.raises(UserError, match=expected):
            model.chat(HELLO)


def test_notes_on_vocabularies(tokenizer):
    """A padded target, a drafter that lacks its last rows, and one of other tokens."""
    size = tokenizer.vocab_size
    padded = scripted(tokenizer, {}, vocab_size=size + 24)
    exact = scripted(tokenizer, {})
    assert LLM(exact, speculative=None, max_len=32).notes == ()
    model = LLM(padded, speculative={"model": exact, "tree": "chain:2"}, max_len=32)
    (note,) = model.notes
    assert note.endswith(
        f"has {size} pieces, the model {size + 24} embeddings: the last 24 are padding "
        "and stand for no text"
    )
    foreign = scripted(load_tokenizer(GOLDEN / "gemma"), {})
    with pytest.raises(UserError, match="token 0 is '<unk>' in the target and '<pad>'"):
        LLM(exact, speculative={"model": foreign, "tree": "chain:2"}, max_len=32)


def test_tokens_without_a_row_are_refused(tokenizer):
    """Added tokens past the embedding, as some checkpoints have them."""
    reader = load_tokenizer(GOLDEN / "mistral")
    target = scripted(reader, {}, vocab_size=reader.vocab_size - 1)
    model = LLM(target, speculative=None, max_len=32)
    assert model.notes[0].endswith("from '[/INST]' on cannot be used")
    with pytest.raises(UserError, match=f"token id {reader.vocab_size - 1} is outside"):
        model.generate("a [/INST] b")
