"""Suites of questions by name: bundled ones, and files in the formats of others.

A further format takes a reader and a line in `FORMATS`.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import string
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from treespec_jax.commands.prompts import STORIES
from treespec_jax.errors import UserError
from treespec_jax.measurement.suite import Question, Suite

# Questions of the suite of random text, and words in each.
_RANDOM_TEXTS, _RANDOM_WORDS = 8, 24
BUNDLED = Path(__file__).resolve().parent.parent / "bundled" / "suites"
# The categories of MT-bench, which Spec-Bench holds as one task.
_MULTI_TURN = (
    *("writing", "roleplay", "reasoning", "math"),
    *("coding", "extraction", "stem", "humanities"),
)


@dataclasses.dataclass(frozen=True)
class Format:
    """Where a suite is read from, and how.

    Attributes:
      file: its usual name inside a folder; empty: a file must be named.
      read: turns a line's number and object into a question; raises KeyError or
        TypeError if it is of another format.
      example: a line of the format.
    """

    file: str
    read: Callable[[int, Mapping[str, Any]], Question]
    example: str


def _turns(row: Mapping[str, Any]) -> tuple[str, ...]:
    turns = row["turns"]
    if not isinstance(turns, list) or not turns or not all(map(_is_words, turns)):
        raise TypeError
    return tuple(turns)


def _is_words(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _words(row: Mapping[str, Any], name: str) -> str:
    if not _is_words(row[name]):
        raise TypeError
    return row[name]


def _mt_bench(number: int, row: Mapping[str, Any]) -> Question:
    return Question(str(row["question_id"]), _words(row, "category"), _turns(row))


def _spec_bench(number: int, row: Mapping[str, Any]) -> Question:
    question = _mt_bench(number, row)
    if question.category in _MULTI_TURN:
        return dataclasses.replace(question, category="mt_bench")
    return question


def _humaneval(number: int, row: Mapping[str, Any]) -> Question:
    return Question(_words(row, "task_id"), "humaneval", (_words(row, "prompt"),))


def _gsm8k(number: int, row: Mapping[str, Any]) -> Question:
    return Question(str(number), "gsm8k", (_words(row, "question"),))


def _of_a_file(number: int, row: Mapping[str, Any]) -> Question:
    turns = _turns(row) if "turns" in row else (_words(row, "prompt"),)
    category = _words(row, "category") if "category" in row else "file"
    return Question(str(row.get("question_id", number)), category, turns)


_TURNS = '{"question_id": 1, "category": "qa", "turns": ["…"]}'
FORMATS = {
    "spec-bench": Format("question.jsonl", _spec_bench, _TURNS),
    "mt-bench": Format("question.jsonl", _mt_bench, _TURNS),
    "humaneval": Format(
        "HumanEval.jsonl.gz", _humaneval, '{"task_id": "…", "prompt": "…"}'
    ),
    "gsm8k": Format("test.jsonl", _gsm8k, '{"question": "…"}'),
    "file": Format("", _of_a_file, '{"prompt": "…"} or {"turns": ["…"]}'),
}


def find(name: str, chat: bool) -> Suite:
    """The suite of a name.

    Args:
      name: `mini`, `stories`, `random`, or `FORMAT:PATH` with a format of `FORMATS`;
        empty: the usual one of the model.
      chat: whether the model answers conversations: `mini` is its usual suite, else
        `stories`.

    Raises:
      UserError: an unknown name, no path where one is needed, or a file that cannot
        be read or is of another format.
    """
    name = name or ("mini" if chat else "stories")
    if name == "mini":
        return _read(name, BUNDLED / "mini.jsonl", FORMATS["mt-bench"])
    if name == "stories":
        stories = enumerate(STORIES, 1)
        return Suite(name, tuple(Question(str(n), name, (s,)) for n, s in stories))
    if name == "random":
        return Suite(name, tuple(map(_random, range(_RANDOM_TEXTS))), as_text=True)
    kind, _, path = name.partition(":")
    if kind not in FORMATS:
        bundled = "mini", "stories", "random"
        known = ", ".join([*bundled, *(f"{kind}:PATH" for kind in FORMATS)])
        raise UserError(f"suite {name!r} is unknown; choose from {known}")
    known = FORMATS[kind]
    if not path:
        example = known.file or "prompts.txt"
        raise UserError(
            f"--suite={name} is read from a file; name it as in "
            f"--suite={kind}:path/to/{example}"
        )
    file = Path(path).expanduser()
    return _read(name, file / known.file if file.is_dir() else file, known)


def _random(number: int) -> Question:
    """Words of random letters, which nobody can guess."""
    letters = random.Random(number)
    words = (
        "".join(letters.choices(string.ascii_lowercase, k=letters.randint(1, 9)))
        for _ in range(_RANDOM_WORDS)
    )
    return Question(str(number), "random", (" ".join(words),))


def _read(name: str, file: Path, known: Format) -> Suite:
    lines = [(number, line) for number, line in _lines(file) if line.strip()]
    if known.file or ".jsonl" in file.suffixes:
        return Suite(name, tuple(_question(file, n, s, known) for n, s in lines))
    return Suite(name, tuple(Question(str(n), "file", (s,)) for n, s in lines))


def _question(file: Path, number: int, line: str, known: Format) -> Question:
    try:
        return known.read(number, json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{file}:{number}: expected {known.example}, got {line:.60}"
        ) from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, compressed or not, by number."""
    try:
        opened = gzip.open if file.suffix == ".gz" else open
        with opened(file, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                yield number, line.rstrip("\r\n")
    except (EOFError, zlib.error):
        message = f"suite {file} is cut short or damaged; copy it again"
        raise UserError(message) from None
    except OSError as error:
        problem = error.strerror or str(error)
        raise UserError(f"suite {file}: {problem}; check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"suite {file} is not UTF-8 text; save it so") from None
