"""The grid of a benchmark: what is combined, and in which order the cells run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from treespec_jax.measurement.suite import Question
from treespec_jax.measurement.timing import rotated

# Methods of other programs stand in the place of a shape.
PEER = "transformers"
# The journal's kinds of lines.
ANSWER, STREAM = "answer", "stream"


@dataclasses.dataclass(frozen=True)
class Combination:
    """One way of decoding.

    For example `Combination("ngram", "chain:3", "exact", 0.0, 1)`.

    Attributes:
      method: of drafting, "none" for plain decoding; or PEER.
      shape: of the trees, "none" for plain decoding; of PEER how it generates.
      rule: of acceptance; "-" for PEER.
      temperature: of the requests.
      batch: texts decoded together.
      weights: type of the matrices of target and drafter, as it was named; "": the
        usual one of the checkpoint. PEER runs in that type as a whole.
    """

    method: str
    shape: str
    rule: str
    temperature: float
    batch: int
    weights: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Combination:
        """That of a line of the journal or of the results."""
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: values[name] for name in names})

    @property
    def plain(self) -> bool:
        """Whether this is plain decoding, which all others are compared with."""
        return self.method == "none"

    @property
    def peer(self) -> bool:
        """Whether another program decodes."""
        return self.method == PEER

    @property
    def program(self) -> Combination:
        """The same for combinations that run the same compiled programs."""
        return dataclasses.replace(self, temperature=0.0)

    @property
    def baseline(self) -> Combination:
        """Plain decoding at this temperature and batch size, of the same weights."""
        return dataclasses.replace(self, method="none", shape="none", rule="exact")

    @property
    def label(self) -> str:
        """For tables whose caption names temperature and batch size."""
        words = [self.weights, self.method]
        if not self.plain:
            words.append(self.shape)
            words.append("" if self.rule in ("exact", "-") else self.rule)
        return " ".join(filter(None, words))

    def __str__(self):
        return f"{self.label}, T={self.temperature:g}, batch {self.batch}"


@dataclasses.dataclass(frozen=True)
class Task:
    """Cells that run together: one combination on a batch of questions in one round.

    Attributes:
      combination: how they are decoded.
      round: number, from 0.
      questions: at most `combination.batch`.
      stream: whether arrivals of tokens are timed, of turns that were answered before.
    """

    combination: Combination
    round: int
    questions: tuple[Question, ...]
    stream: bool = False

    @property
    def kind(self) -> str:
        """Of its lines in the journal."""
        return STREAM if self.stream else ANSWER

    def cell(self, question: Question) -> dict[str, Any]:
        """What names a question's line in the journal."""
        names = {"round": self.round, "question": question.id}
        return {**dataclasses.asdict(self.combination), **names}


def schedule(
    combinations: Sequence[Combination],
    questions: Sequence[Question],
    rounds: int,
    streams: bool = False,
) -> Iterator[Task]:
    """All cells, as tasks in the order in which they run.

    Combinations of one temperature and batch size answer the same questions one after
    the other; another one comes first from batch to batch and from round to round.

    Args:
      combinations: to run.
      questions: to be answered.
      rounds: passes over them.
      streams: let a pass behind the first round time streams; peers tell them anyway.
    """
    groups: dict[tuple[float, int], list[Combination]] = {}
    for combination in combinations:
        key = combination.temperature, combination.batch
        groups.setdefault(key, []).append(combination)
    for number in range(rounds):
        for (_, batch), members in groups.items():
            passes = {False: members}
            if streams and number == 0:
                passes[True] = [member for member in members if not member.peer]
            for stream, some in passes.items():
                for turn, start in enumerate(range(0, len(questions), batch)):
                    asked = tuple(questions[start : start + batch])
                    for combination in rotated(some, number + turn):
                        yield Task(combination, number, asked, stream)
