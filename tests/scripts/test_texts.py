"""Texts that Python holds and UTF-8 cannot, and streams that cannot take a text."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from tests.scripts.support import SCRIPTS
from treespec_jax import cli
from treespec_jax.checkpoints.files import read_json
from treespec_jax.commands import dialogue, prompts
from treespec_jax.errors import UserError

HALF = "a \ud83d b"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((False, HALF, None, None), "--prompt holds '\\ud83d', which is no character"),
        ((True, "a\udcff", None, None), "--prompt holds '\\udcff'"),
        ((True, "a", None, HALF), "--system holds '\\ud83d'"),
    ],
)
def test_flags(arguments, expected):
    with pytest.raises(UserError) as caught:
        prompts.gather(*arguments)
    assert expected in str(caught.value)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    "line",
    [
        json.dumps({"prompt": HALF}),
        json.dumps({"messages": [{"role": "user", "content": HALF}]}),
        '{"prompt": ' + "[" * 100000,
        "{}",
    ],
    ids=["prompt", "messages", "nested", "empty"],
)
def test_lines_of_a_file(tmp_path, chat, line):
    file = tmp_path / "some.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"{file}:2: ") as caught:
        prompts.gather(chat, None, str(file), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("some.txt", b"\xef\xbb\xbfthe cat\r\nthe dog\r\n"),
        ("some.jsonl", b'\xef\xbb\xbf{"prompt": "the cat"}\n{"prompt": "the dog"}\n'),
    ],
)
def test_byte_order_marks(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert prompts.read(str(tmp_path / name)) == ["the cat", "the dog"]
    (tmp_path / name).write_bytes(data.decode("utf-8-sig").encode("utf-16"))
    with pytest.raises(UserError, match="is not UTF-8 text; save it so"):
        prompts.read(str(tmp_path / name))


def test_byte_order_marks_elsewhere(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "config.json") == {"a": 1}
    said = []

    def answer(messages, talks):
        said.append(messages[-1]["content"])
        raise UserError("no room")

    dialogue.hold(answer, [], io.StringIO("\ufeffhello\n\ufeff\n/exit\n"))
    assert said == ["hello"]


def run(code: str, *arguments, shell: str = "", **environment):
    """A program as `scripts` start one, its streams changed by the shell."""
    program = f"from treespec_jax import cli\nimport sys\n{code}"
    line = f'exec "$0" "$@" {shell}'
    return subprocess.run(
        ["sh", "-c", line, sys.executable, "-c", program, *arguments],
        capture_output=True,
        env={
            **os.environ,
            "PYTHONPATH": str(SCRIPTS.parent),
            **environment,
        },
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_is_written(encoding):
    code = "cli.run(lambda _: print('é 你 \\ud800'), ['program'])"
    result = run(code, PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stderr) == (0, b"")
    want = "é 你 \ud800\n".encode(encoding, "backslashreplace")
    assert result.stdout == want


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams(closed):
    code = "cli.run(lambda _: print(sys.stdin.read()), ['program'])"
    result = run(code, shell=closed + ("" if "<" in closed else " </dev/null"))
    assert (result.returncode, result.stderr) == (0, b"")
    code = "cli.run(lambda _: cli.fail('no'), ['program'])"
    result = run(code, shell=closed)
    assert result.returncode == 2 and b"Traceback" not in result.stderr


def test_bytes_that_are_no_text_are_named():
    code = (
        "from treespec_jax.commands import prompts\n"
        "cli.run(lambda a: prompts.gather(False, a[1], None, None), sys.argv, 1)"
    )
    for encoding in ("utf-8", "ascii"):
        result = run(code, b"caf\xe9", PYTHONIOENCODING=encoding)
        assert result.returncode == 2
        assert result.stderr.startswith(b"error: --prompt holds '\\udce9', which is no")


def test_bytes_on_stdin_are_named():
    code = (
        "from treespec_jax.commands import dialogue\n"
        "from treespec_jax.checks import check_text\n"
        "def answer(said, talks): check_text('the text', said[-1]['content'])\n"
        "cli.run(lambda _: dialogue.hold(answer, []) and None, ['program'])"
    )
    shell = "<<'END'\ncaf\udce9\nEND".encode(errors="surrogateescape")
    result = run(code, shell=os.fsdecode(shell))
    assert result.returncode == 0
    assert result.stderr.startswith(b"error: the text holds '\\udce9'")


def test_the_streams_of_a_test_are_left_alone(capsys):
    with pytest.raises(SystemExit):
        cli.run(lambda _: print("é"), ["program"])
    assert capsys.readouterr().out == "é\n"
