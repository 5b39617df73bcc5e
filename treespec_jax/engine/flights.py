"""Dispatches under way, and what they tell the chooser of shapes once they are done."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from treespec_jax.engine.chooser import Choice, Chooser
from treespec_jax.engine.costs import Load
from treespec_jax.engine.expectation import rehearsed_tokens, tokens_by_shape
from treespec_jax.engine.plan import Plan
from treespec_jax.engine.state import Outbox
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
            mean = tokens[ran, index].mean(axis=0)
            observed.append((slot.request, mean, int(ran.sum())))
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
