"""Slots, pages and ends of text: what the host does around the compiled steps.

Two engines serve the whole file, a plain and a speculative one, over a pool of pages
that is enough for one long text but not for three.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine import support
from tests.engine.support import build, speculate
from tests.oracles import full_logits
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.plan import prefill_plan
from treespec_jax.engine.request import Request
from treespec_jax.errors import UserError
from treespec_jax.speculation import PLAIN

PAGE, MAX_LEN, BATCH, CHUNKS = 16, 128, 3, (8, 32)
# One text of MAX_LEN takes 8 pages; three of them would take 24.
NUM_PAGES = 10
SAMPLED = SamplingParams(
    max_tokens=40, temperature=0.7, seed=5, ignore_eos=True, logprobs=True
)


def serve(engine, requests) -> list[Request]:
    """Runs requests together; afterwards nobody may hold a page."""
    support.serve(engine, requests)
    assert engine.free_pages == NUM_PAGES
    return requests


def one(engine, prompt, params) -> Request:
    return serve(engine, [Request(list(prompt), params)])[0]


@pytest.fixture(scope="module")
def target(tiny_draft):
    """One layer: what is tested here does not depend on how many there are."""
    return tiny_draft


@pytest.fixture(scope="module")
def prompt(ragged_prompts):
    return ragged_prompts[2]


def sized(target, speculation, eos=()) -> Engine:
    config = EngineConfig(
        max_batch=BATCH,
        max_len=MAX_LEN,
        page_size=PAGE,
        num_pages=NUM_PAGES,
        steps_per_dispatch=4,
        prefill_chunks=CHUNKS,
    )
    return Engine(target, config, speculation, eos)


@pytest.fixture(scope="module")
def first(target, prompt) -> Request:
    """Forty sampled tokens of plain decoding, without any end of text."""
    engine = build(target, None, "none", num_pages=NUM_PAGES)
    return one(engine, prompt, SAMPLED)


def first_seen(tokens, after):
    """Position of a token at or after `after` that was not emitted before it."""
    return next(i for i in range(after, len(tokens)) if tokens[i] not in tokens[:i])


@pytest.fixture(scope="module")
def eos(first):
    """Two tokens of that text: one far down, and one that comes even later."""
    at = first_seen(first.tokens, 12)
    return first.tokens[at], first.tokens[first_seen(first.tokens, at + 1)]


@pytest.fixture(scope="module")
def plain(target, eos):
    return sized(target, PLAIN, eos)


@pytest.fixture(scope="module")
def fast(target, eos):
    """Its drafter is the target with a weaker layer: mostly right, not always."""
    near = nnx.clone(target)
    near.layers[-1].mlp.down[...] = near.layers[-1].mlp.down[...] * 0.5
    return sized(target, speculate(near, "regular:3x1x1"), eos)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.integers(0, 2000),
    st.sets(st.integers(1, 300), min_size=1, max_size=4).map(sorted),
)
def test_a_prefill_plan_covers_the_prompt_exactly(tokens, chunks):
    plan = prefill_plan(tokens, chunks)
    assert [start for start, _, _ in plan] == np.cumsum(
        [0, *(count for _, _, count in plan[:-1])]
    ).tolist()
    assert sum(count for _, _, count in plan) == tokens
    assert all(size in chunks and count <= size for _, size, count in plan)
    # Only an empty prompt makes an empty chunk; others are half full at least,
    # unless no smaller size is there.
    assert plan == [(0, chunks[0], 0)] or all(count for _, _, count in plan)
    assert all(2 * count >= size or size == chunks[0] for _, size, count in plan)


@pytest.mark.slow
def test_ten_lengths_compile_each_function_once(plain, fast, first, prompt):
    """Prefill once per chunk size; and every text is the same with speculation."""
    rng = np.random.default_rng(1)
    lengths = (1, 2, 8, 9, 10, 31, 33, 47, 60, 64)
    prompts = [rng.integers(3, 97, n).tolist() for n in lengths]
    params = dataclasses.replace(SAMPLED, max_tokens=12)
    results = [
        [one(engine, p, params).tokens for p in prompts] for engine in (plain, fast)
    ]
    assert results[0] == results[1]
    for engine in (plain, fast):
        counts = dict(engine.compilations)
        assert counts == {"begin": 1, "prefill": len(CHUNKS), "dispatch": 1}
    assert one(fast, prompt, SAMPLED).tokens == first.tokens


@pytest.mark.slow
def test_out_of_pages_the_youngest_waits_and_goes_on_later(plain, fast):
    """Three texts of eight pages each over ten: all get there, the older ones first."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 97, 30).tolist() for _ in range(BATCH)]
    params = [dataclasses.replace(SAMPLED, max_tokens=n, seed=n) for n in (90, 90, 60)]
    for engine in (plain, fast):
        alone = [one(engine, p, s) for p, s in zip(prompts, params, strict=True)]
        requests = [Request(p, s) for p, s in zip(prompts, params, strict=True)]
        ended = []
        for request in requests:
            engine.submit(request)
        while engine.busy:
            engine.advance()
            ended += [r for r in requests if r.finish_reason and r not in ended]
        assert engine.free_pages == NUM_PAGES
        for request, want in zip(requests, alone, strict=True):
            assert request.tokens == want.tokens
            np.testing.assert_allclose(request.logprobs, want.logprobs, atol=1e-4)
            assert request.finish_reason == "length"
            assert sum(request.stats.emitted_counts) == request.stats.steps
        assert ended[0] is requests[0] and not requests[0].stats.restarts
        assert sum(r.stats.restarts for r in requests[1:]) > 0


