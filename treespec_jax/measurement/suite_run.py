"""Runs a suite by every combination of a grid, and writes a journal line per cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from treespec_jax.config import SamplingParams
from treespec_jax.engine.stats import total
from treespec_jax.errors import UserError
from treespec_jax.measurement import machine, rounds
from treespec_jax.measurement.decoders import Answer, Decoder, Turn
from treespec_jax.measurement.grid import Combination, Task
from treespec_jax.measurement.journal import Journal
from treespec_jax.measurement.suite import Conversation, Suite

# The journal's kind of lines.
ANSWER = "answer"


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is asked, and how.

    Attributes:
      suite: the questions.
      sampling: of the answers; each question and round has a seed of its own, and each
        combination a temperature.
      latency_tokens: per turn of the streamed answer; 0: answers are not streamed.
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
    return all(journal.find(ANSWER, cell) is not None for cell in cells)


def run(
    tasks: Iterable[Task],
    decoders: Mapping[Combination, Decoder],
    workload: Workload,
    journal: Journal,
    progress: Callable[[Task], None],
) -> None:
    """Runs the tasks that the journal lacks.

    Args:
      tasks: in order.
      decoders: by `Combination.program`, warm.
      workload: what is asked.
      journal: begun.
      progress: called when a task is done or found done.
    """
    for task in tasks:
        if not is_done(task, journal):
            decoder = decoders[task.combination.program]
            lines = answer(decoder, task, workload)
            cells = [task.cell(question) for question in task.questions]
            journal.add(ANSWER, zip(cells, lines, strict=True))
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


def answer(decoder: Decoder, task: Task, workload: Workload) -> list[dict[str, Any]]:
    """Has a task's questions answered; a journal line's values for each.

    In the first round they are answered once more as a stream, unless the decoder
    streams anyway. A turn that has no room in `max_len`, because answers were longer
    as text than as tokens, is left out with those after it.
    """
    dialogues = [
        _Dialogue(Conversation(question, workload.chat), params)
        for question, params in zip(task.questions, workload.params(task), strict=True)
    ]
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
    streamed = None
    if decoder.streams:
        streamed = [[a.arrivals for a in dialogue.answers] for dialogue in dialogues]
    elif task.round == 0 and workload.latency_tokens:
        streamed = _streamed(decoder, dialogues, workload.latency_tokens)
    return [
        {
            "category": dialogue.conversation.question.category,
            **_values(dialogue),
            "wall_seconds": wall_seconds / len(dialogues),
            "arrivals": streamed and streamed[number],
            "memory_bytes": decoder.memory_bytes,
            "peak_rss_bytes": machine.peak_rss_bytes(),
            "peak_device_bytes": machine.peak_device_bytes(),
        }
        for number, dialogue in enumerate(dialogues)
    ]


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


def _streamed(
    decoder: Decoder, dialogues: Sequence[_Dialogue], tokens: int
) -> list[list[list[tuple[float, int]]]]:
    """Arrivals per turn of each dialogue, of the same turns asked once more."""
    found: list[list[list[tuple[float, int]]]] = [[] for _ in dialogues]
    for number in range(max(len(dialogue.turns) for dialogue in dialogues)):
        some = [
            i for i, dialogue in enumerate(dialogues) if number < len(dialogue.turns)
        ]
        params = [
            dataclasses.replace(
                dialogues[i].params,
                max_tokens=min(tokens, dialogues[i].params.max_tokens),
            )
            for i in some
        ]
        turns = [dialogues[i].turns[number] for i in some]
        for i, got in zip(some, decoder.answer(turns, params, True), strict=True):
            found[i].append(got.arrivals)
    return found


def _values(dialogue: _Dialogue) -> dict[str, Any]:
    """Sums over the turns of a question."""
    answers = dialogue.answers
    prefill = [a.stats.prefill_seconds for a in answers]
    stats = total([a.stats for a in answers], 0.0, 0.0)
    return {
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
