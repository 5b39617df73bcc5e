"""Which shape the next dispatch grows, where a speculation may take several.

The first shape is the one that was asked for, the last is plain decoding. Both are
timed as they run. A tree that brings few tokens is compared with plain decoding; the
quicker one stays, and the other gets a short dispatch now and then, soon after a new
text begins and ever more rarely later. With the exact rule the text does not depend on
any of this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from treespec_jax.trees.shapes import TreeShape

# Dispatches of the tree before plain decoding is tried.
FIRST_LOOK = 2
# Tokens after which plain decoding may be compiled for a trial, which takes seconds.
WORTH_COMPILING = 512
# Tokens per step from which on a tree is taken to be the quicker without a trial.
ENOUGH = 3.0
# Dispatches between trials of the shape not in use: at first, and at most.
SOON, RARELY = 4, 64
# Steps of a trial.
TRIAL_STEPS = 2
# Steps that a running mean remembers, a short trial moves it little; and how many of
# them still count when a new text begins.
MEMORY, CARRIED = 32, 4


@dataclasses.dataclass
class _Speed:
    """Of one shape.

    Attributes:
      runs: dispatches that were read.
      tokens: that they emitted.
      remembered: steps that the means stand for, MEMORY at most.
      tokens_per_second: running mean; None before a dispatch was timed.
      tokens_per_step: likewise; None before one ran a step.
    """

    runs: int = 0
    tokens: int = 0
    remembered: int = 0
    tokens_per_second: float | None = None
    tokens_per_step: float | None = None

    def add(self, steps: int, tokens: int, slots: int, seconds: float | None) -> None:
        self.runs += 1
        self.tokens += tokens
        if not steps:
            return
        self.remembered = min(self.remembered + steps, MEMORY)
        weight = min(1.0, steps / self.remembered)
        per_step = tokens / (steps * max(slots, 1))
        self.tokens_per_step = _mean(self.tokens_per_step, per_step, weight)
        if seconds:
            speed = tokens / seconds
            self.tokens_per_second = _mean(self.tokens_per_second, speed, weight)


def _mean(old: float | None, new: float, weight: float) -> float:
    return new if old is None else old + weight * (new - old)


class Chooser:
    """Chooses before every dispatch.

    Args:
      shapes: at least one; with one it has no choice.

    Attributes:
      compiled: whether all shapes are, so that a trial costs nothing else.
    """

    def __init__(self, shapes: Sequence[TreeShape]):
        self.compiled = False
        self._tree, self._plain = shapes[0], shapes[-1]
        self._speeds = {shape: _Speed() for shape in shapes}
        self._best = self._tree
        self._wait, self._period = 0, SOON

    def choose(self, max_steps: int | None) -> tuple[TreeShape, int | None]:
        """The shape of the next dispatch, and steps to run at most.

        Args:
          max_steps: that the caller allows; None: the compiled number.
        """
        if self._plain == self._tree or self._unproven():
            return self._tree, max_steps
        if self._wait > 0:
            return self._best, max_steps
        other = self._plain if self._best == self._tree else self._tree
        steps = TRIAL_STEPS if max_steps is None else min(TRIAL_STEPS, max_steps)
        return other, steps

    def started(self, shape: TreeShape) -> None:
        """A dispatch of that shape was started; a choice need not lead to one."""
        if self._unproven():
            return
        if shape == self._best:
            self._wait = max(0, self._wait - 1)
        else:
            self._wait = self._period
            self._period = min(2 * self._period, RARELY)

    def begin_text(self) -> None:
        """A new text began: what was learnt may not hold for it."""
        self._wait = min(self._wait, 1)
        self._period = SOON
        for speed in self._speeds.values():
            speed.remembered = min(speed.remembered, CARRIED)

    def record(
        self,
        shape: TreeShape,
        steps: int,
        tokens: int,
        slots: int,
        seconds: float | None,
    ) -> None:
        """Takes in how a dispatch went.

        Args:
          shape: that it grew.
          steps: that ran.
          tokens: emitted, by all slots.
          slots: that took part.
          seconds: from its start, or from the end of the last one; None if something
            else took some of that time.
        """
        self._speeds[shape].add(steps, tokens, slots, seconds)
        known = {s: v.tokens_per_second for s, v in self._speeds.items()}
        if None in known.values():
            return
        best = max(known, key=known.get)
        if best != self._best:
            self._best, self._wait, self._period = best, SOON, SOON

    def _unproven(self) -> bool:
        """Whether nothing speaks for a trial of plain decoding yet."""
        speed = self._speeds[self._tree]
        if self._speeds[self._plain].runs:
            return False
        early = speed.runs <= FIRST_LOOK
        early |= not self.compiled and speed.tokens < WORTH_COMPILING
        return early or (speed.tokens_per_step or 0.0) >= ENOUGH