@pytest.mark.slow
def test_a_long_prompt_takes_turns_with_decoding(plain, fast, first, prompt):
    """While its chunks are prefilled, a text that runs goes on; both are as alone."""
    long = np.random.default_rng(3).integers(3, 97, 100).tolist()
    params = dataclasses.replace(SAMPLED, max_tokens=8)
    want = one(plain, long, params)
    running = Request(list(prompt), SAMPLED)
    fast.submit(running)
    fast.advance()
    before = len(running.tokens)
    late = Request(list(long), params)
    fast.submit(late)
    turns = 0
    while not late.tokens:
        fast.advance()
        turns += 1
    # Three chunks of 32 and one of 8, one for each turn of decoding.
    assert turns >= 4 and len(running.tokens) >= before + 3
    while fast.busy:
        fast.advance()
    assert running.tokens == first.tokens and late.tokens == want.tokens


@pytest.mark.slow
def test_a_request_that_fills_the_pool_alone_ends(fast, target):
    """It goes as far as the pages do, beside others that wait for it."""
    small = EngineConfig(
        max_batch=2,
        max_len=MAX_LEN,
        page_size=PAGE,
        num_pages=3,
        steps_per_dispatch=4,
        prefill_chunks=(8,),
    )
    engine = Engine(target, small)
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    requests = [Request([5] * n, params) for n in (4, 6)]
    support.serve(engine, requests)
    for request in requests:
        assert request.finish_reason == "length"
        assert len(request.prompt) + len(request.tokens) == 3 * PAGE + 1
    assert engine.free_pages == 3


@pytest.mark.slow
def test_a_prompt_that_no_pool_could_hold_ends_at_once(fast, target):
    """And the next one in the queue is served."""
    tight = EngineConfig(
        max_batch=1,
        max_len=MAX_LEN,
        page_size=PAGE,
        num_pages=1,
        steps_per_dispatch=1,
        prefill_chunks=(8,),
    )
    engine = Engine(target, tight)
    large, small = (
        Request([5] * n, SamplingParams(max_tokens=40)) for n in (PAGE + 1, 3)
    )
    support.serve(engine, [large, small])
    assert (large.finish_reason, large.tokens) == ("length", [])
    # Rows 0..15 hold all but the newest token.
    assert (small.finish_reason, len(small.tokens)) == ("length", PAGE - 3 + 1)
    assert engine.free_pages == 1


@pytest.mark.slow
def test_max_tokens_is_exact_inside_an_accepted_path(fast, first, prompt):
    """Every limit, so that some cut an accepted path in the middle."""
    whole = one(fast, prompt, SAMPLED)
    assert whole.tokens == first.tokens
    cut = 0
    for limit in range(1, 13):
        params = dataclasses.replace(SAMPLED, max_tokens=limit)
        request = one(fast, prompt, params)
        assert request.tokens == first.tokens[:limit]
        assert len(request.logprobs) == limit
        assert request.finish_reason == "length"
        free = dataclasses.replace(SAMPLED, max_tokens=limit + 1)
        longer = one(fast, prompt, free)
        cut += longer.stats.steps == request.stats.steps
    assert cut > 0, "no limit fell inside a path: a dead test"


@pytest.mark.slow
def test_an_end_of_text_inside_a_path_ends_the_text(plain, fast, first, prompt, eos):
    """It is the last token, though the same step accepted more."""
    want = first.tokens[: first.tokens.index(eos[0]) + 1]
    assert eos[1] not in want
    params = dataclasses.replace(SAMPLED, ignore_eos=False)
    slow, quick = (one(engine, prompt, params) for engine in (plain, fast))
    for request in (slow, quick):
        assert request.tokens == want
        assert request.finish_reason == "stop"
        assert len(request.logprobs) == len(want)
    assert quick.stats.tokens == len(want)
    # Ignored, both go on to the limit.
    for engine in (plain, fast):
        request = one(engine, prompt, SAMPLED)
        assert request.tokens == first.tokens and request.finish_reason == "length"


