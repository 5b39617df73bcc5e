"""A conversation, line by line, on a terminal or from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from treespec_jax.errors import UserError

EXIT, RESET = "/exit", "/reset"
_HELP = (
    f"{RESET} begins anew, {EXIT} or the end of the input ends; Ctrl-C ends an answer"
)

Messages = list[dict[str, Any]]


def hold(
    answer: Callable[[Messages, bool], Any],
    opening: Messages,
    source: TextIO | None = None,
) -> tuple[list[Messages], list[Any]]:
    """Reads what the user says, has it answered, and remembers both.

    A line is a turn; `/reset` forgets what was said, `/exit` or the end of the input
    ends the conversation. What cannot be answered (no room left, for example) is told
    on stderr and forgotten. On a terminal an interrupt ends the answer: what it said so
    far is remembered.

    Args:
      answer: shows the answer to a conversation and returns its `Completion`; of an
        interrupted one too if its second argument is true.
      opening: messages in front of every conversation.
      source: where the lines come from; None: stdin.

    Returns:
      the conversations that were answered, and their completions.
    """
    source = source or sys.stdin
    talks = _talks(source)
    history = list(opening)
    asked, answers = [], []
    for line in _lines(source):
        # Some programs begin a file with a byte order mark.
        said = line.strip().removeprefix("\ufeff")
        if said == EXIT:
            break
        if said == RESET:
            history = list(opening)
        elif said:
            messages = [*history, {"role": "user", "content": said}]
            try:
                completion = answer(messages, talks)
            except UserError as error:
                print(f"error: {error}; {RESET} begins anew", file=sys.stderr)
                continue
            if completion is None:  # interrupted before its first word
                continue
            asked.append(messages)
            answers.append(completion)
            spoken = {"role": "assistant", "content": completion.text}
            history = [*messages, spoken]
    return asked, answers


def _talks(source: TextIO) -> bool:
    """Whether somebody sits at the other end."""
    return source is sys.stdin and source.isatty() and sys.stdout.isatty()


def _lines(source: TextIO) -> Iterator[str]:
    """The lines of `source`; asks for them where somebody sits there.

    An interrupt of a line forgets the line; a second one in a row ends the input.
    """
    if not _talks(source):
        yield from source
        return
    with contextlib.suppress(ImportError):  # not everywhere; it edits lines
        import readline  # noqa: F401
    print(_HELP, file=sys.stderr)
    again = False
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt) as end:
            print(file=sys.stderr)
            if again or isinstance(end, EOFError):
                return
            print(_HELP, file=sys.stderr)
            again = True
        else:
            again = False
            yield line
