"""Beam searches that share a batch: slots, pages and passes; free of jax.

A prompt is prefilled as any other request; then its slot and pages are the search's.
Beams of one prompt share the full pages of what they have in common, and each has pages
of its own from the one on that it writes next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from treespec_jax.cache.allocator import TRASH_PAGE
from treespec_jax.engine import beams as beaming
from treespec_jax.engine.beams import Beam, BeamParams, BeamSearch, Hypothesis, Seen
from treespec_jax.engine.plan import ForkPlan, MovePlan
from treespec_jax.engine.request import Request
from treespec_jax.engine.scheduler import Scheduler
from treespec_jax.errors import UserError
from treespec_jax.trees.shapes import TreeShape


@dataclasses.dataclass(frozen=True)
class Found:
    """What the search from a prompt gave.

    Attributes:
      hypotheses: K at most, best first.
      request: whose stats count passes as steps and levels as tokens.
    """

    hypotheses: list[Hypothesis]
    request: Request


@dataclasses.dataclass
class _Prompt:
    """A search under way."""

    request: Request
    search: BeamSearch
    beams: list[Beam]
    limit: int


@dataclasses.dataclass
class _Held:
    """A slot with a beam.

    Attributes:
      length: tokens in the cache.
      pages: in order.
    """

    length: int
    pages: list[int]


class GroupSearch:
    """Searches from a few prompts, all beams of which have slots.

    Args:
      params: how to search.
      scheduler: whose slots and pages it takes; nobody else has any.
      device: runs the plans; `executor.Executor`.
      shape: of the trees that the device grows.
    """

    def __init__(
        self,
        params: BeamParams,
        scheduler: Scheduler,
        device: Any,
        shape: TreeShape,
    ):
        self._params = params
        self._scheduler, self._device = scheduler, device
        self._pages, self._config = scheduler.pages, scheduler.config
        self._width = shape.depth + 1
        self._nodes = shape.num_nodes - 1
        self._held: dict[int, _Held] = {}

    def run(
        self,
        requests: Sequence[Request],
        submit: Callable[[Request], None],
        prefill: Callable[[], Any],
        eos_ids: Collection[int],
    ) -> list[Found]:
        """Searches to the end; nothing is held afterwards, whatever fails.

        Args:
          requests: prompts, and as many tokens as the parameters say.
          submit: queues a request in the scheduler.
          prefill: takes in some of what waits there.
          eos_ids: tokens that end a text.

        Raises:
          UserError: more beams than slots, or too few pages.
        """
        slots, needed = self._config.max_batch, len(requests) * self._params.beams
        if needed > slots:
            raise UserError(
                f"beams={self._params.beams} of {len(requests)} prompts take {needed} "
                f"slots; raise max_batch={slots}"
            )
        try:
            for request in requests:
                submit(request)
            self._fill(prefill)
            prompts = [self._begin(request, eos_ids) for request in requests]
            for prompt in prompts:
                held = self._held[prompt.beams[0].slot]
                reach = self._reach(held.length, prompt.limit)
                self._take(held.pages, self._pages.count(reach))
            count = beaming.told(self._params.beams, eos_ids)
            while any(prompt.beams for prompt in prompts):
                self._pass(prompts, count)
        finally:
            for request in requests:
                self._scheduler.cancel(request)
            for slot in list(self._held):
                self._release(slot)
        return [Found(p.search.finished, p.request) for p in prompts]

    def _fill(self, prefill) -> None:
        """Prefills all that has room."""
        goes_on = True
        while goes_on:
            waiting, filling = self._scheduler.unread
            prefill()
            waiting_now, filling_now = self._scheduler.unread
            # Some may wait for what others have just put into the cache.
            goes_on = filling or filling_now or waiting_now < waiting

    def _begin(self, request: Request, eos_ids) -> _Prompt:
        """The first beam of a prompt, in the slot where that was prefilled."""
        slot, pages = self._scheduler.hand_over(request)
        length = len(request.prompt) - 1
        self._held[slot] = _Held(length, pages)
        room = self._config.max_len - len(request.prompt)
        tokens = min(self._params.max_tokens, room)
        params = dataclasses.replace(self._params, max_tokens=tokens)
        search = BeamSearch(params, eos_ids)
        return _Prompt(request, search, [Beam(slot)], length + tokens)

    def _pass(self, prompts: Sequence[_Prompt], count: int) -> None:
        """A pass of the target, and all levels that it gives."""
        idle = self._scheduler.idle_plan()
        limits = np.zeros_like(idle.limits)
        for prompt in prompts:
            limits[[beam.slot for beam in prompt.beams]] = prompt.limit
        plan = dataclasses.replace(idle, page_table=self._table(), limits=limits)
        began = self._scheduler.clock.now()
        seen = Seen(**vars(self._device.look(plan, count)))
        searching = [prompt for prompt in prompts if prompt.beams]
        for prompt in searching:
            stats, before = prompt.request.stats, prompt.search.length
            stats.steps += 1
            stats.drafted += self._nodes * len(prompt.beams)
            prompt.beams = beaming.walk(prompt.search, prompt.beams, seen)
            levels = prompt.search.length - before
            stats.tokens += levels
            stats.emitted_counts[levels] += 1
        if any(prompt.beams for prompt in prompts):
            self._device.go(self._move(prompts))
        spent = self._scheduler.clock.now() - began
        for prompt in searching:
            prompt.request.stats.decode_seconds += spent

    def _move(self, prompts: Sequence[_Prompt]) -> MovePlan:
        """Gives every new beam a slot and pages."""
        size = self._config.max_batch
        moving = [(beam, p.limit) for p in prompts for beam in p.beams]
        origins = {beam.slot for beam, _ in moving}
        for slot in set(self._held) - origins:
            self._release(slot)
        slots = beaming.placed([beam for beam, _ in moving], size)
        path, emitted = np.zeros((2, size, self._width), np.int32)
        origin, counts = np.arange(size, dtype=np.int32), np.zeros(size, np.int32)
        fork = ForkPlan([], [])
        before = {slot: held.length for slot, held in self._held.items()}
        for (beam, limit), slot in zip(moving, slots, strict=True):
            length = before[beam.slot]
            if slot != beam.slot:
                self._fork(beam.slot, slot, length, fork)
            held, count = self._held[slot], len(beam.path)
            held.length = length + count
            self._take(held.pages, self._pages.count(self._reach(held.length, limit)))
            origin[slot], counts[slot] = beam.slot, count
            path[slot, :count], emitted[slot, :count] = beam.path, beam.emitted
        for prompt in prompts:
            prompt.beams = [Beam(slots.pop(0)) for _ in prompt.beams]
        return MovePlan(origin, path, emitted, counts, self._table(), fork)

    def _fork(self, source: int, slot: int, length: int, fork: ForkPlan) -> None:
        """A slot shares the full pages of another and copies the one after them.

        That page may be empty for the target; a drafter may have the root's row there.
        """
        pages = self._held[source].pages
        full = length // self._config.page_size
        held = _Held(length, [])
        self._held[slot] = held
        self._pages.allocator.share(pages[:full], held.pages)
        self._take(held.pages, full + 1)
        fork.slots.append((source, slot))
        fork.pages.append((pages[full], held.pages[full]))

    def _reach(self, length: int, limit: int) -> int:
        """Rows that the next pass may write, of this one's drafter too."""
        return min(limit, length + self._width)

    def _take(self, pages: list[int], count: int) -> None:
        allocator, missing = self._pages.allocator, count - len(pages)
        if missing > allocator.free:
            raise UserError(
                f"a beam needs {missing} more pages, {allocator.free} of "
                f"{allocator.num_pages} are free; raise num_pages or lower beams"
            )
        allocator.take(max(0, missing), pages)

    def _release(self, slot: int) -> None:
        pages = self._held.pop(slot).pages
        self._pages.allocator.give_back(pages)

    def _table(self) -> np.ndarray:
        """int32 [B, max_pages]."""
        table = np.full_like(self._pages.table, TRASH_PAGE)
        for slot, held in self._held.items():
            table[slot, : len(held.pages)] = held.pages
        return table
