"""Which shape the next dispatch grows, where a speculation may take several.

The first shape is the one that was asked for, the last is plain decoding. The shape
with the most tokens for its time wins, and neither figure takes trials of the tree in
every text:

* Tokens per step of the tree are counted while it runs. While plain decoding runs they
  come from rehearsals (`engine.rehearsal`): trees that are grown and not verified.
* The time of a tree's step, relative to a plain one's, belongs to the machine and not
  to the text. It is taken where a dispatch of one shape follows one of the other. The
  shape not in use gets a short dispatch for it, soon at first and ever more rarely
  later, whatever texts begin meanwhile.

With the exact rule the text does not depend on any of this.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Sequence

from treespec_jax.trees.shapes import TreeShape

# Tokens after which plain decoding may be compiled, which takes seconds.
WORTH_COMPILING = 512
# Tokens per step from which on a tree is taken to be the quicker, whatever its time.
ENOUGH = 3.0
# Time of a tree's step in plain steps until it was taken.
PRIOR_COST = 1.5
# Dispatches between those that are for timing: until one is compared, after the first
# comparison, and at most.
RETRY, SOON, RARELY = 3, 8, 256
# Steps of a dispatch that is for timing, or that shows what a new text is like. Of the
# latter kind there are as many as rehearsals in so many plain steps.
TRIAL_STEPS, FRESH = 2, 80
# Steps or rehearsals that a running mean remembers, and how many of them still count
# when a new text begins.
MEMORY, CARRIED = 16, 2
# Comparisons of times whose median counts.
COMPARISONS = 5


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a dispatch does.

    Attributes:
      shape: that it grows.
      max_steps: that it runs at most; None: the compiled number.
      rehearse: whether it grows a tree of the first shape that nobody verifies.
      timing: whether it runs only to be timed.
    """

    shape: TreeShape
    max_steps: int | None
    rehearse: bool = False
    timing: bool = False


@dataclasses.dataclass
class _Mean:
    """A running mean.

    Attributes:
      value: 0 before anything came.
      weight: observations that it stands for, MEMORY at most.
    """

    value: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float) -> None:
        self.weight = min(self.weight + weight, MEMORY)
        self.value += min(1.0, weight / self.weight) * (value - self.value)


@dataclasses.dataclass
class _Costs:
    """Times of a tree's step in plain steps, with so many slots.

    Attributes:
      compared: the latest ones.
      wait: dispatches until the next one for timing.
      period: dispatches to wait once there is a comparison.
    """

    compared: collections.deque[float] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=COMPARISONS)
    )
    wait: int = 2
    period: int = SOON

    def compare(self, ratio: float) -> None:
        self.compared.append(ratio)
        self.wait = self.period
        self.period = min(2 * self.period, RARELY)


class Chooser:
    """Chooses before every dispatch.

    Args:
      shapes: at least one; with one it has no choice.
      every: plain steps between rehearsals.

    Attributes:
      compiled: whether all shapes are, so that using one costs nothing else.
    """

    def __init__(self, shapes: Sequence[TreeShape], every: int = 8):
        self.compiled = False
        self._every = every
        self._tree, self._plain = shapes[0], shapes[-1]
        self._ran: collections.Counter[TreeShape] = collections.Counter()
        # By the binary length of the number of slots, which makes nodes dearer.
        self._costs: dict[int, _Costs] = collections.defaultdict(_Costs)
        self._slots = 1
        self.reset()

    def reset(self) -> None:
        """Forgets all texts; what a step costs stays."""
        self._tokens = _Mean()
        self._emitted = self._fresh = 0
        self._begun = False
        self._unrehearsed = self._every
        # Shape, slots and seconds per step of the last dispatch, if it was timed.
        self._last: tuple[TreeShape, int, float] | None = None

    def expected(self, shape: TreeShape) -> float:
        """Tokens that a step of that shape emits for each slot."""
        return 1.0 if shape == self._plain else self._tokens.value

    def cost(self, shape: TreeShape) -> float:
        """Time of its step, in plain steps."""
        if shape == self._plain:
            return 1.0
        compared = self._now.compared
        return statistics.median(compared) if compared else PRIOR_COST

    def choose(self, max_steps: int | None) -> Choice:
        """What the next dispatch does.

        Args:
          max_steps: that the caller allows; None: the compiled number.
        """
        if self._plain == self._tree or self._unproven():
            return Choice(self._tree, max_steps)
        short = TRIAL_STEPS if max_steps is None else min(TRIAL_STEPS, max_steps)
        if not self._begun:
            return Choice(self._tree, short, timing=True)
        timing = self._now.wait <= 0 and self._tokens.value < ENOUGH
        shape = self._other(self._best()) if timing else self._best()
        due = self._fresh > 0 or self._unrehearsed >= self._every
        steps = short if timing or self._fresh else max_steps
        return Choice(shape, steps, due and shape == self._plain, timing)

    def started(self, choice: Choice) -> None:
        """A dispatch was started; a choice need not lead to one."""
        if self._unproven():
            return
        self._begun = True
        self._now.wait = max(self._now.wait - 1, RETRY if choice.timing else 0)
        self._fresh = max(0, self._fresh - 1)
        if choice.rehearse:
            self._unrehearsed = 0
        if choice.shape == self._plain:
            self._unrehearsed += choice.max_steps or self._every

    def begin_text(self) -> None:
        """A new text began: what was learnt of the last one may not hold for it."""
        self._tokens.weight = min(self._tokens.weight, CARRIED)
        self._fresh = max(2, FRESH // self._every)

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
        self._emitted += tokens
        self._slots = slots = max(slots, 1)
        self._ran[shape] += 1
        last, self._last = self._last, None
        if not steps:
            return
        if shape == self._tree:
            self._tokens.add(tokens / (steps * slots), steps)
        # The first run of a program does more than to run.
        if not seconds or self._ran[shape] == 1:
            return
        self._last = shape, slots, seconds / steps
        if last and last[:2] == (self._other(shape), slots):
            ratio = self._last[2] / last[2]
            self._now.compare(ratio if shape == self._tree else 1 / ratio)

    def rehearsed(self, tokens: float) -> None:
        """Takes in how many tokens a step of the tree would have emitted per slot."""
        self._tokens.add(tokens, 1)

    @property
    def _now(self) -> _Costs:
        return self._costs[self._slots.bit_length()]

    def _best(self) -> TreeShape:
        """The shape of the most tokens for its time."""
        shapes = (self._tree, self._plain)
        return max(shapes, key=lambda shape: self.expected(shape) / self.cost(shape))

    def _other(self, shape: TreeShape) -> TreeShape:
        return self._plain if shape == self._tree else self._tree

    def _unproven(self) -> bool:
        """Whether nothing speaks for compiling plain decoding yet."""
        if self.compiled or self._ran[self._plain]:
            return False
        return self._emitted < WORTH_COMPILING or self._tokens.value >= ENOUGH
