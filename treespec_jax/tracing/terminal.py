"""A step's tree as indented text, for a terminal."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import TextIO

from treespec_jax.tracing.trace import Step

# Escape sequences of the kinds of nodes.
COLOURS = {"accepted": "32", "rejected": "2", "bonus": "33;1", "root": "1", "dim": "2"}
MARKS = {"accepted": "✓", "rejected": "·", "bonus": "+", "root": "○"}


def wants_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal whose user did not turn colours off."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def visible(text: str) -> str:
    """A token with its spaces and line ends shown."""
    marks = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    return "".join(
        marks.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode())
        for c in text
    )


@dataclasses.dataclass(frozen=True)
class TreeText:
    """Writes trees out.

    Attributes:
      spell: how to show a token.
      sources: names of where nodes come from.
      colour: whether to write escape sequences.
    """

    spell: Callable[[int], str]
    sources: tuple[str, ...]
    colour: bool = False

    def step(self, number: int, step: Step) -> str:
        """Some lines: what step `number` (from 1) did, its root, then a node a line.

        A node shows its mark (✓ accepted, · rejected, + the target's own token), its
        token, the probabilities of drafter and target, and its source.
        """
        count, nodes = len(step.emitted), len(step.parents) - 1
        head = f"step {number}: {nodes} nodes, {count} token{'s' * (count != 1)}"
        said = "".join(visible(piece) for piece in step.pieces)
        lines = [f"{head}  {self._paint('dim', said)}", self._node(step, 0)]
        lines += self._below(step, 0, "")
        return "\n".join(lines)

    def _below(self, step: Step, node: int, indent: str) -> list[str]:
        last = step.path[-1] if step.path else 0
        rows: list[int | None] = [
            child
            for child, parent in enumerate(step.parents)
            if child > 0 and parent == node
        ]
        if step.has_bonus and node == last:
            rows.append(None)
        lines = []
        for number, child in enumerate(rows, 1):
            ends = number == len(rows)
            lead = indent + ("└─ " if ends else "├─ ")
            lines.append(self._paint("dim", lead) + self._node(step, child))
            if child is not None:
                lines += self._below(step, child, indent + ("   " if ends else "│  "))
        return lines

    def _node(self, step: Step, node: int | None) -> str:
        """One node; None is the target's own token."""
        if node == 0:
            return self._paint("root", f"{MARKS['root']} {self._spell(step.tokens[0])}")
        if node is None:
            share = _percent(step.emitted_log_prob[-1])
            text = f"{MARKS['bonus']} {self._spell(step.emitted[-1])}"
            return self._paint("bonus", f"{text}  target {share}")
        kind = "accepted" if node in step.path else "rejected"
        draft = _percent(step.draft_log_prob[node])
        target = _percent(step.target_log_prob[node])
        source = step.sources[node]
        name = self.sources[source] if source < len(self.sources) else ""
        text = f"{MARKS[kind]} {self._spell(step.tokens[node])}"
        return self._paint(kind, f"{text}  drafter {draft}  target {target}  {name}")

    def _spell(self, token: int) -> str:
        return visible(self.spell(token))

    def _paint(self, kind: str, text: str) -> str:
        return f"\033[{COLOURS[kind]}m{text}\033[0m" if self.colour else text


def _percent(log_prob: float) -> str:
    share = 100 * math.exp(log_prob)
    return f"{share:.0f}%" if share >= 0.5 else "<1%"
