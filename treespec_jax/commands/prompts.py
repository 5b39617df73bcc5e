"""Prompts and conversations: built in, from a flag, a file or stdin."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treespec_jax.checkpoints.chat import check_messages as chat_messages
from treespec_jax.checks import check_text, from_mapping
from treespec_jax.config import SamplingParams
from treespec_jax.errors import UserError

# Openings in the manner of the texts that small story models are trained on.
STORIES = (
    "once upon a time, there was a little dog who",
    "one day, a girl named lily went to the park with her mom.",
    "tom had a red ball. he liked to play with it in the garden.",
    "there was a big tree in the forest. a small bird lived in it.",
    "sara and ben were best friends. one morning they saw a",
    "the little cat was very hungry, so she",
    "it was a sunny day. max wanted to swim in the lake, but",
    "a kind old man had a small boat. every day he",
)
# One prompt: a text to continue, or the messages of a conversation to answer.
Prompt = str | list[dict[str, Any]]
# The file that is stdin.
STDIN = "-"
_NO_WORD = "the prompt is empty; with --chat it needs at least one word"
_SETTINGS = tuple(
    field.name
    for field in dataclasses.fields(SamplingParams)
    if not field.metadata.get("python")
)


@dataclasses.dataclass(frozen=True)
class Line:
    """A prompt, and what a .jsonl file says beside it.

    Attributes:
      prompt: a text or a conversation.
      values: of its line, by key, without the prompt: fields of `SamplingParams`, and
        others for the reader of the answers.
      where: file and number of the line, for messages.
    """

    prompt: Prompt
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = ""

    @property
    def extra(self) -> dict[str, Any]:
        """The values that are no settings."""
        return {k: v for k, v in self.values.items() if k not in _SETTINGS}

    def sampling(self, base: SamplingParams, number: int) -> SamplingParams:
        """The settings of the prompt.

        Args:
          base: those of all prompts; each has its seed plus its number.
          number: of the prompt, from 0.

        Raises:
          UserError: a value that is none, named with its line.
        """
        base = base.for_text(number)
        values = {name: getattr(base, name) for name in _SETTINGS}
        values |= {k: v for k, v in self.values.items() if k in _SETTINGS}
        try:
            return from_mapping(SamplingParams, values, "sampling").for_text()
        except (TypeError, UserError) as error:
            raise UserError(f"{self.where}: {error}") from None


def gather(
    chat: bool, prompt: str | None, file: str | None, system: str | None
) -> tuple[list[Line], list[dict[str, Any]] | None]:
    """What the flags --chat, --prompt, --prompts_file and --system ask for.

    With `chat` a line of the file is what the user says; in a .jsonl file an object
    holds a "prompt" of that kind, or all "messages". Its other keys may be fields of
    `SamplingParams`.

    Returns:
      prompts, and None; or no prompts, and the opening of a conversation to hold.

    Raises:
      UserError: both or neither of `prompt` and `file`, an unreadable file, an empty
        prompt, malformed messages, or `system` without `chat`.
    """
    if system is not None and not chat:
        raise UserError("--system needs --chat; add it")
    if chat and prompt is None and file is None:
        return [], opening(system)
    if (prompt is None) == (file is None):
        given = "neither" if prompt is None else "both"
        raise UserError(f"give --prompt or --prompts_file, got {given}")
    if file is None:
        check_text("--prompt", prompt)
        found = [Line(prompt)]
    else:
        found = _read(file, chat)
    if not chat:
        return found, None
    first, answered = opening(system), []
    for line in found:
        said = line.prompt
        said = _said_by_user(said) if isinstance(said, str) else said
        answered.append(dataclasses.replace(line, prompt=first + said))
    return answered, None


def opening(system: str | None) -> list[dict[str, Any]]:
    """What stands in front of a conversation. Raises UserError if it is empty."""
    if system is None:
        return []
    if not system.strip():
        raise UserError("--system is empty; leave it out or give it words")
    check_text("--system", system)
    return [{"role": "system", "content": system}]


def options(given: Sequence[str] | None) -> dict[str, Any]:
    """Values by name, of texts like enable_thinking=false.

    Raises:
      UserError: no such text, or a value that is not JSON.
    """
    found = {}
    for text in given or ():
        name, _, value = text.partition("=")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            name = ""
        if not name:
            expected = "expected NAME=JSON, enable_thinking=false for example"
            raise UserError(f"--chat_option={text}: {expected}")
    return found


def read_or_stories(file: str | None) -> list[str]:
    """The prompts of a file, see `read`; the built-in ones if none is named."""
    return read(file) if file else list(STORIES)


def read(file: str) -> list[str]:
    """One prompt a line; in a .jsonl file, an object with "prompt" a line.

    `STDIN` reads stdin, which is taken for the latter if it begins with an object.

    Raises:
      UserError: the file is unreadable, malformed or without a prompt.
    """
    return [line.prompt for line in _read(file)]


def _read(file: str, chat: bool = False) -> list[Line]:
    """The prompts; with `chat` they may be conversations."""
    lines = _lines(file)
    if file == STDIN:
        as_json, file = lines[0][1].lstrip().startswith("{"), "stdin"
    else:
        as_json = Path(file).suffix == ".jsonl"
    if as_json:
        return [_json_line(f"{file}:{number}", line, chat) for number, line in lines]
    for number, line in lines:
        check_text(f"{file}:{number}: the prompt", line)
    return [Line(line.rstrip("\r")) for _, line in lines]


def _lines(file: str) -> list[tuple[int, str]]:
    """Lines that hold something, by number. Raises UserError if there is none."""
    try:
        if file == STDIN:
            text = sys.stdin.read().removeprefix("\ufeff")
        else:
            text = Path(file).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        message = f"prompts file {file}: {error.strerror}; check the path"
        raise UserError(message) from None
    except UnicodeDecodeError:
        raise UserError(f"prompts file {file} is not UTF-8 text; save it so") from None
    lines = [(n, s) for n, s in enumerate(text.split("\n"), 1) if s.strip()]
    if not lines:
        raise UserError(f"prompts file {file} is empty; write one prompt a line")
    return lines


def _said_by_user(text: str) -> list[dict[str, Any]]:
    if not text.strip():
        raise UserError(_NO_WORD)
    return [{"role": "user", "content": text}]


def _json_line(where: str, line: str, chat: bool) -> Line:
    """The prompt or, for a chat, the messages of an object, and its other values."""
    found = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(line)
    values = dict(found) if isinstance(found, dict) else {}
    prompt = values.pop("prompt", None)
    messages = values.pop("messages", None) if chat else None
    _check_keys(where, values)
    if messages is not None:
        try:
            return Line(chat_messages(messages), values, where)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if isinstance(prompt, str):
        check_text(f"{where}: the prompt", prompt)
        if chat and not prompt.strip():
            raise UserError(f"{where}: {_NO_WORD}")
        return Line(prompt, values, where)
    expected = 'expected {"prompt": "some text"}'
    raise UserError(f"{where}: {expected}, got {line:.60}")


def _check_keys(where: str, values: Mapping[str, Any]) -> None:
    """Raises UserError for a key that is almost the name of a setting."""
    for key in values:
        near = difflib.get_close_matches(key, _SETTINGS, n=1, cutoff=0.8)
        if near and near[0] != key:
            raise UserError(f"{where}: unknown key {key!r}; did you mean {near[0]!r}?")
