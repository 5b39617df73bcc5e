"""What a slot holds goes with its request: settings, ends, pages; no jax runs here."""

from __future__ import annotations

import copy
import dataclasses
import types

import numpy as np
import pytest

from treespec_jax.cache.allocator import TRASH_PAGE, PageAllocator
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.engine import filing
from treespec_jax.engine import scheduler as scheduling
from treespec_jax.engine.request import Request
from treespec_jax.engine.scheduler import Scheduler
from treespec_jax.engine.slots import SlotSettings

CONFIG = EngineConfig(
    max_batch=2, max_len=64, page_size=8, steps_per_dispatch=2, prefill_chunks=(8,)
)
ENDS = (7, 9)
# Asks for everything that a slot can hold.
GREEDY = {
    "max_tokens": 8,
    "logprobs": 3,
    "min_tokens": 2,
    "bad_words": ((4,), (5, 6)),
    "allowed_token_ids": tuple(range(50)),
    "logits_processors": max,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "logit_bias": {3: 1.5, 8: -4.0},
}
EVERYTHING = SamplingParams(
    **GREEDY, temperature=0.7, top_k=5, top_p=0.8, min_p=0.1, seed=3, speculate=False
)


def arrays(settings: SlotSettings) -> dict[str, np.ndarray]:
    """All arrays of the settings, by name."""
    found = {}
    for name, value in vars(settings).items():
        values = value if isinstance(value, dict) else {"": value}
        found |= {
            f"{name} {key}": item
            for key, item in values.items()
            if isinstance(item, np.ndarray)
        }
    return found


def test_a_cleared_slot_is_as_new():
    """In every array there is; a request that asks for all of them changed each.

    No program is compiled for what nobody asks for any more.
    """
    settings = SlotSettings(3, 16, ENDS, 97)
    new = copy.deepcopy(arrays(settings))
    assert len(new) >= 10
    settings.insert(1, EVERYTHING)
    for name, value in arrays(settings).items():
        assert (value[1] != new[name][1]).any(), name
        np.testing.assert_array_equal(value[::2], new[name][::2], name)
    settings.clear(1)
    for name, value in arrays(settings).items():
        np.testing.assert_array_equal(value, new[name], name)
    text = settings.text({0: ([1], [2])})
    parts = ("repeats", "masks", "bad_words", "processors")
    assert not settings.top and all(text[name] is None for name in parts)


def test_settings_of_what_runs_leave_the_others_out():
    settings = SlotSettings(3, 16, ENDS, 97)
    settings.insert(0, EVERYTHING)
    settings.insert(2, EVERYTHING)
    alone = SlotSettings(3, 16, ENDS, 97)
    alone.insert(2, EVERYTHING)
    running, before = settings.running([2]), copy.deepcopy(arrays(settings))
    for name, value in arrays(alone).items():
        np.testing.assert_array_equal(arrays(running)[name], value, name)
        np.testing.assert_array_equal(arrays(settings)[name], before[name], name)


def prefill(scheduler: Scheduler, turns: int = 100) -> None:
    scheduler.admit()
    for _ in range(turns):
        for chunk in scheduler.chunks():
            scheduler.fed(chunk, 0.0)


def values(plan) -> dict[str, np.ndarray]:
    """A plan's arrays by name."""
    found = dataclasses.asdict(dataclasses.replace(plan, slots={}))
    text = found.pop("text") or {}
    for part in [name for name, value in text.items() if isinstance(value, dict)]:
        text |= text.pop(part)
    return {**found.pop("sampling"), **text, **found}


@pytest.mark.parametrize("end", ["cancelled", "paused"])
def test_a_slot_taken_over_keeps_nothing(end):
    """A plan is that of a scheduler in which the predecessor never was."""
    used, fresh = Scheduler(CONFIG, ENDS, 1, 97), Scheduler(CONFIG, ENDS, 1, 97)
    first = Request(list(range(30)), EVERYTHING)
    used.submit(first)
    prefill(used)
    used.plan()
    if end == "paused":
        used._wait_again(0)
        assert not used.running() and used.busy
        used._waiting.clear()
    else:
        used.cancel(first)
    assert used.free_pages == used.num_pages
    for scheduler in (used, fresh):
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        scheduler.submit(Request([1, 2, 3], params))
        prefill(scheduler)
    plans = [values(scheduler.plan()[0]) for scheduler in (used, fresh)]
    tables = [plan.pop("page_table") for plan in plans]
    for name in plans[1]:
        np.testing.assert_array_equal(plans[0][name], plans[1][name], name)
    # Other pages, but as many.
    np.testing.assert_array_equal(*(table == TRASH_PAGE for table in tables))
    assert not plans[0]["temperature"].any() and (plans[0]["eos"] == -1).all()


