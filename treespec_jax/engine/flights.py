"""Dispatches under way, and what they tell the chooser of shapes once they are done."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from treespec_jax.engine import rehearsal
from treespec_jax.engine.chooser import Chooser
from treespec_jax.engine.costs import Load
from treespec_jax.engine.expectation import rehearsed_tokens, tokens_by_shape
from treespec_jax.engine.plan import Plan
from treespec_jax.engine.state import Outbox
from treespec_jax.engine.timing import Choice
from treespec_jax.speculation import Speculation
from treespec_jax.trees.shapes import TreeShape


@dataclasses.dataclass
class Flight:
    """A dispatch under way.

    Attributes:
      plan: what runs.
      choice: that it follows.
      load: of its requests.
      outbox: on the device.
      started: time of its launch, by the engine's clock.
      timed: whether its time is that of its steps: nothing was compiled meanwhile.
    """

    plan: Plan
    choice: Choice
    load: Load
    outbox: Outbox
    started: float
    timed: bool

    @property
    def nodes(self) -> int:
        """Drafted by each step."""
        return self.choice.shape.num_nodes - 1


@dataclasses.dataclass(frozen=True)
class BacklogLimits:
    """What may wait for a drafter's model, of each slot; see `PatientDrafter`.

    Attributes:
      size: tokens; 0 if none ever do.
      window: tokens that a dispatch of plain steps adds at most.
    """

    size: int
    window: int

    @classmethod
    def of(cls, speculation: Speculation, steps: int) -> BacklogLimits:
        """Of dispatches of S steps."""
        size = rehearsal.backlog(speculation, steps)
        return cls(size, rehearsal.window(speculation, steps))

    @property
    def trails(self) -> int:
        """Tokens by which the model may be behind after a dispatch."""
        return self.size + self.window

    def is_due(self, plan: Plan, plain: bool) -> bool:
        """Whether it must be taken in before a dispatch, of plain steps or of trees."""
        behind = max((slot.behind for slot in plan.slots.values()), default=0)
        return behind > (max(0, self.size - self.window) if plain else 0)

    def change(self, plan: Plan, plain: bool, due: bool) -> None:
        """A dispatch was started, behind a pass over the backlog if that was due."""
        for slot in plan.slots.values():
            slot.behind = 0 if due else slot.behind
            slot.behind += self.window if plain and self.size else 0


def tell(
    chooser: Chooser,
    shapes: Sequence[TreeShape],
    flight: Flight,
    done: Outbox,
    seconds: float | None,
) -> None:
    """Tells the chooser what a dispatch emitted, and what others would have.

    Args:
      chooser: of the engine.
      shapes: see `expectation.observed_shapes`.
      flight: that is done.
      done: its outbox, of NumPy arrays.
      seconds: that it took; None if something else took some of that time.
    """
    slots, counts = flight.plan.slots, done.emission.counts
    tokens = tokens_by_shape(shapes, counts, done.emission.orders)
    observed = []
    for index, slot in slots.items():
        ran = counts[:, index] > 0
        if ran.any():
            observed.append((slot.request, tokens[ran, index]))
    chooser.record(flight.choice, observed, int(done.steps), flight.load, seconds)
    if done.rehearsed is None:
        return
    counts_B = counts.sum(axis=0)
    emitted_BS = done.emission.tokens[:, :, 0].T
    tokens = rehearsed_tokens(shapes, done.rehearsed, emitted_BS, counts_B)
    requests = {i: slot.request for i, slot in slots.items() if counts_B[i]}
    chooser.rehearsed(
        [(r, tokens[i]) for i, r in requests.items() if r.params.speculate]
    )
