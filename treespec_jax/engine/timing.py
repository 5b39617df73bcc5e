"""What dispatches that follow each other say of costs.

The times of two shapes are compared, less what is no step: the host's part of a
dispatch, a rehearsal, and what the first plain dispatch behind trees takes besides.
Dispatches of plain steps tell of those.
"""

from __future__ import annotations

import collections
import dataclasses

from treespec_jax.engine.costs import HOST, REHEARSAL, SWITCH, Costs, Load
from treespec_jax.trees.shapes import TreeShape

# Seconds of a plain step, beside which all that is no step is nothing.
LONG = 0.01


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a dispatch does.

    Attributes:
      shape: that it grows.
      max_steps: that it runs at most; None: the compiled number.
      rehearse: whether a tree is grown that nobody verifies, the last one of
        `expectation.observed_shapes`.
      timing: whether it runs only to be timed.
      risk: plain steps that it may lose against plain decoding.
    """

    shape: TreeShape
    max_steps: int | None
    rehearse: bool = False
    timing: bool = False
    risk: float = 0.0


@dataclasses.dataclass(frozen=True)
class Timed:
    """How long a dispatch took.

    Attributes:
      choice: that it was.
      load: of it.
      steps: that ran.
      seconds: of all of them, and of the rehearsal.
      switched: whether it is plain, and the one before it was not.
      rested: whether it is plain, and so was the one before it; and neither has a
        rehearsal.
    """

    choice: Choice
    load: Load
    steps: int
    seconds: float
    switched: bool
    rested: bool


class Timing:
    """Takes in the times of dispatches, in the order of their ends.

    Args:
      costs: that it finds out.
      plain: the shape of plain decoding.
      rehearsed: that of rehearsals.
      steps: S, of a dispatch.

    Attributes:
      long: whether plain steps take LONG; None: it is not known.
    """

    def __init__(
        self, costs: Costs, plain: TreeShape, rehearsed: TreeShape, steps: int
    ):
        self.long: bool | None = None
        self.costs, self._steps = costs, steps
        self._plain, self._rehearsed = plain, rehearsed
        self._ran: collections.Counter[tuple[TreeShape, bool]] = collections.Counter()
        self.reset()

    def reset(self) -> None:
        """What comes follows nothing."""
        # The last two dispatches, if they were timed; the choice of the last one in any
        # case.
        self._before: Timed | None = None
        self._last: Timed | None = None
        self._last_choice = Choice(self._plain, None)

    def take_in(
        self, choice: Choice, load: Load, steps: int, seconds: float | None
    ) -> bool:
        """A dispatch ended; whether it says what a tree costs.

        Args:
          choice: that it was.
          load: of it.
          steps: that ran.
          seconds: that it took; None if something else took some of that time.
        """
        shape = choice.shape
        program = shape, choice.rehearse
        self._ran[program] += 1
        before, last = self._before, self._last
        self._before, self._last = last, None
        earlier, self._last_choice = self._last_choice, choice
        plain = earlier.shape == shape == self._plain
        rested = plain and not earlier.rehearse and not choice.rehearse
        switched = shape == self._plain and not plain
        # The first run of a program does more than to run.
        if not steps or not seconds or self._ran[program] == 1:
            return False
        self._last = Timed(choice, load, steps, seconds, switched, rested)
        self.long = bool(seconds > LONG * self._plain_steps(self._last))
        return last is not None and self._compare(before, last, self._last)

    def _compare(self, before: Timed | None, last: Timed, this: Timed) -> bool:
        """Takes in what dispatches say that followed each other; whether of trees."""
        if last.load != this.load:
            return False
        if last.choice.shape == this.choice.shape == self._plain:
            self._compare_plain(before, last, this)
        elif last.choice.shape != this.choice.shape:
            tree, other = this, last
            if this.choice.shape == self._plain:
                tree, other = other, tree
            unknown = other.switched and self.costs.switch(other.load) is None
            if unknown and other.choice.timing and not self.long:
                # The dispatch behind it, another of plain steps, tells.
                return False
            # The dispatch in seconds, in the time of a plain step.
            time = tree.seconds * self._plain_steps(other) / other.seconds
            host = self.costs.host(this.load)
            step = max(0.0, time - host) / tree.steps
            cost = (step * self._steps + host) / (self._steps + host)
            self.costs.compare(tree.choice.shape, this.load, cost)
            return True
        return False

    def _compare_plain(self, before: Timed | None, last: Timed, this: Timed):
        """Takes in what plain dispatches say of all that is no step."""
        load, steps = this.load, self._plain_steps
        if last.switched:
            if not last.choice.rehearse and not self.long:
                time = last.seconds * steps(this) / this.seconds
                self.costs.compare(
                    SWITCH, load, max(0.0, time - steps(last, bare=True))
                )
        elif last.choice.rehearse:
            # The drafter's weights take the place of the target's in the processor's
            # caches, so that the next one takes longer, too.
            if self.long:
                time = last.seconds * steps(this) / this.seconds
                time -= steps(last, bare=True)
                self.costs.compare(REHEARSAL, load, time)
            elif before and before.rested and before.load == load:
                time = (last.seconds + this.seconds) * steps(before) / before.seconds
                time -= steps(last, bare=True) + steps(this)
                self.costs.compare(REHEARSAL, load, time)
        elif not this.choice.rehearse and not self.long:
            short, long = sorted((last, this), key=lambda one: one.steps)
            time = long.seconds - short.seconds
            if 2 * short.steps <= long.steps and time > 0:
                host = short.seconds * long.steps - long.seconds * short.steps
                self.costs.compare(HOST, load, host / time)

    def _plain_steps(self, timed: Timed, bare: bool = False) -> float:
        """The time of a dispatch in that of a plain step, by what is known of it.

        Args:
          timed: see `Timed`.
          bare: without what a rehearsal or a switch takes.
        """
        load, shape = timed.load, timed.choice.shape
        host, cost = self.costs.host(load), self.costs.relative(shape, load)
        step = (cost * (self._steps + host) - host) / self._steps
        time = timed.steps * step + host
        if timed.choice.rehearse and not bare:
            time += self.costs.rehearsal(self._rehearsed, load)
        if timed.switched and not bare:
            time += self.costs.switch(load) or 0.0
        return time
