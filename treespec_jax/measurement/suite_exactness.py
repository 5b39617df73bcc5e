"""Whether a benchmark's answers are those of plain decoding: lines of its journal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from treespec_jax.measurement import tables
from treespec_jax.measurement.exactness import TextPair, Verdict
from treespec_jax.measurement.grid import ANSWER, Combination, Task
from treespec_jax.measurement.journal import Journal
from treespec_jax.measurement.suite import Conversation
from treespec_jax.measurement.suite_run import Workload

# The journal's kind of lines.
EXACTNESS = "exactness"
_HEAD = (
    *("method", "T", "batch", "equal tokens", "texts that differ", "near ties"),
    *("largest gap", "near up to"),
)
# First differences that are told in words.
_SHOWN = 10


def is_done(combination: Combination, journal: Journal) -> bool:
    """Whether the journal has the verdict of a combination."""
    return journal.find(EXACTNESS, dataclasses.asdict(combination)) is not None


def pairs(
    combination: Combination, workload: Workload, rounds: int, journal: Journal
) -> list[TextPair]:
    """Every answer of a combination beside the one that plain decoding gave.

    A turn behind an answer that differs has another prompt, and is left out.

    Args:
      combination: that speculates.
      workload: what was asked.
      rounds: of the run.
      journal: with the answers of both.
    """
    found = []
    for number in range(rounds):
        for question in workload.suite.questions:
            task = Task(combination, number, (question,))
            plain = dataclasses.replace(task, combination=combination.baseline)
            ours, theirs = (
                journal.find(ANSWER, one.cell(question)) for one in (task, plain)
            )
            (params,) = workload.params(task)
            conversation = Conversation(question, workload.chat)
            turns = zip(
                ours["token_ids"], theirs["token_ids"], theirs["texts"], strict=False
            )
            for turn, (tree, other, text) in enumerate(turns, 1):
                name = f"{question.id}, turn {turn}, round {number}"
                prompt = workload.encode(conversation.prompt())
                found.append(TextPair(name, prompt, tree, other, params))
                if tree != other:
                    break
                conversation.answered(text)
    return found


def results(journal: Journal) -> list[dict[str, Any]]:
    """The verdicts of a journal, as plain values for JSON; none: it was not asked."""
    found = []
    for line in journal.all(EXACTNESS):
        one = Verdict.from_dict(line)
        values = {**dataclasses.asdict(Combination.of(line)), **one.as_dict()}
        found.append({**values, "texts_that_differ": len(one.differences)})
    return found


def lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: a row for each combination, and where texts first differ."""
    if not found:
        return []
    rows, words = [_HEAD], []
    for values in found:
        one, name = Verdict.from_dict(values), Combination.of(values)
        gaps = [each.gap for each in one.differences if each.gap is not None]
        rows.append(
            (
                name.label,
                f"{name.temperature:g}",
                str(name.batch),
                f"{one.equal} of {one.tokens}",
                f"{len(one.differences)} of {one.texts}",
                str(one.ties),
                f"{max(gaps):.1e}" if gaps else "-",
                f"{max(e.near for e in one.differences):.1e}" if gaps else "-",
            )
        )
        words += [f"{name}: {each}" for each in one.differences]
    more = len(words) - _SHOWN
    return [
        "### Exactness",
        "",
        tables.markdown(rows),
        "",
        "Against plain decoding: tokens before the first difference of each text, of "
        "all rounds. A near tie is a first difference that rounding explains.",
        *words[:_SHOWN],
        *([f"… and {more} more in results.json"] if more > 0 else ()),
        "",
    ]
