"""Answers to many prompts: each is written when it is finished, and none is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from treespec_jax.commands.prompts import Line, Prompt
from treespec_jax.config import SamplingParams
from treespec_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Question:
    """What is answered.

    Attributes:
      index: of its prompt, from 0.
      target: name of the model that answers.
      prompt: a text or a conversation.
      sampling: its settings.
      extra: further values of its line, copied to the answer.
    """

    index: int
    target: str
    prompt: Prompt
    sampling: SamplingParams
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What its answer begins with, as JSON gives it back."""
        values = {
            **self.extra,
            "index": self.index,
            "target": self.target,
            "prompt": self.prompt,
            "sampling": self._settings(),
        }
        return json.loads(json.dumps(values))

    def _settings(self) -> dict[str, Any]:
        """The settings that JSON can say."""
        fields = dataclasses.fields(self.sampling)
        names = [f.name for f in fields if not f.metadata.get("python")]
        return {name: getattr(self.sampling, name) for name in names}


def questions(
    lines: Sequence[Line], target: str, sampling: SamplingParams
) -> list[Question]:
    """A question per line.

    Raises:
      UserError: a line with settings that are none.
    """
    # Every text of a prompt has a seed of its own.
    step = sampling.samples
    return [
        Question(
            index,
            target,
            line.prompt,
            line.sampling(sampling, index * step),
            line.extra,
        )
        for index, line in enumerate(lines)
    ]


@dataclasses.dataclass(frozen=True)
class AnswerFile:
    """A file of answers, a JSON object a line, in the order in which they came.

    Attributes:
      path: of the file.
      resume: go on with the answers that are there.
      overwrite: forget them.
    """

    path: Path
    resume: bool = False
    overwrite: bool = False

    def unanswered(self, asked: Sequence[Question]) -> list[Question]:
        """The questions that the file has no answer to.

        Raises:
          UserError: the file is there and was to be a new one, cannot be read, or
            answers other questions.
        """
        if self.path.is_dir():
            raise UserError(f"--output={self.path} is a folder; give a file")
        there = self.path.is_file() and self.path.stat().st_size > 0
        if there and not (self.resume or self.overwrite):
            raise UserError(
                f"--output={self.path} is there; --resume goes on with it, --overwrite "
                "replaces it"
            )
        if not there or self.overwrite:
            self._check_writable()
            return list(asked)
        answered = set()
        for number, line in enumerate(self._whole_lines(), 1):
            answered.add(self._question_of(number, line, asked))
        return [question for question in asked if question.index not in answered]

    @contextlib.contextmanager
    def writing(self) -> Iterator[TextIO]:
        """The file, to append answers to; a line that a kill cut short is removed."""
        if self.resume and self.path.is_file():
            whole = b"".join(line + b"\n" for line in self._whole_lines())
            os.truncate(self.path, len(whole))
        with self.path.open("a" if self.resume else "w", encoding="utf-8") as file:
            yield file

    def _whole_lines(self) -> list[bytes]:
        return self.path.read_bytes().split(b"\n")[:-1]

    def _question_of(self, number: int, line: bytes, asked: Sequence[Question]) -> int:
        """The index of the question that a line answers."""
        try:
            record = json.loads(line)
            question = asked[record["index"]].record()
            same = all(record.get(key) == value for key, value in question.items())
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            same = False
        if not same:
            raise UserError(
                f"{self.path}:{number} answers no prompt of this run; take the same "
                "prompts, target and settings, or another --output"
            )
        return record["index"]

    def _check_writable(self) -> None:
        folder = self.path.absolute().parent
        if not folder.is_dir():
            raise UserError(f"--output={self.path}: no folder {folder}; make it first")
        there = self.path if self.path.exists() else folder
        if not os.access(there, os.W_OK):
            raise UserError(f"--output={self.path} cannot be written; choose another")


def write(file: TextIO, record: Mapping[str, Any]) -> None:
    """Writes an object as one line, at once."""
    file.write(json.dumps(record, default=dataclasses.asdict) + "\n")
    file.flush()


@contextlib.contextmanager
def bar(total: int, done: int, shown: bool) -> Iterator[Any]:
    """A progress bar on stderr, of `done` answers of `total` so far.

    Args:
      total: answers in all.
      done: of an earlier run.
      shown: whether there is one.
    """
    import tqdm

    with tqdm.tqdm(
        total=total, initial=done, unit="answer", disable=not shown, file=sys.stderr
    ) as progress:
        yield progress
