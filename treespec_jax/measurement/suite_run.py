"""Runs a suite by every combination of a grid, and writes a journal line per cell."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from treespec_jax.config import SamplingParams
from treespec_jax.engine.stats import total
from treespec_jax.errors import UserError
from treespec_jax.measurement import machine, rounds
from treespec_jax.measurement.decoders import Answer, Decoder, Turn
from treespec_jax.measurement.grid import ANSWER, Combination, Task
from treespec_jax.measurement.journal import Journal
from treespec_jax.measurement.suite import Conversation, Suite


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is asked, and how.

    Attributes:
      suite: the questions.
      sampling: of the answers; each question and round has a seed of its own, and each
        combination a temperature.
      latency_tokens: per turn of a streamed answer.
      chat: ask by the chat template.
      encode: token ids of a prompt.
      max_len: tokens of a text at most, answer included.
    """

    suite: Suite
    sampling: SamplingParams
    latency_tokens: int
    chat: bool
    encode: Callable[[Any], list[int]]
    max_len: int

    def params(self, task: Task) -> list[SamplingParams]:
        """Settings of a task's answers, the same for all combinations but for the
        temperature."""
        ids = [question.id for question in self.suite.questions]
        first = self.sampling.seed + task.round * len(ids)
        return [
            dataclasses.replace(
                self.sampling,
                temperature=task.combination.temperature,
                seed=(first + ids.index(question.id)) % 2**32,
            )
            for question in task.questions
        ]


def is_done(task: Task, journal: Journal) -> bool:
    """Whether the journal has all cells of a task."""
    cells = [task.cell(question) for question in task.questions]
    return all(journal.find(task.kind, cell) is not None for cell in cells)


def run(
    tasks: Iterable[Task],
    decoders: Mapping[Combination, Decoder],
    workload: Workload,
    journal: Journal,
    progress: Callable[[Task], None],
) -> None:
    """Runs the tasks that the journal lacks.

    A decoder begins every pass over the questions without what it learnt before, or it
    would remember the answers.

    Args:
      tasks: in order.
      decoders: by `Combination.program`, warm.
      workload: what is asked.
      journal: begun.
      progress: called when a task is done or found done.
    """
    process = f"{time.time():.3f}"
    under_way: dict[Combination, tuple[Combination, int, bool]] = {}
    for task in tasks:
        if not is_done(task, journal):
            program = task.combination.program
            decoder = decoders[program]
            this_pass = task.combination, task.round, task.stream
            if under_way.get(program) != this_pass:
                decoder.reset()
                under_way[program] = this_pass
            lines = (stream if task.stream else answer)(
                decoder, task, workload, journal
            )
            values = ({**line, "process": process} for line in lines)
            cells = [task.cell(question) for question in task.questions]
            journal.add(task.kind, zip(cells, values, strict=True))
        progress(task)


@dataclasses.dataclass
class _Dialogue:
    """A question on its way.

    Attributes:
      conversation: that is held.
      params: of its answers.
      turns: that were asked.
      answers: to them.
    """

    conversation: Conversation
    params: SamplingParams
    turns: list[Turn] = dataclasses.field(default_factory=list)
    answers: list[Answer] = dataclasses.field(default_factory=list)


