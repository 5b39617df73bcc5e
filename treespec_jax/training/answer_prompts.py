"""What a target is asked for training text: questions, passages, or nothing at all."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from treespec_jax.checkpoints.chat import check_messages
from treespec_jax.checkpoints.tokenizers import Tokenizer
from treespec_jax.checks import check_int
from treespec_jax.config import SamplingParams
from treespec_jax.errors import UserError
from treespec_jax.training.answers import DIALOGUES

STORIES = "stories"
_PASSAGE = "{passage}"
# Stands for what the user says; no template changes it.
_SENTINEL = "\u241fwhat-the-user-says\u241f"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What stands in front of a text.

    Attributes:
      ids: token ids, at least one.
      source: name of where it comes from.
      sampling: how the text is sampled; None: as the other ones are. Its `max_tokens`
        and `seed` are not used.
    """

    ids: Sequence[int]
    source: str
    sampling: SamplingParams | None = None


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where prompts come from.

    Attributes:
      prompts: files; a .jsonl file has an object a line, with "prompt", "question",
        "turns" (the first one counts), "messages", or "instruction" and perhaps
        "input"; any other file has a prompt a line.
      limit: prompts of each file, the first so many; 0: all.
      passages: text files that are cut into passages.
      templates: prompts for passages in turn, with "{passage}" in each.
      passage_chars: length of a passage at most.
      dialogues: conversations of which the target writes both sides.
      stories: texts that go on from the token that begins one, or from openings.
      openings: file of an opening a line for the stories to take in turn; "": none.
    """

    prompts: tuple[str, ...] = ()
    limit: int = 0
    passages: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    passage_chars: int = 1000
    dialogues: int = 0
    stories: int = 0
    openings: str = ""

    def __post_init__(self):
        for name in ("limit", "dialogues", "stories"):
            check_int(name, getattr(self, name), 0)
        check_int("passage_chars", self.passage_chars, 1)
        for template in self.templates:
            if _PASSAGE not in template:
                raise UserError(
                    f"--template={template!r} has no {_PASSAGE}; write it where the "
                    "passage goes"
                )
        if bool(self.passages) != bool(self.templates):
            raise UserError("--passages and --template need each other; give both")
        if self.openings and not self.stories:
            raise UserError("--openings needs --stories=N; give both")
        if not (self.prompts or self.passages or self.dialogues or self.stories):
            raise UserError(
                "nothing to ask for; give --prompts_file, --passages, --dialogues or "
                "--stories"
            )


def gather(sources: Sources, tokenizer: Tokenizer) -> list[Prompt]:
    """All prompts, in a fixed order.

    A target with a chat template gets questions and passages as messages.

    Raises:
      UserError: an unreadable or malformed file; dialogues of a target that has no
        chat template, or messages for one; stories of one that has no token to begin
        with.
    """
    # First what needs no file.
    free = [*_dialogues(sources, tokenizer), *_stories(sources, tokenizer)]
    found = []
    for file in sources.prompts:
        for where, asked in _first(_questions(file), sources.limit):
            ids = _encode(asked, tokenizer, where)
            found.append(Prompt(ids, Path(file).name))
    templates = itertools.cycle(sources.templates)
    for file in sources.passages:
        for passage in _first(_cut(_read(file), sources.passage_chars), sources.limit):
            text = next(templates).replace(_PASSAGE, passage)
            found.append(Prompt(_encode(text, tokenizer, file), Path(file).name))
    return found + free


def before_user(tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation up to where the user's first message begins.

    Raises:
      UserError: no chat template, or one that writes the message otherwise.
    """
    template = tokenizer.chat_template()
    said = [{"role": "user", "content": _SENTINEL}]
    text = template.render(said, {"add_generation_prompt": False})
    header, found, _ = text.partition(_SENTINEL)
    if not found or not header:
        raise UserError(
            f"{tokenizer.source}: the chat template shows no beginning of the user's "
            "message; give --prompts_file instead of --dialogues"
        )
    return tokenizer.encode(header, add_bos=False)


