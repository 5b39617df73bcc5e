"""Which shape the next dispatch grows, where a speculation may take several.

Plain decoding is one of them. Before every dispatch the shape with the most expected
tokens (`engine.expectation`) for its cost (`engine.costs`) is the best one, for the
texts that decode now. It runs as far as that is safe: an account says what speculation
may still lose against plain decoding (a conservative bandit, Wu et al., 1602.04282). A
small share of all time is put aside, and what trees gain, up to a limit. Trees whose
gain is not certain take from it, and so does whatever is only done to find out:

* What shapes bring belongs to texts. A step tells of its own tree and of all smaller
  ones. Plain steps tell nothing; beside them trees are rehearsed (`engine.rehearsal`).
* What shapes cost belongs to the machine. Dispatches that follow each other tell
  (`engine.timing`). Shapes not in use get one for it, soon at first and ever more
  rarely later, whatever texts begin meanwhile; those that could not win anyway get
  none.

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

from treespec_jax.engine.costs import COMPARISONS, HOST, REHEARSAL, SWITCH, Costs, Load
from treespec_jax.engine.expectation import (
    GAIN,
    GAIN_OF_MODEL,
    PRIOR,
    Expectation,
    observed_shapes,
)
from treespec_jax.engine.plan import Plan
from treespec_jax.engine.request import Request
from treespec_jax.engine.timing import Choice, Timing
from treespec_jax.trees.shapes import TreeShape

Program = TreeShape | str

# What the account gets, as a share of all time, and holds at most, in plain steps.
SHARE, CREDIT = 0.01, 2.5
# Tokens after which the first tree is compiled, and after which shapes are that may be
# a little quicker still.
WORTH_TREES, WORTH_COMPILING = 16, 512
# Dispatches between those that are for timing: until every shape was compared, then,
# and at most.
RETRY, SOON, RARELY = 3, 8, 256
# Steps of a dispatch that is for timing and may lose, and the fewest of trees at all.
TRIAL_STEPS = 2
# Dispatches without a rehearsal between two with one, so that its price shows.
BARE = 2
# A shape may be this much better than it looks: before it was compared a few times, and
# after.
DOUBT, LESS_DOUBT = 1.3, 1.1
# Acceptance rates of first children for which a shape may be of use.
RATES = tuple(np.linspace(0.1, 1.0, 10))


@dataclasses.dataclass
class _Trials:
    """When shapes are timed that are not in use, under one load.

    Attributes:
      since: dispatches since the latest one for timing.
      period: dispatches between those for timing, once all shapes have been tried.
      tried: shapes, those of longest ago first.
      compared: whether the latest one was.
      again: whether the next one is another of plain steps, because it is not known
        what the first one behind trees takes besides.
    """

    since: int = SOON
    period: int = SOON
    tried: list[TreeShape] = dataclasses.field(default_factory=list)
    compared: bool = False
    again: bool = False

    def due(self, shape: TreeShape) -> bool:
        """Whether it is time for one of that shape."""
        tried = self.compared and shape in self.tried
        return self.since >= (self.period if tried else RETRY)

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
      shapes: at least one; with one it has no choice. Of several the last is plain
        decoding.
      costs: of steps.
      with_model: the drafter runs passes of a model.
      steps: S, of a dispatch.
    """

    def __init__(
        self, shapes: Sequence[TreeShape], costs: Costs, with_model: bool, steps: int
    ):
        self.costs = costs
        self._shapes, self._steps = tuple(shapes), steps
        self._plain = shapes[-1]
        observed = observed_shapes(shapes, with_model)
        self._rehearsed = observed[-1]
        self._expectation = Expectation(observed, GAIN_OF_MODEL if with_model else GAIN)
        self._timing = Timing(costs, self._plain, self._rehearsed, steps)
        self._trials: dict[Load, _Trials] = collections.defaultdict(_Trials)
        self.reset()

    def reset(self) -> None:
        """Forgets all texts; what a step costs stays."""
        self._expectation.reset()
        self._emitted, self._account = 0, CREDIT
        # Dispatches since the latest one with a rehearsal.
        self._bare = BARE
        # The shape of the latest dispatch started.
        self._started = self._plain
        self._timing.reset()

    def choose(
        self,
        max_steps: int | None,
        requests: Collection[Request],
        ready: Collection[Program],
        under_way: Iterable[Choice] = (),
    ) -> Choice:
        """What the next dispatch does.

        Args:
          max_steps: that the caller allows; None: the compiled number.
          requests: that decode.
          ready: programs that are compiled.
          under_way: dispatches whose results are not known yet.
        """
        if len(self._shapes) == 1:
            return Choice(self._plain, max_steps)
        speculating = any(request.params.speculate for request in requests)
        usable = [shape for shape in self._shapes if shape in ready]
        if not speculating or not usable:
            return Choice(self._plain, max_steps)
        load, account = self.load(requests), self._account
        account -= sum(choice.risk for choice in under_way)
        values = self._values(usable, self._tokens(requests), load)
        low = dict(zip(self._shapes, self._tokens(requests, low=True), strict=False))
        steps = self._steps if max_steps is None else min(max_steps, self._steps)

        def run(shape: TreeShape, steps: int, timing: bool = False) -> Choice | None:
            """As far as the account allows; None: no further than it is worth."""
            least = min(TRIAL_STEPS, steps)
            if shape == self._plain:
                return Choice(shape, least if timing else max_steps, timing=timing)
            risk = self._risk(shape, low[shape], load)
            most, needed = steps, least * risk
            if timing and self.costs.is_doubtful(shape, load):
                needed = min(needed, CREDIT / 2)
            if risk and account < needed:
                return None
            if risk:
                # Half of it: the next dispatch is chosen before this one is known.
                affordable = least if timing else int(account / 2 / risk)
                most = max(least, min(steps, affordable))
            whole = most == self._steps and max_steps is None
            return Choice(shape, None if whole else most, False, timing, most * risk)

        order = sorted(values, key=values.get, reverse=True)
        promising = [s for s in order if values[s] >= values.get(self._plain, 0.0)]
        choices = (run(shape, steps) for shape in promising)
        choice = next((c for c in choices if c), None) or Choice(self._plain, max_steps)
        shape = self._trial(choice.shape, values, load)
        trials = self._trials[load]
        if trials.again:
            choice = Choice(self._plain, max_steps, timing=True)
        elif shape != choice.shape and trials.due(shape):
            choice = run(shape, steps, timing=True) or choice
        elif choice.shape == self._plain and self._is_host_wanted(load, account):
            choice = run(self._plain, steps, timing=True)
        if choice.shape != self._plain or choice.timing:
            return choice
        price = self.costs.rehearsal(self._rehearsed, load)
        # The rest is for a tree that looks good, or will.
        rest = CREDIT / 2 if order[0] == self._plain else 0.0
        affordable = account - price >= rest
        new = any(self._expectation.is_new(r) for r in requests if r.params.speculate)
        if (
            REHEARSAL in ready
            and affordable
            and self._bare >= (1 if new or self._timing.long else BARE)
        ):
            return dataclasses.replace(choice, rehearse=True, risk=price)
        return choice

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
        values = self._values(self._shapes, self._tokens(requests), load)
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

    def priced(self, plan: Plan, shape: TreeShape) -> Plan:
        """The plan of a dispatch of that shape, with the price of a level."""
        if not getattr(shape, "priced", False):
            return plan
        requests = [slot.request for slot in plan.slots.values()]
        tokens = self._tokens(requests)[self._shapes.index(shape)]
        if len(self._shapes) == 1:
            # Nobody tells of an only shape; all steps of a text were of it.
            spent = sum(request.stats.steps for request in requests)
            emitted = sum(request.stats.tokens for request in requests)
            prior = PRIOR * len(requests)
            tokens = (emitted + prior * tokens) / (spent + prior)
        price = self.costs.level_price(shape, self.load(requests), tokens)
        return dataclasses.replace(plan, level_price=price)

    def started(self, choice: Choice, requests: Collection[Request]) -> None:
        """A dispatch was started; a choice need not lead to one."""
        self._bare = 0 if choice.rehearse else self._bare + 1
        load = self.load(requests)
        trials, before = self._trials[load], self._started
        trials.since += 1
        if choice.timing and not trials.again:
            trials.begin(choice.shape)
        switches = choice.timing and choice.shape == self._plain != before
        known = self._timing.long or self.costs.is_known(SWITCH, load)
        trials.again = switches and not known
        self._started = choice.shape

    def record(
        self,
        choice: Choice,
        observed: Iterable[tuple[Request, np.ndarray, int]],
        steps: int,
        load: Load,
        seconds: float | None,
    ) -> None:
        """Takes in how a dispatch went.

        Args:
          choice: that it was.
          observed: requests, mean tokens of their steps by shape [K]
            (`expectation.tokens_by_shape`), and how many steps.
          steps: that ran.
          load: of the dispatch.
          seconds: from its start, or from the end of the last one; None if something
            else took some of that time.
        """
        shape, emitted, texts = choice.shape, 0.0, 0
        number = self._shapes.index(shape)
        for request, tokens, count in observed:
            if request.params.speculate:
                self._expectation.add(request, shape, tokens, count)
            emitted += tokens[number] * count
            texts += count
        self._emitted += round(emitted)
        if texts:
            gained = (1 + SHARE) * emitted / texts - self.costs.relative(shape, load)
            self._pay(-gained * steps)
        if choice.rehearse:
            self._pay(self.costs.rehearsal(self._rehearsed, load))
        if self._timing.take_in(choice, load, steps, seconds):
            self._trials[load].compared = True

    def rehearsed(self, observed: Iterable[tuple[Request, np.ndarray]]) -> None:
        """Takes in what steps with trees would have emitted: tokens by shape [K]."""
        for request, tokens in observed:
            self._expectation.add(request, self._rehearsed, tokens, 1)

    def load(self, requests: Collection[Request]) -> Load:
        """Of texts that decode."""
        longest = max((len(r.prompt) + len(r.tokens) for r in requests), default=0)
        return Load.of(len(requests), longest)

    def _pay(self, plain_steps: float) -> None:
        self._account = min(CREDIT, max(-CREDIT, self._account - plain_steps))

    def _tokens(self, requests: Collection[Request], low: bool = False) -> np.ndarray:
        """float [K]: expected tokens of a step per text, or a low estimate of them."""
        of = self._expectation.low if low else self._expectation.tokens
        one = np.ones(len(self._shapes) + 1)
        found = [of(r) if r.params.speculate else one for r in requests]
        return np.mean(found, axis=0) if found else one

    def _values(self, shapes, tokens, load: Load) -> dict[TreeShape, float]:
        """Expected tokens for the time of a plain step."""
        return {
            shape: count / self.costs.relative(shape, load)
            for shape, count in zip(self._shapes, tokens, strict=False)
            if shape in shapes
        }

    def _risk(self, shape: TreeShape, tokens: float, load: Load) -> float:
        """Plain steps that a step may lose which emits that many tokens."""
        cost = self.costs.relative(shape, load)
        if not self.costs.is_measured(shape, load):
            cost *= DOUBT
        return max(0.0, cost - tokens)

    def _trial(self, best: TreeShape, values, load: Load) -> TreeShape:
        """The shape to time next; the best one if no other is worth it."""
        trials = self._trials[load]

        def worth(shape: TreeShape) -> bool:
            if shape == self._plain:
                return True
            cost = self.costs.relative(shape, load)
            hope = values[shape] * cost / self.costs.least(shape, load)
            return hope * self._doubt(shape, load) > values[best]

        # Plain decoding first, which the others are measured by, then the best.
        others = sorted(values, key=lambda s: (s != self._plain, -values[s]))
        untried = [shape for shape in others if shape not in trials.tried]
        order = filter(worth, [*untried, *(s for s in trials.tried if s in others)])
        return next((shape for shape in order if shape != best), best)

    def _is_host_wanted(self, load: Load, account: float) -> bool:
        """Whether a short dispatch should say what all of them take besides steps."""
        if (
            account <= 0
            or self._timing.long is not False
            or self.costs.is_known(HOST, load)
        ):
            return False
        return self._trials[load].due(self._plain)

    def _doubt(self, shape: TreeShape, load: Load) -> float:
        known = self.costs.is_measured(shape, load, COMPARISONS)
        return LESS_DOUBT if known else DOUBT


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