def answer(
    decoder: Decoder, task: Task, workload: Workload, journal: Journal
) -> list[dict[str, Any]]:
    """Has a task's questions answered; a journal line's values for each.

    A turn that has no room in `max_len`, because answers were longer as text than as
    tokens, is left out with those after it.
    """
    dialogues = _dialogues(task, workload)
    wall_seconds = 0.0
    while under_way := _under_way(dialogues, workload):
        given = decoder.answer(
            [dialogue.turns[-1] for dialogue in under_way],
            [dialogue.params for dialogue in under_way],
        )
        for dialogue, got in zip(under_way, given, strict=True):
            if not got.token_ids:
                raise UserError(
                    f"question {dialogue.conversation.question.id} got no token: there "
                    "are too few pages for its prompt; raise --num_pages"
                )
            dialogue.answers.append(got)
            dialogue.conversation.answered(got.text)
        wall_seconds += max(_seconds(got) for got in given)
    return [
        {
            **_values(dialogue),
            # Ours come in bursts; a pass of its own times their stream.
            "arrivals": _arrivals(dialogue) if task.combination.peer else None,
            "wall_seconds": wall_seconds / len(dialogues),
            "memory_bytes": decoder.memory_bytes,
            "peak_rss_bytes": machine.peak_rss_bytes(),
            "peak_device_bytes": machine.peak_device_bytes(),
        }
        for dialogue in dialogues
    ]


def stream(
    decoder: Decoder, task: Task, workload: Workload, journal: Journal
) -> list[dict[str, Any]]:
    """Times the streams of turns that the journal has answers to; values of lines."""
    dialogues = _dialogues(task, workload, workload.latency_tokens)
    texts = [
        journal.find(ANSWER, task.cell(question))["texts"]
        for question in task.questions
    ]
    for number in range(max(map(len, texts))):
        pairs = zip(dialogues, texts, strict=True)
        answered = [(one, given) for one, given in pairs if number < len(given)]
        under_way = _under_way([dialogue for dialogue, _ in answered], workload)
        got = decoder.answer(
            [dialogue.turns[-1] for dialogue in under_way],
            [dialogue.params for dialogue in under_way],
            streaming=True,
        )
        for (dialogue, given), one in zip(answered, got, strict=True):
            dialogue.answers.append(one)
            dialogue.conversation.answered(given[number])
    return [
        {
            "category": dialogue.conversation.question.category,
            "arrivals": _arrivals(dialogue),
        }
        for dialogue in dialogues
    ]


def _dialogues(
    task: Task, workload: Workload, tokens: int | None = None
) -> list[_Dialogue]:
    """Of a task's questions, with answers of so many tokens at most."""
    params = workload.params(task)
    if tokens is not None:
        params = [
            dataclasses.replace(one, max_tokens=min(tokens, one.max_tokens))
            for one in params
        ]
    return [
        _Dialogue(Conversation(question, workload.chat), one)
        for question, one in zip(task.questions, params, strict=True)
    ]


def _arrivals(dialogue: _Dialogue) -> list[list[tuple[float, int]]]:
    """Of each turn."""
    return [got.arrivals for got in dialogue.answers]


def _under_way(dialogues: Sequence[_Dialogue], workload: Workload) -> list[_Dialogue]:
    """Those that have another turn, which is put on their lists."""
    found = []
    for dialogue in dialogues:
        if dialogue.conversation.finished:
            continue
        prompt = dialogue.conversation.prompt()
        ids = workload.encode(prompt)
        if len(ids) < workload.max_len:
            dialogue.turns.append(Turn(prompt, ids))
            found.append(dialogue)
        else:
            dialogue.conversation.end()
    return found


def _values(dialogue: _Dialogue) -> dict[str, Any]:
    """Sums over the turns of a question."""
    answers = dialogue.answers
    prefill = [a.stats.prefill_seconds for a in answers]
    stats = total([a.stats for a in answers], 0.0, 0.0)
    return {
        "category": dialogue.conversation.question.category,
        "turns": len(answers),
        "prompt_tokens": sum(len(turn.ids) for turn in dialogue.turns),
        "tokens": stats.tokens,
        "seconds": sum(map(_seconds, answers)),
        "prefill_seconds": sum(prefill) if all(prefill) else None,
        "stats": dataclasses.asdict(stats),
        "token_ids": [a.token_ids for a in answers],
        "texts": [a.text for a in answers],
        "reliability": rounds.reliability([r for a in answers for r in a.records]),
    }


def _seconds(got: Answer) -> float:
    """From the submission of a turn to its last token."""
    return got.arrivals[-1][0]
