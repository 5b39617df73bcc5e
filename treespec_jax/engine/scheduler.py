"""Who runs when and in which pages: the host's half of the engine; free of jax.

Contract:

- `admit` gives waiting requests a slot and pages for their text; `chunks` cuts the
  texts of new slots into pieces to prefill, one per slot and turn, so that a long
  prompt takes turns with the decoding of the others; `plan` reserves pages for a
  dispatch and says what runs in it, as NumPy arrays that nobody changes afterwards;
  `file` enters what the dispatch emitted.
- Lengths are absolute: a slot runs while it holds fewer than `limits` tokens and its
  text has not ended. The device knows both, so that a dispatch can be planned before
  the results of the last one are in (`ahead`).
- Pages are reference-counted and belong to a slot from `admit` to its release. A text
  that begins like another one shares its full pages, even those of texts that ended,
  until they are handed out again. A slot that finds no page makes the youngest request
  wait again: its pages are freed, and its tokens are computed anew once there is room.
  Only a request that could not run alone ends with "length".
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from treespec_jax.cache.prefixes import HeldPages
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.engine.clock import SteadyClock, Stopwatch
from treespec_jax.engine.filing import enter, enter_prompt
from treespec_jax.engine.page_tables import PageTables
from treespec_jax.engine.plan import (
    NOTHING_DRAFTED,
    ChunkPlan,
    DraftCache,
    ForkPlan,
    Plan,
    Slot,
    chunk_of,
    prefill_plan,
)
from treespec_jax.engine.request import Request
from treespec_jax.engine.slots import SlotSettings
from treespec_jax.errors import UserError


class Scheduler:
    """Slots, queue and page tables.

    Args:
      config: fixed sizes.
      eos_ids: tokens that end a text, unless a request ignores them.
      width: C + 1, tokens that a step may emit.
      vocab_size: V.
      drafted: what the drafter keeps by page.

    Attributes:
      pages: of the slots.
      clock: that times are taken by.
    """

    def __init__(
        self,
        config: EngineConfig,
        eos_ids: Sequence[int],
        width: int,
        vocab_size: int,
        drafted: DraftCache = NOTHING_DRAFTED,
    ):
        self.config = config
        self._drafted = drafted
        self._width = width
        self.clock = SteadyClock()
        self._eos_ids = tuple(eos_ids)
        self.pages = PageTables(config, drafted)
        self._slots: list[Slot | None] = [None] * config.max_batch
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._arrivals = itertools.count()
        self._settings = SlotSettings(
            config.max_batch, config.max_len, eos_ids, vocab_size
        )

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting) or any(self._slots)

    @property
    def ready(self) -> bool:
        """Whether any request can decode."""
        return any(slot.ready for slot in self._occupied().values())

    @property
    def unread(self) -> tuple[int, bool]:
        """Requests without a slot, and whether one in a slot cannot decode yet."""
        filling = any(not slot.ready for slot in self._occupied().values())
        return len(self._waiting), filling

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return self.pages.allocator.num_pages

    @property
    def free_pages(self) -> int:
        """Pages that belong to no request."""
        return self.pages.allocator.free

    def submit(self, request: Request) -> None:
        """Queues a request, whose prompt has room for a new token."""
        request.stats.prompt_tokens = len(request.prompt)
        request.submitted = request.submitted or time.perf_counter()
        self._waiting.append((next(self._arrivals), request))

    def cancel(self, request: Request, finish_reason: str = "stop") -> None:
        """Ends a request where it stands and frees its slot."""
        for entry in self._waiting:
            if entry[1] is request:
                self._waiting.remove(entry)
                break
        for index, slot in self._occupied().items():
            if slot.request is request:
                self._release(index)
        request.finish_reason = request.finish_reason or finish_reason

    def end_late(self) -> list[Request]:
        """Ends the requests whose time is over, and returns them."""
        now = time.perf_counter()
        waiting = [request for _, request in self._waiting]
        late = [r for r in (*waiting, *self.running()) if r.late(now)]
        for request in late:
            self.cancel(request, "time")
            request.stats.bound_by += ("max_time",)
        return late

    def running(self, slots: Iterable[int] | None = None) -> list[Request]:
        """Requests in slots: in these, or in all."""
        occupied = self._occupied()
        indices = occupied if slots is None else set(slots) & set(occupied)
        return [occupied[index].request for index in indices]

    def admit(self) -> list[Request]:
        """Gives waiting requests free slots, in order; returns those that never fit.

        A request that cannot enter its slot, whatever the error, ends with "error" and
        holds nothing. The next call goes on with the others.
        """
        refused = []
        for index in range(self.config.max_batch):
            while self._slots[index] is None and self._waiting:
                order, request = self._waiting[0]
                text = [*request.prompt, *request.tokens]
                # The newest rows are computed in any case: the drafter needs them. All
                # are, where the target has to say what it thinks of the prompt.
                rows = 0 if request.scoring else len(text) - 2
                digests = self.pages.prefixes.digests(text, rows)
                found = self.pages.prefixes.find(digests)
                needed = self.pages.missing(len(text), found)
                # A request that had to wait again leaves the others a page each, or it
                # would soon have to wait once more.
                running = self._occupied()
                spare = len(running) if request.tokens else 0
                never = self.pages.count(len(text)) > self.pages.allocator.num_pages
                if never or (not running and needed > self.pages.allocator.free):
                    self._waiting.popleft()
                    request.finish_reason = "length"
                    refused.append(request)
                    continue
                if running and needed + spare > self.pages.allocator.free:
                    return refused
                if self._soon_there(digests[len(found.pages) :]):
                    return refused
                try:
                    slot = self._slot(order, request, text, digests)
                    self._begin(index, slot, found)
                except Exception:
                    self.cancel(request, "error")
                    raise
                self._waiting.popleft()
        return refused

    def fork(
        self, request: Request, params: SamplingParams
    ) -> tuple[Request, ForkPlan]:
        """A request that goes on from where another one stands, and what to copy.

        It shares the full pages and gets pages of its own for the rows that may still
        be written.

        Args:
          request: that decodes; no dispatch is under way.
          params: of the new one.

        Raises:
          UserError: no slot or too few pages are free, or `request` does not decode.
        """
        running = self._occupied()
        source = next((i for i in running if running[i].request is request), None)
        if source is None or not running[source].ready:
            raise UserError("only a request that decodes can be forked")
        free = [i for i in range(self.config.max_batch) if i not in running]
        if not free:
            raise UserError(
                f"all {self.config.max_batch} slots are taken; raise max_batch"
            )
        old, (destination, *_) = running[source], free
        shared = old.complete // self.config.page_size
        needed = self.pages.count(old.length)
        if needed - shared > self.free_pages:
            raise UserError(
                f"a fork needs {needed - shared} pages, {self.free_pages} are free; "
                "raise num_pages"
            )
        new = dataclasses.replace(
            old,
            request=request.forked(params),
            order=next(self._arrivals),
            chunks=collections.deque(),
            held=HeldPages(),
            watch=Stopwatch(self.clock),
            complete=shared * self.config.page_size,
        )
        new.limit = self._limit(new.request)
        self._insert(destination, new, old.pages[:shared], needed)
        new.held.digests = old.held.digests[:shared]
        copied = zip(old.pages[shared:], new.pages[shared:], strict=False)
        return new.request, ForkPlan([(source, destination)], list(copied))

    def hand_over(self, request: Request) -> tuple[int, list[int]]:
        """Ends a request that could decode; its slot and pages are the caller's.

        The slot counts as free, so nothing may be submitted before the caller is done.

        Raises:
          UserError: it has not come into a slot, for want of pages.
        """
        for index, slot in self._occupied().items():
            if slot.request is request and slot.ready:
                pages, slot.held = slot.pages, HeldPages()
                self._release(index)
                return index, pages
        raise UserError(
            f"{self.free_pages} free pages are too few for all prompts at once; "
            "raise num_pages or give fewer prompts"
        )

    def chunks(self) -> list[ChunkPlan]:
        """The next piece of every text that is not in the cache yet."""
        return [
            self._chunk(index, slot)
            for index, slot in self._occupied().items()
            if not slot.ready
        ]

    def fed(self, chunk: ChunkPlan, seconds: float, scores: Any = None) -> None:
        """A chunk is in the cache; it took so long, and may have `PromptScores`."""
        slot = self._slots[chunk.slot]
        slot.chunks.popleft()
        if scores is not None:
            enter_prompt(slot.request, scores, int(chunk.start[0]), int(chunk.count[0]))
        slot.request.stats.prefill_seconds += seconds
        rows = int(chunk.start[0] + chunk.count[0])
        # Rows that depend on the next token are written anew once that is decided.
        self.pages.complete(slot, rows - self._drafted.next_tokens)
        slot.watch.lap(slot.request.stats)

    def plan(self, max_steps: int | None = None) -> tuple[Plan | None, list[Request]]:
        """Reserves pages for the next dispatch, once all results are in.

        Args:
          max_steps: steps to run at most; None: the compiled number.

        Returns:
          The plan, None if nobody can run; and requests that ended because not even
          all pages are enough for them.
        """
        steps = self._steps(max_steps)
        ended: list[Request] = []
        while not self._reserve(steps):
            running = self._occupied()
            index = max(running, key=lambda i: running[i].order)
            if len(running) == 1:
                request = running[index].request
                request.finish_reason = "length"
                ended.append(request)
                self._release(index)
            else:
                self._wait_again(index)
        return self._planned(steps), ended

    def plan_ahead(self, max_steps: int | None = None) -> Plan | None:
        """Plans a dispatch while another one is under way.

        None where what that one emits may decide who runs next (a request waits or is
        being prefilled, has stop texts or penalties), where every request will have
        ended, or where there are not pages enough for all.
        """
        running = self._occupied()
        open_ended = any(
            not slot.ready or slot.request.params.stop or slot.request.penalised
            for slot in running.values()
        )
        if self._waiting or open_ended:
            return None
        steps = self._steps(max_steps)
        # A step emits a token at least.
        least = [slot.length + slot.planned // self._width for slot in running.values()]
        pairs = zip(least, running.values(), strict=True)
        if not any(length < slot.limit for length, slot in pairs):
            return None
        missing = sum(
            max(0, self.pages.count(self._reach(slot, steps)) - len(slot.pages))
            for slot in running.values()
        )
        if missing > self.pages.allocator.free:
            return None
        self._reserve(steps)
        return self._planned(steps)

    def file(self, plan: Plan, outbox: Any, nodes: int) -> list[Request]:
        """Enters what a dispatch emitted.

        Args:
          plan: of the dispatch.
          outbox: `engine.state.Outbox` of NumPy arrays.
          nodes: drafted by each step.

        Returns:
          Requests that emitted something.
        """
        self.abandon(plan)
        touched = []
        for index, slot in plan.slots.items():
            # Whoever was cancelled meanwhile gets nothing.
            if self._slots[index] is slot:
                self._file(index, slot, outbox, nodes)
                touched.append(slot.request)
        return touched

    def abandon(self, plan: Plan) -> None:
        """Takes back what a plan counted on: it is filed, or was never started."""
        for slot in plan.slots.values():
            slot.planned -= int(plan.max_steps) * self._width

    def forget_prefixes(self) -> None:
        """The caches are emptied: no page can be found any more."""
        self.pages.allocator.forget_names()

    def _occupied(self) -> dict[int, Slot]:
        return {i: slot for i, slot in enumerate(self._slots) if slot is not None}

    def _steps(self, max_steps: int | None) -> int:
        bound = self.config.steps_per_dispatch
        return bound if max_steps is None else min(max_steps, bound)

    def _reach(self, slot: Slot, steps: int) -> int:
        return min(slot.limit, slot.bound + steps * self._width)

    def _soon_there(self, digests: Sequence[bytes]) -> bool:
        """Whether another slot is about to fill the first of these pages."""
        filling = (slot for slot in self._occupied().values() if not slot.ready)
        return any(digests[0] in slot.digests for slot in filling) if digests else False

    def _slot(
        self, order: int, request: Request, text: list[int], digests: list[bytes]
    ) -> Slot:
        """A slot that holds nothing yet."""
        return Slot(
            request,
            order,
            text,
            chunks=collections.deque(),
            held=HeldPages(),
            digests=digests,
            cached=0,
            length=len(text) - 1,
            limit=self._limit(request),
            watch=Stopwatch(self.clock),
        )

    def _limit(self, request: Request) -> int:
        """Tokens that a request will hold in the cache in the end."""
        prompt = len(request.prompt)
        emitted = min(request.params.max_tokens, self.config.max_len - prompt)
        return prompt - 1 + emitted

    def _insert(
        self, index: int, slot: Slot, shared: Sequence[int], pages: int
    ) -> None:
        """Gives a slot its pages, of which it shares the first."""
        # From here on `_release` gives back all that the slot holds.
        self._slots[index] = slot
        try:
            self._settings.insert(index, slot.request.params)
            self.pages.share(index, slot, shared)
            self.pages.hold(index, slot, pages)
        except BaseException:
            self._release(index)
            raise

    def _begin(self, index: int, slot: Slot, found: HeldPages) -> None:
        """A text enters a slot; the pages found hold the beginning of it."""
        self._insert(index, slot, found.pages, self.pages.count(len(slot.text)))
        slot.held.digests = found.digests
        slot.request.stats.prefix_hits += bool(found.pages)
        sizes = self.config.prefill_chunks
        cached = len(found.pages) * self.config.page_size
        slot.cached = slot.complete = cached
        if cached and self._drafted.hears_all:
            slot.chunks += prefill_plan(cached, sizes[-1:])
        for start, size, count in prefill_plan(len(slot.text) - 1 - cached, sizes):
            slot.chunks.append((cached + start, size, count))

    def _chunk(self, index: int, slot: Slot) -> ChunkPlan:
        table = self.pages.table[index : index + 1].copy()
        top = self._settings.prompt_top(slot.request)
        return chunk_of(index, slot, table, top)

    def _reserve(self, steps: int) -> bool:
        """Reserves pages, for the oldest first; whether everybody can go on."""
        enough = True
        ready = [item for item in self._occupied().items() if item[1].ready]
        for index, slot in sorted(ready, key=lambda item: item[1].order):
            self.pages.hold(index, slot, self.pages.count(self._reach(slot, steps)))
            enough &= len(slot.pages) * self.config.page_size > slot.bound
        return enough

    def idle_plan(self) -> Plan:
        """A dispatch in which nobody runs, for the shapes of its arrays."""
        return self._plan_of({}, self.config.steps_per_dispatch)

    def preview(self) -> Plan:
        """Who would run now, and by arrays of which shapes; nothing is reserved."""
        return self._planned(0) or self.idle_plan()

    def _planned(self, steps: int) -> Plan | None:
        ready = {i: slot for i, slot in self._occupied().items() if slot.ready}
        return self._plan_of(ready, steps) if ready else None

    def _plan_of(self, ready: Mapping[int, Slot], steps: int) -> Plan:
        limits_B = np.zeros(self.config.max_batch, np.int32)
        for index, slot in ready.items():
            room = len(slot.pages) * self.config.page_size
            limits_B[index] = min(slot.limit, room)
        penalised = any(slot.request.penalised for slot in ready.values())
        texts = {i: (s.request.prompt, s.request.tokens) for i, s in ready.items()}
        settings = self._settings
        if len(ready) < len(self._occupied()):
            settings = settings.running(ready)
        plan = Plan(
            page_table=self.pages.table.copy(),
            limits=limits_B,
            eos=settings.eos,
            # A record has them, whether or not the request asked.
            want_logprobs=settings.want_logprobs | self.config.record,
            speculate=settings.speculate,
            sampling=settings.sampling(),
            text=settings.text(texts) if penalised else None,
            top=settings.top,
            max_steps=np.array(steps, np.int32),
            slots=ready,
            adaptive=settings.adaptive(),
        )
        for slot in ready.values():
            slot.planned += steps * self._width
        return plan

    def _file(self, index: int, slot: Slot, outbox, nodes: int) -> None:
        request = slot.request
        arrived = enter(request, outbox, index, nodes)
        slot.length += arrived
        self.pages.complete(slot, slot.length - self._drafted.trails)
        request.stats.decode_seconds += slot.watch.lap(request.stats)
        if arrived:
            seconds = time.perf_counter() - request.submitted
            request.arrivals.append((seconds, arrived))
        ends = () if request.params.ignore_eos else self._eos_ids
        if request.tokens and request.tokens[-1] in ends:
            request.finish_reason = "stop"
        elif slot.length >= slot.limit:
            request.finish_reason = "length"
        if request.finish_reason:
            self._release(index)

    def _wait_again(self, index: int) -> None:
        slot = self._slots[index]
        self._release(index)
        slot.request.stats.restarts += 1
        self._waiting.appendleft((slot.order, slot.request))

    def _release(self, index: int) -> None:
        self.pages.release(index, self._slots[index])
        self._settings.clear(index)
        self._slots[index] = None
