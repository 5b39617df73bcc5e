"""Prompts: built in, from a flag, or from a file."""

from __future__ import annotations

import json
from pathlib import Path

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


def choose(prompt: str | None, file: str | None) -> list[str]:
    """Prompts of --prompt or --prompts_file.

    Raises:
      UserError: both or neither given, or an unreadable file.
    """
    if (prompt is None) == (file is None):
        given = "neither" if prompt is None else "both"
        raise UserError(f"give --prompt or --prompts_file, got {given}")
    if file is not None:
        return read(file)
    return [prompt]


def read(file: str) -> list[str]:
    """One prompt a line; in a .jsonl file, an object with "prompt" a line.

    Raises:
      UserError: the file is unreadable, malformed or without a prompt.
    """
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"prompts file {file}: {error.strerror}; check the path"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"prompts file {file} is not UTF-8 text; save it so") from None
    lines = [(n, s) for n, s in enumerate(text.split("\n"), 1) if s.strip()]
    if not lines:
        raise UserError(f"prompts file {file} is empty; write one prompt a line")
    if Path(file).suffix == ".jsonl":
        return [_json_prompt(file, number, line) for number, line in lines]
    return [line.rstrip("\r") for _, line in lines]


def _json_prompt(file: str, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
        if not isinstance(prompt, str):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f'{file}:{number}: expected {{"prompt": "some text"}}, got {line:.60}'
        ) from None
    return prompt