@pytest.mark.slow
def test_any_end_of_text_cuts_where_plain_decoding_does(fast, first, eos):
    """All prompts that start inside the text: ends fall on every place of a path."""
    ends = set()
    params = dataclasses.replace(SAMPLED, ignore_eos=False, max_tokens=30)
    for seed in range(6):
        prompt = first.prompt[: 4 + seed]
        free = one(fast, prompt, dataclasses.replace(SAMPLED, seed=seed, max_tokens=30))
        request = one(fast, prompt, dataclasses.replace(params, seed=seed))
        at = [i for i, t in enumerate(free.tokens) if t in eos]
        want = free.tokens[: at[0] + 1] if at else free.tokens
        assert request.tokens == want
        assert request.finish_reason == ("stop" if at else "length")
        ends.add(bool(at))
    assert True in ends, "no text ended: a dead test"


@pytest.mark.slow
def test_max_len_bounds_prompt_and_output(plain, fast, prompt):
    params = dataclasses.replace(SAMPLED, max_tokens=1000)
    texts = [one(engine, prompt * 6, params) for engine in (plain, fast)]
    for request in texts:
        assert len(request.tokens) == MAX_LEN - 6 * len(prompt)
        assert request.finish_reason == "length"
    assert texts[0].tokens == texts[1].tokens
    full = Request([5] * (MAX_LEN - 1), params)
    assert len(serve(fast, [full])[0].tokens) == 1
    with pytest.raises(UserError, match="128 tokens, max_len is 128"):
        fast.submit(Request([5] * MAX_LEN, params))
    with pytest.raises(UserError, match="empty"):
        fast.submit(Request([], params))


@pytest.mark.slow
def test_cancel_frees_pages_and_disturbs_nobody(fast, first, prompt):
    """A running and a waiting request are given up; the other one goes on."""
    keep = Request(list(prompt), SAMPLED)
    others = [Request([5, 6, 7], dataclasses.replace(SAMPLED, seed=i)) for i in (1, 2)]
    waiting = Request([5], SAMPLED)
    for request in (others[0], keep, others[1], waiting):
        fast.submit(request)
    fast.advance(max_steps=1)
    held = NUM_PAGES - fast.free_pages
    fast.cancel(others[0])
    fast.cancel(waiting, "length")
    assert NUM_PAGES - fast.free_pages < held
    assert others[0].finish_reason == "stop" and waiting.finish_reason == "length"
    some = list(others[0].tokens)
    while fast.busy:
        fast.advance()
    assert others[0].tokens == some and waiting.tokens == []
    assert keep.tokens == first.tokens and keep.finish_reason == "length"
    assert len(others[1].tokens) == 40
    assert fast.free_pages == NUM_PAGES
    fast.cancel(keep)
    assert keep.finish_reason == "length"


@pytest.mark.slow
def test_logprobs_are_the_models_own(plain, fast, target, first, prompt):
    """Log-softmax of one causal pass, before temperature and truncation."""
    logits = full_logits(target, [*prompt, *first.tokens])[len(prompt) - 1 : -1]
    top = logits.max(axis=-1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    want = logp[np.arange(len(first.tokens)), first.tokens]
    for engine in (plain, fast):
        request = one(engine, prompt, SAMPLED)
        np.testing.assert_allclose(request.logprobs, want, atol=1e-3)
    silent = one(fast, prompt, dataclasses.replace(SAMPLED, logprobs=False))
    assert silent.logprobs == []


@pytest.mark.slow
def test_statistics_add_up(plain, fast, prompt):
    for engine, nodes, depth in ((plain, 0, 0), (fast, 3 + 3 + 3, 3)):
        request = one(engine, prompt, SAMPLED)
        stats = request.stats
        assert stats.tokens == len(request.tokens) == 40
        assert stats.prompt_tokens == len(prompt)
        assert stats.nodes_per_step == nodes and stats.drafted == stats.steps * nodes
        assert sum(stats.emitted_counts) == stats.steps
        assert stats.emitted_counts[0] == 0
        total = sum(n * count for n, count in enumerate(stats.emitted_counts))
        assert total == stats.tokens == stats.accepted + stats.steps
        assert sum(stats.rank_counts) == stats.accepted
        by_depth = stats.acceptance_by_depth
        assert len(by_depth) == depth and by_depth == sorted(by_depth, reverse=True)
        # A step emits one token, and one per accepted depth.
        assert stats.tokens_per_step == pytest.approx(1 + sum(by_depth))
        assert stats.as_dict()["drafted"] == stats.drafted
    assert 1.5 < stats.tokens_per_step < 4, "never or always right: a dead test"


def test_a_tree_deeper_than_max_len_is_refused(target):
    with pytest.raises(UserError, match="depth 200 does not fit max_len=128"):
        build(target, target, "chain:200")
