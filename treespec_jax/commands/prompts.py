"""Prompts and conversations: built in, from a flag, or from a file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treespec_jax.checkpoints import chat
from treespec_jax.checks import check_text
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


def gather(
    chat: bool, prompt: str | None, file: str | None, system: str | None
) -> tuple[list[Prompt], list[dict[str, Any]] | None]:
    """What the flags --chat, --prompt, --prompts_file and --system ask for.

    With `chat` a line of the file is what the user says; in a .jsonl file an object
    holds a "prompt" of that kind, or all "messages".

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
    if chat and file is not None and Path(file).suffix == ".jsonl":
        messages = [_json_messages(file, *line) for line in _lines(file)]
    else:
        if file is None:
            check_text("--prompt", prompt)
        texts = [prompt] if file is None else read(file)
        if not chat:
            return texts, None
        messages = [_said_by_user(text) for text in texts]
    return [opening(system) + said for said in messages], None


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

    Raises:
      UserError: the file is unreadable, malformed or without a prompt.
    """
    lines = _lines(file)
    if Path(file).suffix == ".jsonl":
        return [_json_prompt(file, number, line) for number, line in lines]
    return [line.rstrip("\r") for _, line in lines]


def _lines(file: str) -> list[tuple[int, str]]:
    """Lines that hold something, by number. Raises UserError if there is none."""
    try:
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
        raise UserError("the prompt is empty; with --chat it needs at least one word")
    return [{"role": "user", "content": text}]


def _json_messages(file: str, number: int, line: str) -> list[dict[str, Any]]:
    try:
        messages = json.loads(line)["messages"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return _said_by_user(_json_prompt(file, number, line))
    try:
        return chat.check_messages(messages)
    except UserError as error:
        raise UserError(f"{file}:{number}: {error}") from None


def _json_prompt(file: str, number: int, line: str) -> str:
    prompt = None
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        prompt = json.loads(line)["prompt"]
    if isinstance(prompt, str):
        check_text(f"{file}:{number}: the prompt", prompt)
        return prompt
    expected = 'expected {"prompt": "some text"}'
    raise UserError(f"{file}:{number}: {expected}, got {line:.60}")