def _dialogues(sources: Sources, tokenizer: Tokenizer) -> list[Prompt]:
    if not sources.dialogues:
        return []
    if not tokenizer.has_chat_template:
        raise UserError(
            f"--dialogues={sources.dialogues}: the target has no chat template; give "
            "--stories=N, or take a model that was trained for chat"
        )
    # Past the end of a turn comes the next one. Unlike top-p, min-p sorts nothing.
    sampling = SamplingParams(temperature=1.0, min_p=0.02, ignore_eos=True)
    one = Prompt(tuple(before_user(tokenizer)), DIALOGUES, sampling)
    return [one] * sources.dialogues


def _stories(sources: Sources, tokenizer: Tokenizer) -> list[Prompt]:
    if not sources.stories:
        return []
    # Greedy ones would be the same again and again.
    sampling = SamplingParams(temperature=1.0)
    if sources.openings:
        openings = [
            Prompt(tuple(tokenizer.encode(line)), STORIES, sampling)
            for line in _read(sources.openings).splitlines()
            if line.strip()
        ]
        return list(itertools.islice(itertools.cycle(openings), sources.stories))
    if tokenizer.bos_id is None:
        raise UserError(
            f"--stories={sources.stories}: the target has no token that begins a "
            "text; give --openings=FILE"
        )
    return [Prompt((tokenizer.bos_id,), STORIES, sampling)] * sources.stories


def _encode(
    asked: str | list[dict[str, Any]], tokenizer: Tokenizer, where: str
) -> tuple[int, ...]:
    if tokenizer.has_chat_template:
        if isinstance(asked, str):
            asked = [{"role": "user", "content": asked}]
        return tuple(tokenizer.encode_chat(asked))
    if not isinstance(asked, str):
        raise UserError(
            f"{where}: messages need a chat template, which the target lacks; give "
            'a "prompt"'
        )
    return tuple(tokenizer.encode(asked))


def _questions(file: str) -> Iterator[tuple[str, str | list[dict[str, Any]]]]:
    """Where each is in the file, and a text or a conversation."""
    lines = _read(file).split("\n")
    for number, line in enumerate(lines, 1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        yield where, _question(line, where) if file.endswith(".jsonl") else line


def _question(line: str, where: str) -> str | list[dict[str, Any]]:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if isinstance(values, dict):
        if "messages" in values:
            return _unanswered(values["messages"], where)
        turns = values.get("turns") or [None]
        texts = [values.get(name) for name in ("prompt", "question", "instruction")]
        for text in (*texts, turns[0] if isinstance(turns, list) else None):
            if isinstance(text, str) and text.strip():
                given = values.get("input") if text == texts[2] else None
                return f"{text}\n\n{given}" if given else text
    raise UserError(
        f'{where}: expected {{"prompt": "some text"}}, or "question", "messages", '
        f'"instruction", got {line:.60}'
    )


def _unanswered(messages: Any, where: str) -> list[dict[str, Any]]:
    """A conversation without the answer that may end it."""
    try:
        messages = check_messages(messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return check_messages(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _cut(text: str, chars: int) -> Iterator[str]:
    """Passages of at most so many characters, up to a sentence's end if they can."""
    rest = chars - 1
    sentences = rf"\S.{{0,{rest}}}(?<=[.!?])(?=\s|\Z)"
    words = rf"\S.{{0,{rest}}}(?=\s|\Z)"
    for found in re.finditer(f"{sentences}|{words}", text, re.DOTALL):
        yield found[0].strip()


def _first(items: Iterator, limit: int) -> Iterator:
    return itertools.islice(items, limit or None)


def _read(file: str) -> str:
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error.reason}") from None
    if not text.strip():
        raise UserError(f"{file} is empty; write some text into it")
    return text
