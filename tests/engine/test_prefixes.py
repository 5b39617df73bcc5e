"""Texts that begin alike share pages, and nothing else of them changes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.drafting.heads import eagle, medusa
from tests.engine import support
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.drafting.auto import Auto, AutoOptions
from treespec_jax.drafting.draft_model import DraftModel
from treespec_jax.drafting.eagle import Eagle
from treespec_jax.drafting.last_logits import LastLogits
from treespec_jax.drafting.medusa import Medusa
from treespec_jax.drafting.ngram import Matching
from treespec_jax.drafting.recycle import Recycling
from treespec_jax.drafting.sources import SourceDrafter
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import Request
from treespec_jax.errors import UserError
from treespec_jax.speculation import PLAIN, Speculation
from treespec_jax.trees import shapes

PAGE, BATCH, PAGES = 8, 3, 30
CONFIG = EngineConfig(
    max_batch=BATCH,
    max_len=80,
    page_size=PAGE,
    num_pages=PAGES,
    steps_per_dispatch=2,
    prefill_chunks=(8,),
    record=True,
)
PARAMS = SamplingParams(
    max_tokens=20, temperature=0.8, seed=3, ignore_eos=True, logprobs=True
)
CASES = "none", "draft_model", "eagle", "medusa", "sources", "auto_eagle"


def speculation(name, target) -> Speculation:
    if name == "none":
        return PLAIN
    # Between them all that drafts without a model, and tables of each request.
    parts = (
        Matching("ngram", 2, 0),
        Matching("suffix", 5, 40),
        Recycling(3, "engine"),
        Recycling(2, "request"),
        LastLogits(2),
    )
    drafter = {
        "draft_model": lambda: DraftModel(target, 0.5),
        "eagle": lambda: Eagle(eagle(target, 3, few=True), 1.0),
        "medusa": lambda: Medusa(medusa(target, few=True), 1.0),
        "sources": lambda: SourceDrafter(parts),
        "auto_eagle": lambda: Auto.make(eagle(target, 1), 1.0, AutoOptions()),
    }[name]()
    return Speculation(drafter, (shapes.parse("regular:2x1"),))


@pytest.fixture(scope="module", params=CASES)
def engine(request, tiny_draft) -> Engine:
    """Its target has one layer: that much less to compile."""
    return Engine(tiny_draft, CONFIG, speculation(request.param, tiny_draft))


@pytest.fixture(scope="module")
def prefix() -> list[int]:
    """Two full pages and a half; it repeats itself, as drafters like it."""
    rng = np.random.default_rng(4)
    return np.tile(rng.integers(3, 97, 7), 3)[:20].tolist()


def one(engine, prompt, **changes) -> Request:
    request = Request(list(prompt), dataclasses.replace(PARAMS, **changes))
    support.serve(engine, [request])
    assert engine.free_pages == PAGES
    return request


def same(request: Request, other: Request) -> None:
    """The same text by the same trees."""
    assert request.tokens == other.tokens
    assert request.steps == other.steps
    for record, its in zip(request.records, other.records, strict=True):
        np.testing.assert_array_equal(record.tokens, its.tokens)
        np.testing.assert_array_equal(record.parents, its.parents)
    np.testing.assert_allclose(request.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.slow
def test_a_hit_changes_neither_text_nor_acceptance(engine, prefix):
    """Of prompts that begin like another one, and of the next turn of a chat."""
    found = []
    for cached in (True, False):
        engine.reset()
        one(engine, [*prefix, 5, 6])
        texts = []

        def answer(prompt, cached=cached, texts=texts):
            if not cached:
                # What the drafter has learnt stays.
                engine.draft_state = engine.draft_state
            texts.append(one(engine, prompt))

        answer([*prefix, 7])
        # It leaves the others where a page ends, and has one token more.
        answer([*prefix[: 2 * PAGE], 96, 95])
        # All but its newest token is known: a row is computed nevertheless.
        answer([*prefix[: 2 * PAGE], 96])
        answer([*texts[0].prompt, *texts[0].tokens, 8, 9])
        found.append(texts)
    for warm, cold in zip(*found, strict=True):
        same(warm, cold)
        assert not cold.stats.prefix_hits and warm.stats.prefix_hits == 1
    first, second, third, turn = found[0]
    assert first.stats.shared_pages == len(prefix) // PAGE
    # Where a row depends on the token after it, the second page is another one.
    pages = 2 - engine.speculation.drafter.needs.next_tokens
    assert second.stats.shared_pages == pages and third.stats.shared_pages == 1
    # The second turn finds what the first one wrote, but for what is under way.
    assert turn.stats.shared_pages > (len(prefix) + 4) // PAGE


@pytest.mark.slow
def test_a_fork_repeats_its_twin_and_goes_its_own_way_with_another_seed(engine, prefix):
    engine.reset()
    alone = one(engine, prefix)
    engine.reset()
    engine.submit(request := Request(list(prefix), PARAMS))
    while len(request.tokens) < 6:
        engine.advance()
    twin = engine.fork(request)
    held = PAGES - engine.free_pages
    other = engine.fork(request, dataclasses.replace(PARAMS, seed=99))
    # Of the pages that hold rows, only those are new that may still be written.
    rows = len(prefix) + len(request.tokens) - 1
    trailing = 3 if engine.speculation.drafter.needs.in_pages else 0
    fresh = -(-rows // PAGE) - (rows - trailing) // PAGE
    assert PAGES - engine.free_pages == held + fresh
    common = len(twin.tokens)
    with pytest.raises(UserError, match="all 3 slots are taken"):
        engine.fork(request)
    support.serve(engine, [])
    assert engine.free_pages == PAGES
    assert request.tokens == alone.tokens
    same(twin, request)
    assert other.tokens[:common] == alone.tokens[:common] != other.tokens
    want = one(engine, [*prefix, *other.tokens[:common]], seed=99, max_tokens=5)
    assert other.tokens[common : common + 5] == want.tokens
    with pytest.raises(UserError, match="only a request that decodes"):
        engine.fork(request)
