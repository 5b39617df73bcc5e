"""Dispatches that the device has been given, in order, and how long each one takes."""

from __future__ import annotations

import collections
from typing import Any

from treespec_jax.engine.clock import SteadyClock
from treespec_jax.engine.costs import REHEARSAL, Load
from treespec_jax.engine.flights import BacklogLimits, Flight
from treespec_jax.engine.plan import Plan
from treespec_jax.engine.timing import Choice
from treespec_jax.trees.shapes import ROOT_ONLY


class UnderWay:
    """Dispatches under way, the oldest first; at most two.

    Args:
      executor: `executor.Executor`, or what stands in for it.
      backlog: what may wait for the drafter's model.
      clock: that times are taken by.
    """

    def __init__(self, executor: Any, backlog: BacklogLimits, clock: SteadyClock):
        self._executor, self._backlog, self._clock = executor, backlog, clock
        self._flights: collections.deque[Flight] = collections.deque()
        # When the latest one ended, and whether it followed another one at once.
        self._landed, self._followed = 0.0, False

    def __bool__(self) -> bool:
        return bool(self._flights)

    @property
    def oldest(self) -> Flight:
        """The one that ends first."""
        return self._flights[0]

    @property
    def choices(self) -> list[Choice]:
        """What each one does."""
        return [flight.choice for flight in self._flights]

    def clear(self) -> None:
        """Forgets them: what they would emit is lost."""
        self._flights.clear()
        self._landed = 0.0

    def launch(self, plan: Plan, choice: Choice, load: Load) -> None:
        """Starts a dispatch.

        Args:
          plan: of it.
          choice: that it follows.
          load: of its requests.

        Raises:
          Exception: what failed; it is not under way then.
        """
        compilations = self._executor.compilations
        began, compiled = self._clock.now(), sum(compilations.values())
        name = REHEARSAL if choice.rehearse else choice.shape
        plain = name == ROOT_ONLY
        due = self._backlog.is_due(plan, plain)
        apart = due and choice.shape != ROOT_ONLY
        if due:
            self._executor.catch_up(plan, wait=apart)
        # A pass over the backlog is part of a rehearsal's price, of no tree's.
        started = began if choice.rehearse else self._clock.now()
        outbox = self._executor.dispatch(plan, name)
        self._backlog.change(plan, plain, due)
        timed = sum(compilations.values()) == compiled
        for flight in self._flights:
            flight.timed &= timed and not apart
        timed &= not self._executor.background.busy and not (due and plain)
        self._flights.append(Flight(plan, choice, load, outbox, started, timed))

    def land(self) -> tuple[Flight, float | None]:
        """The oldest one has ended.

        Returns:
          it, and the seconds that it took, None if something else took some of them.
        """
        flight = self._flights.popleft()
        now = self._clock.now()
        seconds = now - max(flight.started, self._landed)
        # A dispatch that follows another one at once takes less of the host's time.
        follows, before = flight.started < self._landed, self._followed
        self._landed, self._followed = now, follows
        return flight, seconds if flight.timed and follows == before else None
