"""A conversation, line by line, on a terminal or from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from treespec_jax.errors import UserError

EXIT, RESET = "/exit", "/reset"

Messages = list[dict[str, Any]]


def hold(
    answer: Callable[[Messages], Any], opening: Messages, source: TextIO | None = None
) -> tuple[list[Messages], list[Any]]:
    """Reads what the user says, has it answered, and remembers both.

    A line is a turn; `/reset` forgets what was said, `/exit` or the end of the input
    ends the conversation. What cannot be answered (no room left, for example) is told
    on stderr and forgotten.

    Args:
      answer: shows the answer to a conversation and returns its `Completion`.
      opening: messages in front of every conversation.
      source: where the lines come from; None: stdin.

    Returns:
      the conversations that were answered, and their completions.
    """
    source = source or sys.stdin
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
                completion = answer(messages)
            except UserError as error:
                print(f"error: {error}; {RESET} begins anew", file=sys.stderr)
                continue
            asked.append(messages)
            answers.append(completion)
            spoken = {"role": "assistant", "content": completion.text}
            history = [*messages, spoken]
    return asked, answers


def _lines(source: TextIO) -> Iterator[str]:
    """The lines of `source`; asks for them where somebody sits there."""
    if source is not sys.stdin or not (source.isatty() and sys.stdout.isatty()):
        yield from source
        return
    with contextlib.suppress(ImportError):  # not everywhere; it edits lines
        import readline  # noqa: F401
    print(f"{RESET} begins anew, {EXIT} or the end of the input ends", file=sys.stderr)
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ")
    print(file=sys.stderr)