def test_a_text_under_prefill_leaves_the_shortcuts_to_the_others():
    """It asks for everything, and a greedy text runs as if it were alone."""
    both, alone = Scheduler(CONFIG, ENDS, 1, 97), Scheduler(CONFIG, ENDS, 1, 97)
    for scheduler in (both, alone):
        scheduler.submit(Request([1], SamplingParams(max_tokens=4)))
        if scheduler is both:
            scheduler.submit(Request(list(range(30)), EVERYTHING))
        prefill(scheduler, turns=1)
    plans = [values(scheduler.plan()[0]) for scheduler in (both, alone)]
    for name in plans[1].keys() - {"page_table"}:
        np.testing.assert_array_equal(plans[0][name], plans[1][name], name)
    prefill(both)
    assert both.plan()[0].sampling["temperature"].any()


# Where memory may run out while a request is served.
ALLOCATIONS = (
    (PageAllocator, "take"),
    (PageAllocator, "share"),
    (SlotSettings, "insert"),
    (SlotSettings, "running"),
    (SlotSettings, "text"),
    (scheduling, "prefill_plan"),
    (scheduling, "Plan"),
    (scheduling, "Slot"),
    (scheduling, "enter"),
    (filing, "StepRecord"),
)


class OutOfMemory:
    """Lets one call of all those above fail, before or after it did its work."""

    def __init__(self, monkeypatch, number: int, after: bool):
        self.calls, self.number, self.after = 0, number, after
        for owner, name in ALLOCATIONS:
            monkeypatch.setattr(owner, name, self._failing(getattr(owner, name)))

    def _failing(self, function):
        def call(*args, **options):
            number, self.calls = self.calls, self.calls + 1
            if number == self.number and not self.after:
                raise MemoryError(number)
            result = function(*args, **options)
            if number == self.number:
                raise MemoryError(number)
            return result

        return call


def serve(scheduler: Scheduler) -> None:
    """Serves what waits, one token a step; ends what a failure leaves in slots."""
    while scheduler.busy:
        try:
            prefill(scheduler, turns=1)
            plan, _ = scheduler.plan()
            if plan is None:
                continue
            planned = [plan, scheduler.plan_ahead()]
            for plan in filter(None, planned):
                scheduler.file(plan, emitted(plan), nodes=0)
        except MemoryError:
            for request in scheduler.running():
                scheduler.cancel(request, "error")


def emitted(plan):
    steps, batch = int(plan.max_steps), len(plan.limits)
    counts = np.zeros((steps, batch), int)
    for index, slot in plan.slots.items():
        counts[: slot.limit - slot.length, index] = 1
    top = types.SimpleNamespace(
        tokens=np.zeros((steps, batch, 1, 8), int),
        log_probs=np.zeros((steps, batch, 1, 8)),
        ranks=np.ones((steps, batch, 1), int),
    )
    emission = types.SimpleNamespace(
        tokens=np.full((steps, batch, 1), 5),
        counts=counts,
        ranks=None,
        sources=None,
        logprobs=np.zeros((steps, batch, 1)),
        top=top,
        trees=None,
    )
    return types.SimpleNamespace(emission=emission, steps=steps)


def submit(scheduler: Scheduler) -> list[Request]:
    requests = [
        Request([1, 2, 3], SamplingParams(**GREEDY)),
        Request(list(range(20)), EVERYTHING),
        Request(list(range(18)), SamplingParams(max_tokens=6)),
    ]
    for request in requests:
        request.stats.emitted_counts = [0, 0]
        scheduler.submit(request)
    return requests


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_memory_that_runs_out_anywhere_loses_no_page(after):
    """Every allocation of a run fails in turn; whoever comes next is served."""
    # Three pages less than the texts need, so that one waits.
    config = dataclasses.replace(CONFIG, num_pages=5)
    number, calls = 0, 1
    while number < calls:
        scheduler = Scheduler(config, ENDS, 1, 97)
        with pytest.MonkeyPatch.context() as patched:
            counted = OutOfMemory(patched, number, after)
            requests = submit(scheduler)
            serve(scheduler)
            calls = max(calls, counted.calls)
        reasons = {request.finish_reason for request in requests}
        assert "error" in reasons and reasons <= {"error", "length"}
        assert scheduler.free_pages == scheduler.num_pages
        assert (scheduler.pages.table == TRASH_PAGE).all()
        again = submit(scheduler)
        serve(scheduler)
        counts = [len(request.tokens) for request in again]
        assert counts == [r.params.max_tokens for r in again], number
        assert again[2].stats.shared_pages == 2
        number += 1
    assert calls > 30
