"""Which shape the next dispatch grows, where a speculation may take several.

Plain decoding is one of them. Before every dispatch the shape with the most expected
tokens (`engine.expectation`) for its cost (`engine.costs`) is the best one, for the
texts that decode now. It runs as far as that is safe: an account says what speculation
may still lose against plain decoding (a conservative bandit, Wu et al., 1602.04282). A
small share of all time is put aside, and what trees gain, up to a limit. Trees whose
gain is not certain take from it, and so does whatever is only done to find out:

* What shapes bring belongs to texts. A step with a tree tells of all shapes. Plain
  steps tell nothing; beside them trees are rehearsed (`engine.rehearsal`).
* What shapes cost belongs to the machine. Dispatches that follow each other tell
  (`engine.timing`). Shapes not in use get one for it, soon at first and ever more
  rarely later, whatever texts begin meanwhile; those that could not win anyway get
  none.

Programs are compiled one by one: plain decoding first, because it takes the least time
to compile, the others while it runs (`Chooser.wanted`). With the exact rule the text
does not depend on any of this.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from treespec_jax.engine.costs import HOST, REHEARSAL, SWITCH, Costs, Load
from treespec_jax.engine.expectation import (
    PRIOR,
    Expectation,
    observed_shapes,
    tokens_of,
)
from treespec_jax.engine.plan import Plan
from treespec_jax.engine.request import Request
from treespec_jax.engine.timing import Choice, Timing
from treespec_jax.trees.shapes import ROOT_ONLY, TreeShape

Program = TreeShape | str

# What the account gets, as a share of all time; what it begins with, and holds at most,
# in plain steps.
SHARE, START, CREDIT = 0.01, 2.0, 4.0
# Tokens after which the first tree is compiled, and after which shapes are that may be
# a little quicker still.
WORTH_TREES, WORTH_COMPILING = 16, 512
# Dispatches between those that are for timing: until every shape was compared, then,
# if earlier runs compared them, and at most.
RETRY, SOON, COMPARED, RARELY = 3, 8, 32, 256
# Plain steps from which on a rehearsal is dear. There a tree of so much speed, in that
# of plain decoding, is worth as much again as the account begins with, or half of it in
# a new text, and is tried rather than rehearsed.
DEAR, BOLD = 0.2, 1.15
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


@dataclasses.dataclass(frozen=True)
class _Situation:
    """What a choice goes by.

    Attributes:
      load: of the texts.
      account: plain steps that may be lost, whatever is under way included.
      max_steps: see `Chooser.choose`.
      values: expected tokens for the time of a plain step, by shape that can run.
      low: a low estimate of tokens, by shape.
      new: whether nothing is known of a text but what all were like.
    """

    load: Load
    account: float
    max_steps: int | None
    values: dict[TreeShape, float]
    low: dict[TreeShape, float]
    new: bool

    @functools.cached_property
    def order(self) -> list[TreeShape]:
        """Shapes, the best one first."""
        return sorted(self.values, key=self.values.get, reverse=True)

    def gain(self, shape: TreeShape) -> float:
        """Its expected speed, in that of plain decoding."""
        return self.values[shape] / self.values.get(ROOT_ONLY, 1.0)


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
        self._expectation = Expectation(observed, with_model)
        self._timing = Timing(costs, self._plain, self._rehearsed, steps)
        self._trials: dict[Load, _Trials] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets all texts; what a step costs stays."""
        self._expectation.reset()
        self._emitted, self._account = 0, START
        # Dispatches since the latest one with a rehearsal.
        self._bare = BARE
        # The shapes of the latest dispatch started and of the latest that ended.
        self._started = self._recorded = self._plain
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
        now = self._situation(max_steps, requests, usable, under_way)
        choice = self._to_time(now, self._best(now))
        if choice.shape != self._plain or choice.timing or REHEARSAL not in ready:
            return choice
        price = self.costs.rehearsal(self._rehearsed, now.load)
        tree = now.order[0] != self._plain
        if tree and not now.new and price >= DEAR:
            # It looks good, and what is left is for its steps.
            return choice
        rest = 0.0 if tree else START / 2
        bare = 1 if now.new or self._timing.long else BARE
        if now.account - price >= rest and self._bare >= bare:
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
        doubts = np.array([self._doubt(s, load) for s in self._shapes])
        found = {self._shapes[0], self._shapes[-1]}
        for rate in RATES:
            tokens = [tokens_of(shape, rate) for shape in self._shapes]
            speeds = np.array(tokens) / costs
            near = np.flatnonzero(speeds * doubts >= speeds.max())
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
        trials, before = self._trials_of(load), self._started
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
        observed: Iterable[tuple[Request, np.ndarray]],
        steps: int,
        load: Load,
        seconds: float | None,
    ) -> None:
        """Takes in how a dispatch went.

        Args:
          choice: that it was.
          observed: requests, and tokens of their steps by shape [N, K]
            (`expectation.tokens_by_shape`).
          steps: that ran.
          load: of the dispatch.
          seconds: from its start, or from the end of the last one; None if something
            else took some of that time.
        """
        shape, emitted, texts = choice.shape, 0.0, 0
        number = self._shapes.index(shape)
        for request, tokens in observed:
            if request.params.speculate:
                self._expectation.add(request, shape, tokens)
            emitted += tokens[:, number].sum()
            texts += len(tokens)
        self._emitted += round(emitted)
        if texts:
            gained = (1 + SHARE) * emitted / texts - self._feared(shape, load)
            self._pay(-gained * steps)
            asked = self._steps if choice.max_steps is None else choice.max_steps
            self._pay(self._besides(self._recorded, shape, asked, load))
        self._recorded = shape
        if choice.rehearse:
            self._pay(self.costs.rehearsal(self._rehearsed, load))
        if self._timing.take_in(choice, load, steps, seconds):
            self._trials_of(load).compared = True

    def rehearsed(self, observed: Iterable[tuple[Request, np.ndarray]]) -> None:
        """Takes in what steps with trees would have emitted: tokens by shape [K]."""
        for request, tokens in observed:
            self._expectation.add(request, self._rehearsed, tokens[None])

    def load(self, requests: Collection[Request]) -> Load:
        """Of texts that decode."""
        longest = max((len(r.prompt) + len(r.tokens) for r in requests), default=0)
        return Load.of(len(requests), longest)

    def _pay(self, plain_steps: float) -> None:
        self._account = min(CREDIT, max(-CREDIT, self._account - plain_steps))

    def _tokens(self, requests: Collection[Request], low: bool = False) -> np.ndarray:
        """float [K]: expected tokens of a step per text, or a low estimate of them."""
        of = self._expectation.low if low else self._expectation.tokens
        one = np.ones(len(self._expectation.shapes))
        found = [of(r) if r.params.speculate else one for r in requests]
        return np.mean(found, axis=0) if found else one

    def _values(self, shapes, tokens, load: Load) -> dict[TreeShape, float]:
        """Expected tokens for the time of a plain step."""
        return {
            shape: count / self.costs.relative(shape, load)
            for shape, count in zip(self._shapes, tokens, strict=False)
            if shape in shapes
        }

    def _situation(self, max_steps, requests, usable, under_way) -> _Situation:
        load = self.load(requests)
        values = self._values(usable, self._tokens(requests), load)
        speculating = [request for request in requests if request.params.speculate]
        low = self._tokens(requests, low=True)
        return _Situation(
            load=load,
            account=self._account - sum(choice.risk for choice in under_way),
            max_steps=max_steps,
            values=values,
            low=dict(zip(self._shapes, low, strict=False)),
            new=any(map(self._expectation.is_new, speculating)),
        )

    def _best(self, now: _Situation) -> Choice:
        """The best shape that may run."""
        least = now.values.get(self._plain, 0.0)
        promising = (shape for shape in now.order if now.values[shape] >= least)
        choices = (self._run(now, shape) for shape in promising)
        plain = Choice(self._plain, now.max_steps)
        choice = next((c for c in choices if c), plain)
        compared = self._is_compared(choice.shape, now.load)
        # Dispatches of two shapes tell what steps cost.
        return choice if compared or choice.shape != self._started else plain

    def _to_time(self, now: _Situation, choice: Choice) -> Choice:
        """Another choice if it is time to find out what another shape costs."""
        trials = self._trials_of(now.load)
        if trials.again:
            return Choice(self._plain, now.max_steps, timing=True)
        shape = self._trial(choice.shape, now.values, now.load)
        if shape != choice.shape and trials.due(shape):
            return self._run(now, shape, timing=True) or choice
        if choice.shape == self._plain and self._is_host_wanted(now.load, now.account):
            return self._run(now, self._plain, timing=True)
        return choice

    def _run(
        self, now: _Situation, shape: TreeShape, timing: bool = False
    ) -> Choice | None:
        """A dispatch, as long as the account allows; None: not as long as it is worth.

        Args:
          now: what is known.
          shape: that it grows.
          timing: whether it runs only to be timed.
        """
        steps = min(now.max_steps or self._steps, self._steps)
        least = min(TRIAL_STEPS, steps)
        if shape == self._plain:
            most = least if timing else now.max_steps
            return Choice(shape, most, timing=timing)
        # Whoever owes something takes what gains for certain alone.
        owed = LESS_DOUBT if now.account < 0 else 1.0
        risk = max(0.0, owed * self._feared(shape, now.load) - now.low[shape])
        besides = self._besides(self._started, shape, least, now.load)
        needed = least * risk + besides
        if timing and self.costs.is_doubtful(shape, now.load):
            needed = min(needed, START / 2)
        price = self.costs.rehearsal(self._rehearsed, now.load)
        bold = price >= DEAR and now.gain(shape) >= BOLD
        debt = bold * (START / 2 if now.new else START)
        if risk and now.account + debt < needed:
            return None
        most = steps
        if not self._is_compared(shape, now.load):
            most = least
        elif risk:
            # Half of it: the next dispatch is chosen before this one is known.
            affordable = int((now.account / 2 - besides) / risk)
            most = least if timing else max(least, min(steps, affordable))
        whole = most == self._steps and now.max_steps is None
        risk = most * risk + besides if risk else 0.0
        return Choice(shape, None if whole else most, False, timing, risk)

    def _besides(
        self, before: TreeShape, shape: TreeShape, steps: int, load: Load
    ) -> float:
        """Plain steps that a dispatch takes besides its steps and its host's part.

        Args:
          before: the shape of the dispatch before it.
          shape: of this one.
          steps: of it.
          load: of it.
        """
        besides = self.costs.host(load) * (1 - steps / self._steps)
        if before == self._plain != shape:
            # Of the first plain dispatch behind it.
            besides += self.costs.switch(load) or 0.0
        return besides

    def _feared(self, shape: TreeShape, load: Load) -> float:
        """Plain steps that a step may take."""
        cost = self.costs.relative(shape, load)
        return cost if self._is_compared(shape, load) else DOUBT * cost

    def _trials_of(self, load: Load) -> _Trials:
        if load not in self._trials:
            self._trials[load] = _Trials()
            known = [s for s in self._shapes if self.costs.has_comparisons(s, load)]
            if known:
                tried = [self._plain, *known]
                self._trials[load] = _Trials(0, COMPARED, tried, compared=True)
        return self._trials[load]

    def _trial(self, best: TreeShape, values, load: Load) -> TreeShape:
        """The shape to time next; the best one if no other is worth it."""
        trials = self._trials_of(load)

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
        return self._trials_of(load).due(self._plain)

    def _is_compared(self, shape: TreeShape, load: Load) -> bool:
        """Whether dispatches say what such a step costs."""
        if shape == self._plain:
            return True
        known = self.costs.has_comparisons(shape, load)
        return known or self.costs.is_measured(shape, load)

    def _doubt(self, shape: TreeShape, load: Load) -> float:
        return LESS_DOUBT if self.costs.has_comparisons(shape, load) else DOUBT
