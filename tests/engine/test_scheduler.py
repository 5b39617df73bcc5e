"""The scheduler against a pretended device: no jax runs here.

The device emits random numbers of tokens, and remembers what is in which page. After
every operation pages, tables and counts must be right; at the end every request has its
tokens and all pages are free.
"""

from __future__ import annotations

import collections
import types

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from treespec_jax.cache.allocator import TRASH_PAGE
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.engine.plan import DraftCache
from treespec_jax.engine.request import Request
from treespec_jax.engine.scheduler import Scheduler

WIDTH, PAGE, HEARS_ALL = 3, 8, True


class Device:
    """Emits the next numbers of each text, 1 to WIDTH per step.

    Args:
      batch: slots.
      pages: in all.
      seed: of the numbers of tokens.
    """

    def __init__(self, batch: int, pages: int, seed: int):
        self.rng = np.random.default_rng(seed)
        self.lengths = np.zeros(batch, int)
        # What a text's token at position 0 would be: others count up from it.
        self.bases = np.zeros(batch, int)
        self.pages = np.full((pages + 1, PAGE), -1)
        self.shared = 0

    def prefill(self, chunk, scheduler):
        (start,), (count,) = chunk.start, chunk.count
        first = scheduler._slots[chunk.slot].cached
        base = self.bases[chunk.slot] = chunk.root[0] - start - count
        rows = np.arange(start, start + count)
        np.testing.assert_array_equal(chunk.tokens[0, :count], base + rows)
        if start == (0 if HEARS_ALL else first):
            before = np.arange(first)
            np.testing.assert_array_equal(
                self._rows(chunk.page_table[0], before), base + before
            )
            self.shared += first
        else:
            assert chunk.start[0] == self.lengths[chunk.slot]
        if not chunk.cached:
            self._write(scheduler, chunk.page_table[0], rows, base)
        self.lengths[chunk.slot] = start + count

    def _rows(self, table, rows):
        return self.pages[table[rows // PAGE], rows % PAGE]

    def _write(self, scheduler, table, rows, base):
        for page in np.unique(table[rows // PAGE]):
            assert scheduler.pages.allocator.holders(page) == 1, (
                "a shared page is written"
            )
        self.pages[table[rows // PAGE], rows % PAGE] = base + rows

    def run(self, plan, scheduler):
        steps = int(plan.max_steps)
        batch = len(self.lengths)
        counts = np.zeros((steps, batch), int)
        tokens = np.zeros((steps, batch, WIDTH), int)
        for step in range(steps):
            for slot in range(batch):
                room = plan.limits[slot] - self.lengths[slot]
                if room > 0:
                    count = min(room, self.rng.integers(1, WIDTH + 1))
                    counts[step, slot] = count
                    rows = np.arange(self.lengths[slot], self.lengths[slot] + count)
                    base = self.bases[slot]
                    tokens[step, slot, :count] = base + rows + 1
                    self._write(scheduler, plan.page_table[slot], rows, base)
                    self.lengths[slot] += count
        ranks = np.zeros((steps, batch, WIDTH - 1), int)
        emission = types.SimpleNamespace(
            tokens=tokens,
            counts=counts,
            ranks=ranks,
            sources=ranks,
            logprobs=None,
            top=None,
            trees=None,
        )
        return types.SimpleNamespace(emission=emission, steps=steps)


def check(scheduler: Scheduler) -> None:
    """Holders are counted, and a page stands in the tables of its holders alone."""
    held = []
    for index, slot in enumerate(scheduler._slots):
        row = scheduler.pages.table[index]
        pages = [] if slot is None else slot.pages
        assert row[: len(pages)].tolist() == pages
        assert (row[len(pages) :] == TRASH_PAGE).all()
        held += pages
    holders = collections.Counter(held)
    assert len(holders) == scheduler.num_pages - scheduler.free_pages
    for page in range(1, scheduler.num_pages + 1):
        assert scheduler.pages.allocator.holders(page) == holders[page]


# Without shrinking: an example says enough, and one that never ends is slow.
@settings(deadline=None, derandomize=True, max_examples=60, phases=[Phase.generate])
@given(st.integers(0, 10**6), st.integers(3, 12), st.booleans())
def test_every_request_gets_its_tokens(seed, num_pages, ahead):
    """With pages for one text or more; some are cancelled, some come late."""
    rng = np.random.default_rng(seed)
    config = EngineConfig(
        max_batch=3,
        max_len=64,
        page_size=PAGE,
        num_pages=num_pages,
        steps_per_dispatch=2,
        prefill_chunks=(4, 8),
    )
    drafted = DraftCache(trails=WIDTH, in_pages=True, hears_all=HEARS_ALL)
    scheduler = Scheduler(config, (), WIDTH, 97, drafted)
    device = Device(3, num_pages, seed)
    requests = []
    for _ in range(8):
        first, prompt = 100 * rng.integers(2), rng.integers(1, 20)
        # The token at a position is known, wherever a text begins again.
        params = SamplingParams(max_tokens=int(rng.integers(1, 30)), ignore_eos=True)
        request = Request(list(range(first, first + prompt)), params)
        request.stats.emitted_counts = [0] * (WIDTH + 1)
        requests.append(request)
    waiting, flights, cancelled = list(requests), [], []
    turns = 0
    while scheduler.busy or waiting or flights:
        turns += 1
        assert turns < 1000, "somebody never ends"
        if waiting and rng.random() < 0.4:
            scheduler.submit(waiting.pop(0))
        if rng.random() < 0.05 and len(cancelled) < 2:
            victim = requests[rng.integers(len(requests))]
            if victim not in waiting and victim.finish_reason is None:
                scheduler.cancel(victim)
                cancelled.append(victim)
        if not flights:
            scheduler.admit()
            while chunks := scheduler.chunks():
                for chunk in chunks:
                    device.prefill(chunk, scheduler)
                    scheduler.fed(chunk, 0.0)
                if scheduler.ready:
                    break
                scheduler.admit()
            plan, _ = scheduler.plan()
        else:
            plan = scheduler.plan_ahead() if ahead and len(flights) < 2 else None
        if plan is not None:
            flights.append((plan, device.run(plan, scheduler)))
        check(scheduler)
        if flights and (len(flights) == 2 or rng.random() < 0.7):
            scheduler.file(*flights.pop(0), nodes=WIDTH - 1)
            check(scheduler)
    assert scheduler.free_pages == num_pages
    stats = [request.stats for request in requests]
    assert device.shared == PAGE * sum(s.shared_pages for s in stats)
    assert scheduler.pages.allocator.evictions == sum(s.evictions for s in stats)
    for request in requests:
        prompt, first = len(request.prompt), request.prompt[-1] + 1
        want = min(request.params.max_tokens, num_pages * PAGE + 1 - prompt)
        count = len(request.tokens)
        assert request.tokens == list(range(first, first + count))
        assert request in cancelled or count == max(0, want)


def test_a_value_that_no_array_holds_takes_no_page():
    """Admission fails, and everything is as before."""
    scheduler = Scheduler(EngineConfig(max_batch=1, max_len=16, page_size=8), (), 1, 97)
    params = SamplingParams(temperature=0.5)
    # Settings refuse it; what else may go wrong here must lose no page either.
    object.__setattr__(params, "top_k", 2**31)
    bad = Request([1], params)
    scheduler.submit(bad)
    with pytest.raises(OverflowError):
        scheduler.admit()
    check(scheduler)
    assert scheduler.free_pages == scheduler.num_pages
    assert bad.finish_reason == "error" and not scheduler.busy
    good = Request([1], SamplingParams(max_tokens=1))
    scheduler.submit(good)
    scheduler.admit()
    for chunk in scheduler.chunks():
        scheduler.fed(chunk, 0.0)
    plan, _ = scheduler.plan()
    assert not plan.sampling["temperature"].any() and plan.limits[0] == 1
