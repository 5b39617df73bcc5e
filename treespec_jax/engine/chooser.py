"""Which shape the next dispatch grows, where a speculation may take several.

Plain decoding is one of them. Before every dispatch the shape with the most expected
tokens (`engine.expectation`) for its cost (`engine.costs`) wins, for the texts that
decode now:

* What shapes bring belongs to texts. A step tells of its own tree and of all smaller
  ones. Plain steps tell nothing; beside them trees are rehearsed now and then
  (`engine.rehearsal`), ever more rarely while no tree would pay.
* What shapes cost belongs to the machine. A dispatch that follows one of another shape
  compares the two. Shapes not in use get a short dispatch for it, soon at first and
  ever more rarely later, whatever texts begin meanwhile; those that could not win
  anyway get none.

Programs are compiled one by one: plain decoding first, because it takes the least time
to compile, the others while it runs (`Chooser.wanted`). With the exact rule the text
does not depend on any of this.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from treespec_jax.engine.costs import Costs, Load
from treespec_jax.engine.expectation import GAIN, GAIN_OF_MODEL, Expectation
from treespec_jax.engine.request import Request
from treespec_jax.trees.shapes import TreeShape

# The program that grows trees which nobody verifies.
REHEARSAL = "rehearsal"
Program = TreeShape | str

# Plain steps between rehearsals, of drafters without and with a model; and how many
# times rarer they get while no tree pays.
EVERY, EVERY_WITH_MODEL, RARER = 8, 32, 8
# Tokens after which the first tree is compiled, and after which shapes are that may be
# a little quicker still.
WORTH_TREES, WORTH_COMPILING = 16, 512
# Dispatches between those that are for timing: until one is compared, after the first
# comparison, and at most.
RETRY, SOON, RARELY = 3, 8, 256
# Steps of a dispatch that is for timing, or that shows what a new text is like. Of the
# latter kind there are as many as rehearsals in so many plain steps.
TRIAL_STEPS, FRESH = 2, 80
# A shape may be this much better than it looks: before it was ever compared, and after.
DOUBT, LESS_DOUBT = 1.3, 1.1
# Acceptance rates of first children for which a shape may be of use.
RATES = tuple(np.linspace(0.1, 1.0, 10))


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a dispatch does.

    Attributes:
      shape: that it grows.
      max_steps: that it runs at most; None: the compiled number.
      rehearse: whether a tree of the first shape is grown that nobody verifies.
      timing: whether it runs only to be timed.
    """

    shape: TreeShape
    max_steps: int | None
    rehearse: bool = False
    timing: bool = False


@dataclasses.dataclass
class _Trials:
    """When shapes are timed that are not in use, under one load.

    Attributes:
      since: dispatches since the latest one for timing.
      period: dispatches between those for timing, once all shapes have been tried.
      tried: shapes, those of longest ago first.
      compared: whether the latest one was.
    """

    since: int = SOON
    period: int = SOON
    tried: list[TreeShape] = dataclasses.field(default_factory=list)
    compared: bool = False

    def due(self, shape: TreeShape) -> bool:
        """Whether it is time for one of that shape."""
        if not self.compared:
            return self.since >= RETRY
        return self.since >= (self.period if shape in self.tried else SOON)

    def begin(self, shape: TreeShape) -> None:
        """A dispatch of that shape starts, only to be timed."""
        if shape in self.tried:
            self.tried.remove(shape)
            self.period = min(2 * self.period, RARELY)
        self.tried.append(shape)
        self.since, self.compared = 0, False


