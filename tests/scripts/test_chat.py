"""scripts/generate.py --chat: conversations from flags, files and stdin."""

from __future__ import annotations

import io
import json

import pytest


@pytest.fixture
def chat(run_script, chat_pair, monkeypatch):
    def run(*args: str, said: str = "", code: int = 0):
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        result = run_script(
            "generate.py",
            f"--target={chat_pair / 'target'}",
            f"--draft={chat_pair / 'draft'}",
            "--tree=chain:2",
            "--max_len=128",
            "--max_batch=1",
            "--max_tokens=6",
            "--ignore_eos",
            "--chat",
            *args,
        )
        assert result.code == code, result.err
        return result

    return run


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.slow
def test_one_turn(chat):
    result = chat("--prompt=the cat", "--system=be kind", "--json", "--compare")
    report = json.loads(result.out)
    (completion,) = report["completions"]
    assert completion["prompt"] == [
        {"role": "system", "content": "be kind"},
        user("the cat"),
    ]
    assert len(completion["token_ids"]) == 6
    assert report["comparison"]["identical"]
    assert "note: " in result.err and "the last 24 are padding" in result.err
    shown = chat("--prompt=the cat", "--system=be kind")
    assert shown.out == completion["text"] + "\n\n" and "tokens per step" in shown.err


@pytest.mark.slow
def test_a_file_of_conversations(chat, tmp_path):
    answered = [user("hi"), {"role": "assistant", "content": "ho"}, user("the dog")]
    lines = [{"prompt": "the cat"}, {"messages": answered}]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    *lines, _ = map(
        json.loads, chat(f"--prompts_file={file}", "--json").out.split("\n")[:-1]
    )
    prompts = [c["prompt"] for c in sorted(lines, key=lambda c: c["index"])]
    assert prompts == [[user("the cat")], answered]
    (tmp_path / "p.txt").write_text("the cat\nthe dog\n")
    out = chat(f"--prompts_file={tmp_path / 'p.txt'}").out
    assert "> the cat\n" in out and "> the dog\n" in out


@pytest.mark.slow
def test_a_conversation_is_verified_when_it_is_over(chat):
    """Every answer, after what was said before it."""
    result = chat("--verify_lossless", "--json", said="the cat\nand then\n")
    found = json.loads(result.out)["exactness"]
    assert found["lossless"] and found["texts"] == 2
    assert found["equal"] == found["tokens"] == 12


@pytest.mark.slow
def test_a_conversation_on_stdin(chat):
    """Answers are remembered until /reset; what does not fit is told and forgotten."""
    said = ["the cat", "", "and then", "long " * 60, "/reset", "the cat", "/exit", "no"]
    result = chat("--json", said="\n".join(said))
    report = json.loads(result.out)
    first, second, third = report["completions"]
    assert first["prompt"] == third["prompt"] == [user("the cat")]
    assert first["token_ids"] == third["token_ids"]
    assert second["prompt"] == [
        user("the cat"),
        {"role": "assistant", "content": first["text"]},
        user("and then"),
    ]
    assert report["stats"]["requests"] == 3 and report["stats"]["tokens"] == 18
    assert "max_len is 128; shorten it or raise max_len; /reset begins" in result.err
    out = chat(said="the cat\n").out
    assert out.startswith(first["text"] + "\n")


@pytest.mark.slow
def test_options_reach_the_template(chat):
    """One that stands for what the template would see of the tokenizer."""
    given = ["--prompt=the cat", "--json"]
    option = '--chat_option=bos_token="<s>the cat "'
    lengths = [
        json.loads(chat(*given, *more).out)["stats"]["prompt_tokens"]
        for more in ([], [option], [option, "--compare"])
    ]
    assert lengths[0] < lengths[1] == lengths[2]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--chat_option=a"], "--chat_option=a: expected NAME=JSON"),
        (["--chat_option==1"], "--chat_option==1: expected NAME=JSON"),
        (
            ["--prompt=a", "--prompts_file=b"],
            "give --prompt or --prompts_file, got both",
        ),
        (["--prompt= "], "the prompt is empty"),
        (["--system= "], "--system is empty"),
    ],
)
def test_flags_that_make_no_conversation(chat, args, expected):
    assert expected in chat(*args, code=2).err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"messages": []}', "p.jsonl:1: the conversation is empty"),
        ('{"messages": [{"role": "user"}]}', 'p.jsonl:1: message 0 (user) needs a "c'),
        ('{"question": "a"}', 'p.jsonl:1: expected {"prompt": "some text"}'),
        (
            json.dumps({"messages": [user("a"), user("b")]}),
            "the chat template refuses: roles must take turns, the user first",
        ),
    ],
)
def test_files_that_hold_no_conversation(chat, tmp_path, line, expected):
    (tmp_path / "p.jsonl").write_text(line)
    result = chat(f"--prompts_file={tmp_path / 'p.jsonl'}", code=2)
    assert expected in result.err and len(result.err.splitlines()) == 1


def test_a_model_without_a_template(refuses, files):
    refuses(
        "no chat template beside",
        "generate.py",
        f"--target={files.target}",
        f"--draft={files.draft}",
        "--chat",
        "--prompt=a",
    )
    refuses("--system needs --chat", "generate.py", "--prompt=a", "--system=b")
