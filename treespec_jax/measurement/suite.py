"""Questions that a benchmark asks, and how they are put; free of jax."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from typing import Any

from treespec_jax.errors import UserError

# Between what was said so far and the next turn, for models without a chat template.
_PARAGRAPH = "\n\n"


@dataclasses.dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
      id: different from those of all other questions of the suite.
      category: the task that it belongs to.
      turns: what the user says, one after the other; the model answers each.
    """

    id: str
    category: str
    turns: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Suite:
    """Questions, of one category after the other or mixed.

    For example `Suite("two", (Question("1", "qa", ("Why?",)), …))`.

    Attributes:
      name: as the user named it.
      questions: in the order in which they are asked.
      as_text: chat models, too, continue the texts as they stand.

    Raises:
      UserError: no question, or two of one id.
    """

    name: str
    questions: tuple[Question, ...]
    as_text: bool = False

    def __post_init__(self):
        if not self.questions:
            raise UserError(f"suite {self.name} holds no question; give it one")
        (name, count), *_ = Counter(q.id for q in self.questions).most_common(1)
        if count > 1:
            raise UserError(
                f"suite {self.name} has {count} questions with the id {name!r}; give "
                "each another one"
            )

    @property
    def categories(self) -> list[str]:
        """Names, in order of their first questions."""
        return list(dict.fromkeys(q.category for q in self.questions))

    def first(self, count: int) -> Suite:
        """The suite of the first `count` questions of each category; 0: of all."""
        if not count:
            return self
        seen: Counter[str] = Counter()
        chosen = []
        for question in self.questions:
            seen[question.category] += 1
            if seen[question.category] <= count:
                chosen.append(question)
        return dataclasses.replace(self, questions=tuple(chosen))

    @property
    def digest(self) -> str:
        """SHA-256 of all questions, in hexadecimal digits."""
        values = [dataclasses.astuple(question) for question in self.questions]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()


class Conversation:
    """A question under way.

    Args:
      question: to be answered turn by turn.
      chat: write it as messages for a chat template. Else it is a text to continue:
        what was said so far, an empty line, and the next turn.
    """

    def __init__(self, question: Question, chat: bool):
        self.question = question
        self._chat = chat
        self._answers: list[str] = []
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether all turns are answered, or it was ended."""
        return self._ended or len(self._answers) == len(self.question.turns)

    def prompt(self) -> str | list[dict[str, Any]]:
        """What the model sees next: all that was said, and the next turn."""
        asked = self.question.turns[: len(self._answers) + 1]
        if self._chat:
            messages = []
            for turn, said in enumerate(asked):
                messages.append({"role": "user", "content": said})
                if turn < len(self._answers):
                    answer = self._answers[turn]
                    messages.append({"role": "assistant", "content": answer})
            return messages
        answered = zip(asked[:-1], self._answers, strict=True)
        return _PARAGRAPH.join([*(a + b for a, b in answered), asked[-1]])

    def answered(self, text: str) -> None:
        """Notes the answer to the last turn."""
        self._answers.append(text)

    def end(self) -> None:
        """Leaves out the turns that are not answered yet."""
        self._ended = True
