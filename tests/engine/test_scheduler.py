"""The scheduler against a pretended device: no jax runs here.

The device emits random numbers of tokens. After every operation pages, tables and
counts must be right; at the end every request has its tokens and all pages are free.
"""

from __future__ import annotations

import types

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from treespec_jax.cache.allocator import TRASH_PAGE
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.engine.request import Request
from treespec_jax.engine.scheduler import Scheduler

WIDTH, PAGE = 3, 8


class Device:
    """Emits the next numbers of each text, 1 to WIDTH per step."""

    def __init__(self, batch: int, seed: int):
        self.rng = np.random.default_rng(seed)
        self.lengths = np.zeros(batch, int)

    def prefill(self, chunk):
        assert chunk.start[0] in (0, self.lengths[chunk.slot])
        self.lengths[chunk.slot] = chunk.start[0] + chunk.count[0]

    def run(self, plan):
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
                    first = self.lengths[slot] + 1
                    tokens[step, slot, :count] = np.arange(first, first + count)
                    self.lengths[slot] += count
        ranks = np.zeros((steps, batch, WIDTH - 1), int)
        emission = types.SimpleNamespace(
            tokens=tokens,
            counts=counts,
            ranks=ranks,
            sources=ranks,
            logprobs=None,
            trees=None,
        )
        return types.SimpleNamespace(emission=emission, steps=steps)


def check(scheduler: Scheduler) -> None:
    """Every page has one holder or none, and stands in its holder's table."""
    held = []
    for index, slot in enumerate(scheduler._slots):
        row = scheduler._page_table[index]
        pages = [] if slot is None else slot.pages
        assert row[: len(pages)].tolist() == pages
        assert (row[len(pages) :] == TRASH_PAGE).all()
        held += pages
    assert len(set(held)) == len(held) == scheduler.num_pages - scheduler.free_pages
    assert all(scheduler._allocator.holders(page) == 1 for page in held)


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
    scheduler, device = Scheduler(config, (), WIDTH), Device(3, seed)
    requests = []
    for _ in range(8):
        prompt = rng.integers(1, 20)
        # The token at a position is its number, wherever a text begins again.
        params = SamplingParams(max_tokens=int(rng.integers(1, 30)), ignore_eos=True)
        request = Request(list(range(prompt)), params)
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
                    device.prefill(chunk)
                    scheduler.fed(chunk, 0.0)
                if scheduler.ready:
                    break
            plan, _ = scheduler.plan()
        else:
            plan = scheduler.plan_ahead() if ahead and len(flights) < 2 else None
        if plan is not None:
            flights.append((plan, device.run(plan)))
        check(scheduler)
        if flights and (len(flights) == 2 or rng.random() < 0.7):
            scheduler.file(*flights.pop(0), nodes=WIDTH - 1)
            check(scheduler)
    assert scheduler.free_pages == num_pages
    for request in requests:
        first = len(request.prompt)
        want = min(request.params.max_tokens, num_pages * PAGE + 1 - first)
        count = len(request.tokens)
        assert request.tokens == list(range(first, first + count))
        assert request in cancelled or count == max(0, want)


def test_a_value_that_no_array_holds_takes_no_page():
    """Admission fails, and everything is as before."""
    scheduler = Scheduler(EngineConfig(max_batch=1, max_len=16, page_size=8), (), 1)
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
