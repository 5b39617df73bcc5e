"""Texts of a target: whole after any kill, its own tokens, and rows that say which."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import TINY
from treespec_jax.checkpoints import LoadedModel, load_tokenizer
from treespec_jax.checkpoints.catalogue import BUNDLED
from treespec_jax.config import SamplingParams
from treespec_jax.errors import UserError
from treespec_jax.llm import LLM
from treespec_jax.training import answer_prompts, answering, answers
from treespec_jax.training.answer_prompts import Prompt, Sources, gather
from treespec_jax.training.answers import Text, Writer, join, read_answers, read_texts
from treespec_jax.training.settings import Source

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tokenizers"
OWN = SamplingParams(temperature=0.7, top_p=0.9, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_target) -> LLM:
    model = LoadedModel(TINY, tiny_target, None, "tiny", np.dtype("float32"))
    return LLM(
        model,
        speculative=None,
        max_batch=3,
        max_len=64,
        page_size=16,
        steps_per_dispatch=4,
        prefill_chunks=(16,),
    )


@pytest.fixture(scope="module")
def prompts(ragged_prompts) -> list[Prompt]:
    """Ten, every third sampled in a way of its own."""
    return [
        Prompt(tuple(ragged_prompts[i % 5]), f"file{i % 2}", None if i % 3 else OWN)
        for i in range(10)
    ]


@pytest.fixture(autouse=True)
def writes_at_once(monkeypatch):
    monkeypatch.setattr(answering, "_SECONDS", 0.0)


@pytest.fixture
def run(llm, prompts, tmp_path):
    """Generates into a folder of that name."""

    def generate(name: str, **changes):
        changes = {"sampling": SamplingParams(max_tokens=9)} | changes
        settings = answering.Settings(
            output=tmp_path / name, seed=5, progress=False, **changes
        )
        return answering.generate(llm, "tiny", prompts, settings)

    return generate


@pytest.fixture(scope="module")
def whole(llm, prompts, tmp_path_factory) -> answers.Answers:
    """All texts, made in one go."""
    folder = tmp_path_factory.mktemp("whole")
    settings = answering.Settings(
        folder, SamplingParams(max_tokens=9), seed=5, progress=False
    )
    result = answering.generate(llm, "tiny", prompts, settings)
    found = read_answers(folder)
    assert result.finished and result.texts == len(found) == 10
    written = len(found.tokens) - found.prompt_tokens.sum()
    assert (result.total_tokens, result.tokens) == (len(found.tokens), written)
    return found


def assert_same(found: answers.Answers, expected: answers.Answers) -> None:
    for field in dataclasses.fields(answers.Answers):
        mine, other = (getattr(x, field.name) for x in (found, expected))
        assert np.array_equal(mine, other), field.name


def test_texts_are_those_of_generate(llm, prompts, whole):
    for index, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=9, temperature=float(index % 2))
        if prompt.sampling:
            params = dataclasses.replace(OWN, max_tokens=9)
        params = dataclasses.replace(params, seed=5 + index)
        (expected,) = llm.generate([list(prompt.ids)], params)
        assert whole.text(index).tolist() == [*prompt.ids, *expected.token_ids]
        assert whole.prompt_tokens[index] == len(prompt.ids)
        assert whole.temperatures[index] == np.float32(params.temperature)
    assert whole.sources == tuple(p.source for p in prompts)


# The first write to the disk is metadata.json, then tokens and their lines take turns.
@pytest.mark.parametrize("write", [0, 1, 2, 3, 4])
def test_killed_at_any_write_and_repeated(run, whole, tmp_path, monkeypatch, write):
    class Killed(BaseException):
        pass

    count, sync = 0, os.fsync

    def dies(number):
        nonlocal count
        count += 1
        if count > write:
            raise Killed
        sync(number)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", dies)
        with pytest.raises(Killed):
            run("out")
    lines = [file.read_text() for file in (tmp_path / "out").glob("texts-*")]
    found = "".join(lines).count("\n")
    assert (0 < found < 10) == (write >= 2)
    result = run("out")
    assert result.finished and result.texts == 10 - found
    assert_same(read_answers(tmp_path / "out"), whole)
    assert run("out").texts == 0


def test_a_part_of_a_line_is_cut_off(run, whole, tmp_path):
    run("out", max_minutes=1e-9)
    folder = tmp_path / "out"
    with (folder / "texts-0-of-1.jsonl").open("ab") as file:
        file.write(b'{"index": 0, "tokens": 3')
    with (folder / "tokens-0-of-1.bin").open("ab") as file:
        file.write(b"\x07\x00\x07")
    with pytest.raises(UserError, match="holds no text yet"):
        read_answers(folder)
    assert run("out").finished
    assert_same(read_answers(folder), whole)


def test_time_ends_a_run_that_goes_on(run, llm, whole, tmp_path, monkeypatch):
    """What has begun by then is finished, and nothing is begun."""
    clock = iter(np.arange(0.0, 1000.0, 0.5))
    with monkeypatch.context() as patched:
        patched.setattr(answering.time, "monotonic", lambda: float(next(clock)))
        # Long enough for the first dispatch.
        result = run("out", max_minutes=1.6 / 60)
    assert not result.finished and result.texts == 3
    assert not llm.engine.busy
    assert run("out").texts == 7
    assert_same(read_answers(tmp_path / "out"), whole)


def test_an_interrupted_run_leaves_no_request_behind(run, llm, monkeypatch):
    advance = llm.engine.advance
    calls = iter(range(2))

    def interrupted():
        next(calls)
        return advance()

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine, "advance", interrupted)
        with pytest.raises(StopIteration):
            run("out")
    assert not llm.engine.busy
    assert run("out").finished


def test_shards_share_the_work(run, whole, tmp_path):
    parts = [run("out", shard=(i, 3)) for i in range(3)]
    assert [part.texts for part in parts] == [4, 3, 3]
    indices = []
    for i in range(3):
        lines = (tmp_path / "out" / f"texts-{i}-of-3.jsonl").read_text().splitlines()
        indices.append({json.loads(line)["index"] for line in lines})
        assert {index % 3 for index in indices[i]} == {i}
    assert_same(read_answers(tmp_path / "out"), whole)
    # Another number of processes goes on from what is there.
    assert run("out", shard=(0, 1)).texts == 0


def test_folders_of_others_are_refused(run, llm, prompts, tmp_path):
    run("out", max_minutes=1e-9)
    other = SamplingParams(max_tokens=10)
    with pytest.raises(UserError, match=r"with max_tokens=9, not 10; choose another"):
        run("out", sampling=other)
    with pytest.raises(UserError, match=r"temperatures=\[0.0, 1.0\], not \[0.0\]"):
        run("out", temperatures=(0.0,))
    sampling = SamplingParams(max_tokens=9)
    settings = answering.Settings(tmp_path / "out", sampling, seed=5, progress=False)
    with pytest.raises(UserError, match="with prompts='"):
        answering.generate(llm, "tiny", [*prompts[:9], prompts[0]], settings)
    identity = json.loads((tmp_path / "out" / "metadata.json").read_text())["identity"]
    with (
        Writer(tmp_path / "out", identity, 97),
        pytest.raises(UserError, match="another process writes"),
    ):
        Writer(tmp_path / "out", identity, 97)


def numbered(tmp_path, lengths, vocab_size=70_000) -> answers.Answers:
    """Texts whose tokens say which text and which position they are."""
    with Writer(tmp_path, {}, vocab_size) as writer:
        for index, (prompt, length) in enumerate(lengths):
            tokens = [1000 * index + position for position in range(prompt + length)]
            writer.append([Text(index, tokens, prompt, 1.0, "numbers")])
    return read_answers(tmp_path)


def test_rows_hold_whole_texts_and_say_what_the_target_wrote(tmp_path):
    rng = np.random.default_rng(1)
    lengths = [(int(rng.integers(0, 9)), int(rng.integers(1, 60))) for _ in range(60)]
    found = numbered(tmp_path, lengths)
    assert found.tokens.dtype == np.int32 and found.tokens.max() > 2**15
    parts = found.rows(16, held_out=0.1, seed=3)
    seen = []
    for rows in parts:
        assert rows.tokens.dtype == np.int32 and rows.written.dtype == bool
        assert rows.tokens.shape == rows.written.shape == (len(rows.tokens), 17)
        for name in ("tokens", "written"):
            values = getattr(rows, name)
            assert np.array_equal(values[1:, 0], values[:-1, -1])
        # A stream of texts, each from its first token to its last.
        stream = np.append(rows.tokens[:, :-1], rows.tokens[-1, -1])
        for this, following in zip(stream[:-1], stream[1:], strict=True):
            prompt, length = lengths[this // 1000]
            last = this % 1000 == prompt + length - 1
            assert following % 1000 == 0 if last else following == this + 1
        prompt_tokens = np.array([prompt for prompt, _ in lengths])
        expected = rows.tokens % 1000 >= prompt_tokens[rows.tokens // 1000]
        assert np.array_equal(rows.written, expected) and not rows.written.all()
        seen.append(set((stream // 1000).tolist()))
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) >= 59
    assert len(seen[1]) <= 6
    again, _ = found.rows(16, 0.1, seed=3)
    other, _ = found.rows(16, 0.1, seed=4)
    assert np.array_equal(again.tokens, parts[0].tokens)
    assert not np.array_equal(again.tokens[0], other.tokens[0])
    with pytest.raises(UserError, match="no row of 4096 tokens"):
        found.rows(4096, 0.1)


def test_of_few_texts_a_row_is_held_out(tmp_path):
    short = numbered(tmp_path / "short", [(1, 4)] * 20)
    train, held = short.rows(16, held_out=0.02)
    # Four texts of five tokens fill it.
    assert len(held.tokens) == 1 and len(train.tokens) == 4
    one = numbered(tmp_path / "one", [(3, 77)])
    train, held = one.rows(16, held_out=0.02)
    assert held.tokens.tolist() == [list(range(63, 80))] and held.written.all()
    assert train.tokens[:, 0].tolist() == [0, 16, 32]
    assert train.written.sum() == 3 * 17 - 3
    with pytest.raises(UserError, match="leave no row of 40 tokens to train on"):
        one.rows(40, held_out=0.02)


def test_texts_without_tokens_and_repeated_dialogues_are_left_out(tmp_path):
    same = list(range(100, 132))
    texts = [
        ([1, *same, 7], answers.DIALOGUES),
        ([1, *same, 8], answers.DIALOGUES),
        ([1, *same[:-1], 9, 9], answers.DIALOGUES),
        ([1, *same, 8], "questions.jsonl"),
        ([1], "questions.jsonl"),
    ]
    with Writer(tmp_path, {}, 200) as writer:
        # The first by number stays, whichever was finished first.
        for index, (tokens, source) in reversed(list(enumerate(texts))):
            writer.append([Text(index, tokens, 1, 1.0, source)])
    found = read_answers(tmp_path)
    assert [found.text(i).tolist() for i in range(len(found))] == [
        texts[i][0] for i in (0, 2, 3)
    ]


def test_damage_is_named(tmp_path):
    numbered(tmp_path, [(1, 5), (1, 7)])
    tokens, texts = tmp_path / "tokens-0-of-1.bin", tmp_path / "texts-0-of-1.jsonl"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-4])
    for act in (read_answers, lambda folder: Writer(folder, {}, 70_000)):
        with pytest.raises(UserError, match="holds 13 of 14 tokens: it is damaged"):
            act(tmp_path)
    tokens.write_bytes(content)
    lines = texts.read_text()
    texts.write_text('{"index": 3}\n' + lines)
    with pytest.raises(UserError, match="texts-0-of-1.jsonl is damaged"):
        read_answers(tmp_path)
    texts.write_text(lines)
    (tmp_path / answers.METADATA).write_text("{")
    with pytest.raises(UserError, match="metadata.json is damaged"):
        read_answers(tmp_path)
    with pytest.raises(UserError, match="holds no texts of generate_answers"):
        read_answers(tmp_path / "none")


def test_plain_texts_and_several_parts(tmp_path, text_path):
    tokenizer = load_tokenizer(GOLDEN / "llama2")
    plain = read_texts([Source(str(text_path), separator="\n\n")], tokenizer)
    assert len(plain) == 400 and set(plain.sources) == {text_path.name}
    first = plain.text(0).tolist()
    assert first[0] == tokenizer.bos_id and first[-1] in tokenizer.eos_ids
    document = text_path.read_text().split("\n\n")[0]
    assert tokenizer.decode(first) == document
    rows, _ = plain.rows(32, 0.1)
    assert np.array_equal(rows.written, rows.tokens != tokenizer.bos_id)
    own = numbered(tmp_path, [(2, 5), (1, 7)])
    both = join([plain, own, plain])
    assert len(both) == 802 and both.sources == (
        plain.sources + own.sources + plain.sources
    )
    for number, part, of_part in ((399, plain, 399), (401, own, 1), (402, plain, 0)):
        assert np.array_equal(both.text(number), part.text(of_part))
        assert both.prompt_tokens[number] == part.prompt_tokens[of_part]


# Prompts.


@pytest.fixture(scope="module")
def chat():
    return load_tokenizer(GOLDEN / "llama2")


@pytest.fixture(scope="module")
def base():
    return load_tokenizer(BUNDLED / "target")


@pytest.mark.parametrize("name", ["llama2", "smollm", "qwen", "llama3", "gemma"])
def test_dialogues_begin_as_any_users_message_does(name):
    tokenizer = load_tokenizer(GOLDEN / name)
    if not tokenizer.has_chat_template:
        pytest.skip("without a chat template")
    prompts = gather(Sources(dialogues=3), tokenizer)
    assert len(prompts) == 3 and len(set(prompts)) == 1
    assert prompts[0].sampling.ignore_eos and prompts[0].sampling.temperature == 1
    header = tokenizer.chat_template().render(
        [{"role": "user", "content": "Why?"}], {"add_generation_prompt": False}
    )
    ids = tokenizer.encode(header.partition("Why?")[0], add_bos=False)
    assert list(prompts[0].ids) == ids


def test_files_of_questions(chat, base, tmp_path):
    file = tmp_path / "questions.jsonl"
    said = [{"role": "user", "content": "Hi"}]
    lines = [
        {"prompt": "Why?"},
        {"question": "Who?"},
        {"turns": ["When?", "And then?"]},
        {"instruction": "Shorten.", "input": "A long text.", "output": "Text."},
        {"instruction": "Sing.", "input": ""},
        {"messages": [*said, {"role": "assistant", "content": "Hello!"}]},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    asked = ["Why?", "Who?", "When?", "Shorten.\n\nA long text.", "Sing.", "Hi"]
    found = gather(Sources(prompts=(str(file),)), chat)
    assert [list(p.ids) for p in found] == [
        chat.encode_chat([{"role": "user", "content": text}]) for text in asked
    ]
    assert {(p.source, p.sampling) for p in found} == {("questions.jsonl", None)}
    some = gather(Sources(prompts=(str(file), str(file)), limit=2), base)
    assert [list(p.ids) for p in some] == 2 * [base.encode(t) for t in asked[:2]]
    with pytest.raises(UserError, match="jsonl:6: messages need a chat template"):
        gather(Sources(prompts=(str(file),)), base)
    plain = tmp_path / "lines.txt"
    plain.write_text("one two\n\nthree\n")
    found = gather(Sources(prompts=(str(plain),)), base)
    assert [base.decode(p.ids) for p in found] == ["one two", "three"]


def test_passages_end_where_sentences_or_words_do(base, tmp_path):
    file = tmp_path / "tale.txt"
    file.write_text("One went away. Two stayed!\n\nThree of them were here and there.")
    sources = Sources(
        passages=(str(file),),
        templates=("sum: {passage}", "{passage} so"),
        passage_chars=27,
    )
    found = [base.decode(p.ids) for p in gather(sources, base)]
    assert found == [
        "sum: One went away. Two stayed!",
        "Three of them were here and so",
        "sum: there.",
    ]


def test_stories(base, tmp_path):
    (begun,) = set(gather(Sources(stories=4), base))
    assert begun.ids == (base.bos_id,) and begun.sampling.temperature == 1
    file = tmp_path / "openings.txt"
    file.write_text("once\n\nthere\n")
    found = gather(Sources(stories=3, openings=str(file)), base)
    assert [base.decode(p.ids) for p in found] == ["once", "there", "once"]


@pytest.mark.parametrize(
    ("fields", "content", "expected"),
    [
        ({}, None, "nothing to ask for"),
        ({"prompts": ("FILE",)}, None, "cannot read"),
        ({"prompts": ("FILE",)}, b"\xff", "is not UTF-8"),
        ({"prompts": ("FILE",)}, b" \n", "is empty"),
        ({"prompts": ("FILE",)}, b'{"text": 3}', 'jsonl:1: expected {"prompt"'),
        ({"prompts": ("FILE",)}, b"{}", 'jsonl:1: expected {"prompt"'),
        ({"prompts": ("FILE",)}, b'{"messages": [{}]}', 'jsonl:1: message 0 needs a "'),
        ({"passages": ("FILE",)}, b"a", "--template need each other"),
        ({"passages": ("FILE",), "templates": ("x",)}, b"a", "has no {passage}"),
        ({"openings": "FILE"}, b"a", "--openings needs --stories"),
        ({"dialogues": 2}, None, "--dialogues=2: the target has no chat template"),
        ({"dialogues": -1}, None, "dialogues must be a whole number"),
    ],
)
def test_bad_prompts_are_one_line(base, tmp_path, fields, content, expected):
    file = tmp_path / "bad.jsonl"
    if content is not None:
        file.write_bytes(content)
    given = {
        name: tuple(str(file) if v == "FILE" else v for v in value)
        if isinstance(value, tuple)
        else str(file)
        if value == "FILE"
        else value
        for name, value in fields.items()
    }
    with pytest.raises(UserError) as caught:
        gather(Sources(**given), base)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_what_has_no_beginning_is_refused(base, monkeypatch):
    monkeypatch.setattr(base, "bos_id", None)
    with pytest.raises(UserError, match="no token that begins a text"):
        gather(Sources(stories=1), base)


def test_bad_settings_are_one_line(llm, prompts, tmp_path):
    bad = [
        ({"output": ""}, "no output folder"),
        ({"temperatures": ()}, "--temperatures is empty"),
        ({"temperatures": (-1.0,)}, "temperatures must be"),
        ({"shard": (2, 2)}, "--shard=2/2"),
        ({"max_minutes": -1.0}, "max_minutes must be"),
    ]
    for changes, expected in bad:
        with pytest.raises(UserError, match=expected):
            answering.Settings(**{"output": tmp_path} | changes)
    long = [Prompt(tuple(range(64)), "long")]
    with pytest.raises(UserError, match="max_len is 64"):
        answering.generate(
            llm, "tiny", long, answering.Settings(tmp_path / "out", progress=False)
        )
    assert answer_prompts.STORIES != answers.DIALOGUES
