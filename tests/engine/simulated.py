"""An engine of scripted texts and costs around a real chooser; time in plain steps.

The true token after a node is its child of rank r with probability p (1 - p)^r, and a
tree holds the best paths: a text is its rates p, token by token. The next dispatch is
chosen before the results of the last one are read, as in `engine.Engine`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import heapq
from collections.abc import Sequence

import numpy as np

from treespec_jax.config import SamplingParams
from treespec_jax.engine.chooser import Chooser
from treespec_jax.engine.costs import (
    COMPARISONS,
    HOST,
    MANY,
    REHEARSAL,
    SWITCH,
    Costs,
    Load,
    usual_curve,
)
from treespec_jax.engine.expectation import (
    contained,
    observed_shapes,
    tokens_by_shape,
)
from treespec_jax.engine.request import Request
from treespec_jax.engine.timing import Choice
from treespec_jax.trees import shapes
from treespec_jax.trees.shapes import ROOT_ONLY, TreeShape

LADDER = shapes.parse("auto:7@4+3@3+15@5+31@7").shapes
# Steps of a dispatch.
STEPS = 8


@dataclasses.dataclass(frozen=True)
class Machine:
    """What things cost, in plain steps.

    Attributes:
      trees: of a step with each tree of LADDER.
      level: of a pass of the drafter that nobody verifies.
      dispatch: of every dispatch, whatever it does.
      switch: of the first plain dispatch behind one of trees, besides.
      cpu: whether it is one, for the chooser to begin with.
      noise: standard deviation of log times, of dispatch by dispatch.
      seconds: of a plain step.
    """

    trees: tuple[float, ...] = (1.7, 1.4, 2.4, 3.7)
    level: float = 0.1
    dispatch: float = 0.1
    switch: float = 0.0
    cpu: bool = True
    noise: float = 0.05
    seconds: float = 0.04

    def time(self, choice: Choice, steps: int, before: TreeShape) -> float:
        """Of a dispatch behind one of another shape, without noise."""
        cost = dict(zip(LADDER, (*self.trees, 1.0), strict=True))[choice.shape]
        besides = self.dispatch + self.level * choice.rehearse
        if choice.shape == ROOT_ONLY != before:
            besides += self.switch
        return steps * cost + besides


@dataclasses.dataclass
class Text:
    """A text under way.

    Attributes:
      rates: of its tokens, in order.
      request: that the chooser sees.
      length: tokens emitted.
    """

    rates: Sequence[float]
    request: Request = dataclasses.field(
        default_factory=lambda: Request([1], SamplingParams())
    )
    length: int = 0


class Simulation:
    """Texts run one after the other, or side by side.

    Args:
      machine: see `Machine`.
      seed: of tokens and of noise.
      with_model: see `Chooser`.
      fixed: the shape of every step; None: the chooser's.
      measured: whether the chooser knows all costs, as behind `Engine.measure_costs`.

    Attributes:
      time: so far, in plain steps.
      steps: by shape.
      rehearsals: so far.
    """

    def __init__(
        self,
        machine: Machine,
        seed: int = 0,
        with_model: bool = True,
        fixed: TreeShape | None = None,
        measured: bool = False,
    ):
        costs = Costs(usual_curve(machine.cpu, with_model), 1)
        if measured:
            _tell(costs, machine)
        self.chooser = Chooser(LADDER, costs, with_model, STEPS)
        self.time, self.rehearsals = 0.0, 0
        self.steps: collections.Counter[str] = collections.Counter()
        self._machine, self._fixed, self._before = machine, fixed, ROOT_ONLY
        self._observed = observed_shapes(LADDER, with_model)
        self._rng = np.random.default_rng(seed)

    def run(self, texts: Sequence[Sequence[float]], slots: int = 1) -> float:
        """The time of texts, given by their rates, so many of them side by side."""
        before, waiting, flying = self.time, [Text(rates) for rates in texts], []
        running, waiting = waiting[:slots], waiting[slots:]
        while running:
            while len(flying) < 2:
                flying.append(self._start(running, flying))
            self._land(running, flying.pop(0))
            running = [text for text in running if text.length < len(text.rates)]
            while waiting and len(running) < slots:
                running.append(waiting.pop(0))
        return self.time - before

    def _start(self, texts, flying) -> Choice:
        if self._fixed is not None:
            return Choice(self._fixed, None)
        requests, ready = [text.request for text in texts], {*LADDER, REHEARSAL}
        choice = self.chooser.choose(None, requests, ready, flying)
        self.chooser.started(choice, requests)
        return choice

    def _land(self, texts, choice: Choice) -> None:
        most = STEPS if choice.max_steps is None else choice.max_steps
        load = self.chooser.load([text.request for text in texts])
        rehearsed = [(t.request, self._tokens(t, self._observed[-1])) for t in texts]
        found, steps = {id(text): [] for text in texts}, 0
        while steps < most and any(t.length < len(t.rates) for t in texts):
            steps += 1
            for text in texts:
                if text.length < len(text.rates):
                    tokens = self._tokens(text, choice.shape)
                    found[id(text)].append(tokens)
                    text.length += int(tokens[LADDER.index(choice.shape)])
        time = self._machine.time(choice, steps, self._before)
        self._before = choice.shape
        self.time += time
        self.steps[shapes.text_of(choice.shape)] += steps
        self.rehearsals += choice.rehearse
        observed = [(t.request, np.array(found[id(t)])) for t in texts if found[id(t)]]
        time *= np.exp(self._machine.noise * self._rng.normal())
        seconds = time * self._machine.seconds
        self.chooser.record(choice, observed, steps, load, seconds)
        if choice.rehearse:
            self.chooser.rehearsed(rehearsed)

    def _tokens(self, text: Text, shape: TreeShape) -> np.ndarray:
        """float [K], of a step that grows a tree of that shape."""
        rates = tuple([*text.rates[text.length :], 0.0][: shape.depth])
        tree, path, found = _best_first(rates, shape), (), []
        for rate in rates:
            path += (self._rng.geometric(rate) - 1 if rate else 99,)
            if path not in tree:
                break
            found.append(tree[path])
        count = 1 + len(found)
        orders = np.array((found + [99] * shape.depth)[: shape.depth], int)
        tokens = tokens_by_shape(self._observed, np.array(count), orders)
        return np.where(contained(self._observed, shape), tokens, np.nan)


def _tell(costs: Costs, machine: Machine) -> None:
    bare = STEPS + machine.dispatch
    for load in (Load.of(slots, 0) for slots in (1, 2, 4)):
        for shape in LADDER[:-1]:
            time = machine.time(Choice(shape, None), STEPS, shape)
            for _ in range(COMPARISONS):
                costs.compare(shape, load, time / bare)
        besides = {HOST: machine.dispatch, SWITCH: machine.switch}
        for name, cost in (besides | {REHEARSAL: machine.level}).items():
            for _ in range(MANY):
                costs.compare(name, load, cost)


@functools.cache
def _best_first(rates: tuple[float, ...], shape: TreeShape) -> dict[tuple, int]:
    """Where nodes stand, by the ranks of their paths."""
    heap, tree = [(-rates[0], (0,))] if rates else [], {}
    while heap and len(tree) < shape.num_nodes - 1:
        minus, path = heapq.heappop(heap)
        tree[path] = len(tree) + 1
        depth = len(path)
        sibling = minus * (1 - rates[depth - 1])
        heapq.heappush(heap, (sibling, (*path[:-1], path[-1] + 1)))
        if depth < min(shape.depth, len(rates)):
            heapq.heappush(heap, (minus * rates[depth], (*path, 0)))
    return tree


def relative(
    machine: Machine,
    texts,
    slots: int = 1,
    seed: int = 0,
    earlier=(),
    measured: bool = False,
    **settings,
):
    """Speed of the chooser, × plain and × the best fixed shape, and the simulation.

    Args:
      machine: see `Machine`.
      texts: given by their rates.
      slots: how many run side by side.
      seed: of all simulations.
      earlier: texts that the chooser has run before.
      measured: see `Simulation`.
      **settings: of `Simulation`.
    """
    fixed = {
        shape: Simulation(machine, seed, fixed=shape, **settings).run(texts, slots)
        for shape in LADDER
    }
    auto = Simulation(machine, seed, measured=measured, **settings)
    auto.run(earlier, slots)
    time = auto.run(texts, slots)
    return fixed[ROOT_ONLY] / time, min(fixed.values()) / time, auto
