"""generate --prompts_file: answers are written one by one, and runs go on."""

from __future__ import annotations

import io
import json

import pytest

from treespec_jax import LLM
from treespec_jax.commands import loading, prompts
from treespec_jax.commands.answers import AnswerFile, questions
from treespec_jax.config import SamplingParams
from treespec_jax.errors import UserError

TEXTS = ["the cat", "a dog", "one day", "so"]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_an_interrupted_run_goes_on(run_script, files, tmp_path, monkeypatch):
    """What was finished is there, and the whole is that of an undisturbed run."""
    given = [{"prompt": text, "id": text[0]} for text in TEXTS]
    given[0] |= {"max_tokens": 3, "temperature": 0.0}
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, given)))
    args = [f"--target={files.target}", "--tree=none", "--max_len=64", "--ignore_eos"]
    args += [f"--prompts_file={tmp_path / 'p.jsonl'}", "--max_tokens=12"]
    args += ["--max_batch=2", "--temperature=0.8", "--seed=5", "--quiet"]
    whole = tmp_path / "whole.jsonl"
    result = run_script("generate.py", *args, f"--output={whole}")
    assert (result.code, result.out, result.err) == (0, "", "")
    expected = sorted(lines_of(whole), key=lambda one: one["index"])
    assert [(one["prompt"], one["id"]) for one in expected] == [
        (text, text[0]) for text in TEXTS
    ]
    assert [len(one["token_ids"]) for one in expected] == [3, 12, 12, 12]
    assert [one["sampling"]["seed"] for one in expected] == [5, 6, 7, 8]

    part = tmp_path / "part.jsonl"
    generate = LLM.generate

    def interrupted(llm, *args, on_finish=None, **more):
        if on_finish is None:  # to compile
            return generate(llm, *args, **more)

        def once(index, completion):
            on_finish(index, completion)
            raise KeyboardInterrupt

        return generate(llm, *args, on_finish=once, **more)

    with monkeypatch.context() as patch:
        patch.setattr(LLM, "generate", interrupted)
        result = run_script("generate.py", *args[:-1], f"--output={part}")
    assert result.code == 130 and "has 1 of 4 answers" in result.err
    assert len(lines_of(part)) == 1
    with part.open("a") as file:
        file.write('{"index": 2, "prom')  # what a kill leaves
    again = ["generate.py", *args, f"--output={part}", "--resume"]
    assert run_script(*again).code == 0
    found = sorted(lines_of(part), key=lambda one: one["index"])
    assert [one["token_ids"] for one in found] == [one["token_ids"] for one in expected]
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_pair", lambda _: pytest.fail("weights"))
        assert run_script(*again).code == 0


def test_what_a_file_of_answers_refuses(refuses, files, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_pair", lambda _: pytest.fail("weights"))
    (tmp_path / "p.txt").write_text("a\nb\n")
    there = tmp_path / "there.jsonl"
    there.write_text('{"index": 0, "prompt": "b"}\n')
    args = ["generate.py", f"--target={files.target}", "--tree=none"]
    many = [*args, f"--prompts_file={tmp_path / 'p.txt'}"]
    refuses("--resume goes on with it", *many, f"--output={there}")
    refuses("there.jsonl:1 answers no prompt", *many, f"--output={there}", "--resume")
    refuses("is a folder", *many, f"--output={tmp_path}")
    refuses("make it first", *many, f"--output={tmp_path / 'no' / 'a.jsonl'}")
    refuses("--resume needs --output", *many, "--resume")
    refuses("exclude", *many, f"--output={there}", "--resume", "--overwrite")
    refuses("--prompts_file", *args, "--prompt=a", f"--output={there}")
    assert there.read_text() == '{"index": 0, "prompt": "b"}\n'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "another"}, "answers no prompt"),
        ({"target": "another"}, "answers no prompt"),
        ({"index": 7}, "answers no prompt"),
    ],
)
def test_only_answers_to_the_same_questions_count(tmp_path, change, message):
    asked = questions([prompts.Line("a"), prompts.Line("b")], "t", SamplingParams())
    file = tmp_path / "a.jsonl"
    record = asked[1].record() | {"text": "!"}
    file.write_text(json.dumps(record) + "\n")
    assert AnswerFile(file, resume=True).unanswered(asked) == asked[:1]
    file.write_text(json.dumps(record | change) + "\n")
    with pytest.raises(UserError, match=message):
        AnswerFile(file, resume=True).unanswered(asked)
    warmer = questions([prompts.Line("b")] * 2, "t", SamplingParams(temperature=1.0))
    file.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match="settings"):
        AnswerFile(file, resume=True).unanswered(warmer)


def test_lines_of_stdin_and_their_settings(monkeypatch, tmp_path):
    def gathered(text, chat=False):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return prompts.gather(chat, None, "-", None)[0]

    assert [one.prompt for one in gathered("\ufeffa\n\n b\n")] == ["a", " b"]
    one, other = gathered('{"prompt": "a", "top_p": 0.5, "id": 3}\n{"prompt": "b"}')
    base = SamplingParams(temperature=0.7, seed=2**32 - 1)
    assert one.sampling(base, 0) == SamplingParams(
        temperature=0.7, top_p=0.5, seed=base.seed
    )
    assert other.sampling(base, 1).seed == 0 and one.extra == {"id": 3}
    said = gathered('{"messages": [{"role": "user", "content": "a"}], "seed": 4}', True)
    assert said[0].prompt[0]["content"] == "a"
    assert said[0].sampling(base, 9).seed == 4
    for text, message in (
        ('{"prompt": "a", "max_token": 3}', "stdin:1: unknown key 'max_token'"),
        ('{"prompt": "a", "temperature": -1}', "stdin:1: temperature"),
        ('{"prompt": 5}', "stdin:1: expected"),
    ):
        with pytest.raises(UserError, match=message):
            [one.sampling(base, 0) for one in gathered(text)]