class Chooser:
    """Chooses before every dispatch.

    Args:
      shapes: at least one; with one it has no choice. Plain decoding, if it is among
        them, is the last.
      costs: of steps.
      with_model: the drafter runs passes of a model.
    """

    def __init__(self, shapes: Sequence[TreeShape], costs: Costs, with_model: bool):
        self.costs = costs
        self._shapes = tuple(shapes)
        self._plain = None if shapes[-1].depth else shapes[-1]
        self._every = EVERY_WITH_MODEL if with_model else EVERY
        self._expectation = Expectation(shapes, GAIN_OF_MODEL if with_model else GAIN)
        self._ran: collections.Counter[TreeShape] = collections.Counter()
        self._trials: dict[Load, _Trials] = collections.defaultdict(_Trials)
        self.reset()

    def reset(self) -> None:
        """Forgets all texts; what a step costs stays."""
        self._expectation.reset()
        self._emitted = 0
        self._period = self._unrehearsed = self._every
        self._fresh = max(2, FRESH // self._every)
        # Shape, load and seconds per step of the last dispatch, if it was timed.
        self._last: tuple[TreeShape, Load, float] | None = None

    def expected(self, shape: TreeShape, requests: Collection[Request]) -> float:
        """Tokens that a step of that shape should emit per text."""
        number = self._shapes.index(shape)
        tokens = [
            self._expectation.tokens(request)[number]
            for request in requests
            if request.params.speculate
        ]
        rest = len(requests) - len(tokens)
        return (sum(tokens) + rest) / len(requests) if requests else 1.0

    def choose(
        self,
        max_steps: int | None,
        requests: Collection[Request],
        ready: Collection[Program],
    ) -> Choice:
        """What the next dispatch does.

        Args:
          max_steps: that the caller allows; None: the compiled number.
          requests: that decode.
          ready: programs that are compiled.
        """
        usable = [shape for shape in self._shapes if shape in ready]
        if not usable:
            usable = [self._plain or self._shapes[0]]
        speculating = any(request.params.speculate for request in requests)
        if self._plain and not speculating:
            return Choice(self._plain, max_steps)
        if len(self._shapes) == 1:
            return Choice(self._shapes[0], max_steps)
        load = self.load(requests)
        values = self._values(usable, requests, load)
        best = max(values, key=values.get)
        shape = self._trial(best, values, requests, load)
        timing = self._trials[load].due(shape) and shape != best
        shape = shape if timing else best
        short = TRIAL_STEPS if max_steps is None else min(TRIAL_STEPS, max_steps)
        steps = short if timing or self._fresh else max_steps
        due = self._fresh > 0 or self._unrehearsed >= self._period
        due &= shape == self._plain and REHEARSAL in ready
        return Choice(shape, steps, due, timing)

    def wanted(
        self, requests: Collection[Request], ready: Collection[Program]
    ) -> Program | None:
        """A program that should be compiled while others run.

        Args:
          requests: that decode.
          ready: programs that are compiled, or cannot be.
        """
        if len(self._shapes) == 1 or self._emitted < WORTH_TREES:
            return None
        for program in (self._shapes[0], REHEARSAL):
            if program not in ready:
                return program
        if self._emitted < WORTH_COMPILING or not requests:
            return None
        load = self.load(requests)
        if not self.costs.is_measured(self._shapes[0], load):
            # Nothing is timed while a program is being compiled.
            return None
        values = self._values(self._shapes, requests, load)
        best = max(values[shape] for shape in self._shapes if shape in ready)
        hopes = {
            shape: values[shape] * self._doubt(shape, load)
            for shape in self.useful(load)
            if shape not in ready
        }
        found = max(hopes, key=hopes.get, default=None)
        return found if found and hopes[found] > best else None

    def useful(self, load: Load) -> list[TreeShape]:
        """Shapes that win, or nearly, for some acceptance; the first shape always."""
        costs = np.array([self.costs.relative(s, load) for s in self._shapes])
        found = {self._shapes[0], self._shapes[-1]}
        for rate in RATES:
            tokens = [_tokens_of(shape, rate) for shape in self._shapes]
            speeds = np.array(tokens) / costs
            near = np.flatnonzero(speeds * LESS_DOUBT >= speeds.max())
            found |= {self._shapes[number] for number in near}
        return [shape for shape in self._shapes if shape in found]

    def started(self, choice: Choice, requests: Collection[Request]) -> None:
        """A dispatch was started; a choice need not lead to one."""
        trials = self._trials[self.load(requests)]
        trials.since += 1
        if choice.timing:
            trials.begin(choice.shape)
        self._fresh = max(0, self._fresh - 1)
        if choice.rehearse:
            self._unrehearsed = 0
        if choice.shape == self._plain:
            self._unrehearsed += choice.max_steps or self._every

    def begin_text(self) -> None:
        """A new text began: what was learnt of the last one may not hold for it."""
        self._fresh = max(2, FRESH // self._every)
        self._period = self._every

    def record(
        self,
        shape: TreeShape,
        observed: Iterable[tuple[Request, np.ndarray, int]],
        steps: int,
        load: Load,
        seconds: float | None,
    ) -> None:
        """Takes in how a dispatch went.

        Args:
          shape: that it grew.
          observed: requests that speculate, mean tokens of their steps by shape [K]
            (`expectation.tokens_by_shape`), and how many steps.
          steps: that ran.
          load: of the dispatch.
          seconds: from its start, or from the end of the last one; None if something
            else took some of that time.
        """
        number = self._shapes.index(shape)
        for request, tokens, count in observed:
            self._expectation.add(request, shape, tokens, count)
            self._emitted += round(tokens[number] * count)
        self._ran[shape] += 1
        last, self._last = self._last, None
        # The first run of a program does more than to run.
        if not steps or not seconds or self._ran[shape] == 1:
            return
        self._last = shape, load, seconds / steps
        if last and last[0] != shape and last[1] == load:
            self._compare(last[0], shape, load, self._last[2] / last[2])

    def rehearsed(
        self, observed: Iterable[tuple[Request, np.ndarray]], load: Load
    ) -> None:
        """Takes in what steps with trees would have emitted: tokens by shape [K]."""
        requests = []
        for request, tokens in observed:
            self._expectation.add(request, self._shapes[0], tokens, 1)
            requests.append(request)
        values = self._values(self._shapes, requests, load)
        hopeless = max(values, key=values.get) == self._plain and (
            sorted(values.values())[-2] < 0.9 * values[self._plain]
        )
        rarest = RARER * self._every
        self._period = min(2 * self._period, rarest) if hopeless else self._every

    def load(self, requests: Collection[Request]) -> Load:
        """Of texts that decode."""
        longest = max((len(r.prompt) + len(r.tokens) for r in requests), default=0)
        return Load.of(len(requests), longest)

    def _values(self, shapes, requests, load: Load) -> dict[TreeShape, float]:
        """Expected tokens for the time of a plain step."""
        return {
            shape: self.expected(shape, requests) / self.costs.relative(shape, load)
            for shape in shapes
        }

    def _trial(self, best: TreeShape, values, requests, load: Load) -> TreeShape:
        """The shape to time next; the best one if no other is worth it."""
        trials = self._trials[load]

        def worth(shape: TreeShape) -> bool:
            if shape == self._plain:
                return True
            return values[shape] * self._doubt(shape, load) > values[best]

        # Plain decoding first, which the others are measured by.
        others = [s for s in reversed(self._shapes) if s in values and s != best]
        untried = [shape for shape in others if shape not in trials.tried]
        order = filter(worth, [*untried, *(s for s in trials.tried if s in others)])
        return next(order, best)

    def _doubt(self, shape: TreeShape, load: Load) -> float:
        return LESS_DOUBT if self.costs.is_measured(shape, load) else DOUBT

    def _compare(self, before, shape, load: Load, ratio: float) -> None:
        """A step of one shape took so many times that of the one before."""
        if shape == self._plain:
            self.costs.compare(before, load, 1 / ratio)
        else:
            cost = ratio * self.costs.relative(before, load)
            self.costs.compare(shape, load, cost)
        self._trials[load].compared = True


def _tokens_of(shape: TreeShape, rate: float) -> float:
    """Tokens of a best-first tree whose child of rank r is right with rate (1-rate)^r.

    The nodes are independent but for their parents.
    """
    heap, total, spare = [(-rate, 0, 1)], 1.0, shape.num_nodes - 1
    while heap and spare:
        probability, rank, depth = heapq.heappop(heap)
        if depth > shape.depth:
            continue
        spare -= 1
        total -= probability
        heapq.heappush(heap, (probability * (1 - rate), rank + 1, depth))
        heapq.heappush(heap, (probability * rate, 0, depth + 1))
    return total
