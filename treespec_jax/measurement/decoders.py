"""What answers the questions of a benchmark: the protocol; free of jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from treespec_jax.config import SamplingParams
from treespec_jax.engine.stats import Stats
from treespec_jax.trees.records import TreeRecord


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a decoder answers.

    Attributes:
      prompt: a text to continue, or the messages of a conversation.
      ids: its tokens.
    """

    prompt: str | list[dict[str, Any]]
    ids: list[int]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a decoder answered.

    Attributes:
      text: of the tokens.
      token_ids: that were emitted.
      arrivals: seconds since the turn was submitted and tokens of every time that
        tokens reached the host.
      stats: counts; those that a program does not tell are 0.
      records: of drafted trees, where they are recorded.
    """

    text: str
    token_ids: list[int]
    arrivals: list[tuple[float, int]]
    stats: Stats
    records: list[TreeRecord] = dataclasses.field(default_factory=list)


class Decoder(Protocol):
    """Answers turns. Example:

      class Echo:
          memory_bytes = 0

          def warm_up(self, params):
              pass

          def reset(self):
              pass

          def answer(self, turns, params, streaming=False):
              return [Answer("", t.ids, [(1.0, len(t.ids))], Stats()) for t in turns]

    Attributes:
      memory_bytes: of weights, caches and other state; None: unknown.
    """

    memory_bytes: int | None

    def warm_up(self, params: SamplingParams) -> None:
        """Compiles and touches all that answers with such settings will run."""

    def reset(self) -> None:
        """Forgets what was learnt from earlier texts."""

    def answer(
        self,
        turns: Sequence[Turn],
        params: Sequence[SamplingParams],
        streaming: bool = False,
    ) -> list[Answer]:
        """Answers turns together.

        Args:
          turns: at most as many as the decoder's batch.
          params: of each.
          streaming: let tokens arrive as soon as they are known, even if all of them
            then take longer.
        """
