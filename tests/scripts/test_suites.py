"""Suites: the formats that they are read from, the bundled ones, and conversations."""

from __future__ import annotations

import collections
import gzip
import json
import string

import pytest

from treespec_jax.commands import prompts, suites
from treespec_jax.errors import UserError
from treespec_jax.measurement.suite import Conversation, Question, Suite


def write(path, *rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(
        gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode()
    )
    return path


def row(number, category, *turns, **more):
    return {"question_id": number, "category": category, "turns": list(turns), **more}


def test_spec_bench_has_the_tasks_that_its_authors_print(tmp_path):
    rows = [
        row(81, "writing", "Write.", "Again."),
        row(91, "stem", "Explain.", "Shorter.", reference=["a", "b"]),
        row(161, "translation", "Translate."),
        row(481, "rag", "Line one.\nLine two."),
    ]
    write(tmp_path / "question.jsonl", *rows)
    suite = suites.find(f"spec-bench:{tmp_path}", chat=True)
    assert suite.categories == ["mt_bench", "translation", "rag"]
    assert suite.questions[1] == Question("91", "mt_bench", ("Explain.", "Shorter."))
    assert suite.questions[3].turns == ("Line one.\nLine two.",)
    same = suites.find(f"mt-bench:{tmp_path / 'question.jsonl'}", chat=False)
    assert same.categories == ["writing", "stem", "translation", "rag"]


def test_humaneval_is_read_compressed_or_not(tmp_path):
    rows = [{"task_id": f"HumanEval/{n}", "prompt": f"def f{n}():\n"} for n in range(2)]
    write(tmp_path / "HumanEval.jsonl.gz", *rows)
    packed = suites.find(f"humaneval:{tmp_path}", chat=True)
    plain = write(tmp_path / "h.jsonl", *rows)
    assert packed.questions == suites.find(f"humaneval:{plain}", chat=True).questions
    assert packed.questions[1] == Question("HumanEval/1", "humaneval", ("def f1():\n",))


def test_gsm8k_asks_the_question_alone(tmp_path):
    write(tmp_path / "test.jsonl", {"question": "1 + 1?", "answer": "#### 2"})
    (question,) = suites.find(f"gsm8k:{tmp_path}", chat=True).questions
    assert question == Question("1", "gsm8k", ("1 + 1?",))


def test_a_file_may_be_lines_or_objects(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    lines = suites.find(f"file:{tmp_path / 'p.txt'}", chat=True).questions
    assert [q.turns for q in lines] == [("one",), (" two ",)]
    rows = {"prompt": "one"}, {"turns": ["a", "b"], "category": "mine"}
    write(tmp_path / "p.jsonl", *rows)
    objects = suites.find(f"file:{tmp_path / 'p.jsonl'}", chat=True).questions
    assert [q.category for q in objects] == ["file", "mine"]
    assert objects[1].turns == ("a", "b")


def test_the_usual_suite_is_that_of_the_model():
    assert suites.find("", chat=True).name == "mini"
    stories = suites.find("", chat=False)
    assert stories.name == "stories"
    assert tuple(q.turns[0] for q in stories.questions) == prompts.STORIES


def test_random_text_is_continued_by_chat_models_too():
    suite = suites.find("random", chat=True)
    assert suite.as_text and not suites.find("mini", chat=True).as_text
    assert len({q.turns for q in suite.questions}) == 8
    assert suite == suites.find("random", chat=False)
    for question in suite.questions:
        (text,) = question.turns
        assert len(text.split()) == 24 and set(text) <= {*string.ascii_lowercase, " "}


def test_mini_has_ten_prompts_of_each_kind():
    suite = suites.find("mini", chat=False)
    counts = collections.Counter(q.category for q in suite.questions)
    assert set(counts.values()) == {10} and len(counts) == 6
    assert len({q.turns for q in suite.questions}) == 60
    for question in suite.questions:
        (text,) = question.turns
        if question.category in ("summarising", "editing"):
            order, _, passage = text.partition("\n\n")
            assert order and 60 <= len(passage.split()) <= 150, question.id
        assert text == text.strip() and "  " not in text.replace("    ", "")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("spec-banch:x", None, "'spec-banch:x' is unknown; choose from mini"),
        ("spec-bench", None, "--suite=spec-bench:path/to/question.jsonl"),
        ("gsm8k:", None, "gsm8k:path/to/test.jsonl"),
        ("gsm8k:{}", None, "No such file"),
        ("gsm8k:{}", "", "holds no question"),
        ("gsm8k:{}", '{"question": 3}', "x.jsonl:1: expected .*question"),
        ("mt-bench:{}", '{"question_id": 1, "category": "a"}', "x.jsonl:1: expected"),
        ("mt-bench:{}", "[]", "x.jsonl:1: expected"),
        ("spec-bench:{}", "not json", "got not json"),
        ("file:{}", '{"turns": []}', "x.jsonl:1"),
        ("humaneval:{}.gz", "not packed", "check the path"),
    ],
)
def test_mistakes_are_named(tmp_path, name, text, expected):
    file = tmp_path / "x.jsonl"
    if text is not None:
        (tmp_path / (file.name + ".gz" * name.endswith(".gz"))).write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        suites.find(name.format(file), chat=True)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        suites.find(f"file:{tmp_path / 'x.txt'}", chat=True)
    whole = write(tmp_path / "x.jsonl.gz", *({"prompt": str(n)} for n in range(99)))
    whole.write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(UserError, match="cut short"):
        suites.find(f"file:{whole}", chat=True)


def test_a_suite_takes_the_first_of_each_category():
    questions = [Question(str(n), "ab"[n % 2], (f"{n}",)) for n in range(6)]
    suite = Suite("s", tuple(questions))
    assert [q.id for q in suite.first(2).questions] == ["0", "1", "2", "3"]
    assert suite.first(0) is suite and suite.first(9).questions == suite.questions
    assert suite.digest != suite.first(2).digest
    with pytest.raises(UserError, match="3 questions with the id '0'"):
        Suite("s", (questions[0],) * 3)


def test_a_conversation_holds_the_answers_of_the_model():
    question = Question("1", "c", ("Hello.", "And now?"))
    chat, text = Conversation(question, True), Conversation(question, False)
    assert chat.prompt() == [{"role": "user", "content": "Hello."}]
    assert text.prompt() == "Hello."
    for each in (chat, text):
        each.answered(" Hi!")
        assert not each.finished
    assert [m["role"] for m in chat.prompt()] == ["user", "assistant", "user"]
    assert [m["content"] for m in chat.prompt()] == ["Hello.", " Hi!", "And now?"]
    assert text.prompt() == "Hello. Hi!\n\nAnd now?"
    text.end()
    chat.answered("Bye.")
    assert text.finished and chat.finished
