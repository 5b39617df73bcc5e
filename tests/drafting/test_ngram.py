"""Prompt lookup: against a search in Python, and in the whole engine."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.support import build, run
from treespec_jax.config import EngineConfig, SamplingParams, SpeculativeConfig
from treespec_jax.drafting import ngram
from treespec_jax.engine.engine import Engine
from treespec_jax.errors import UserError
from treespec_jax.speculation import make

LONGEST, V = 3, 9


def by_hand(text, tail) -> list[int]:
    """Tokens that followed matches of the tail: longest first, then the latest."""
    best = {}
    for end in range(len(text) - 1):
        match = 0
        while match < min(LONGEST, end + 1, len(tail)):
            if text[end - match] != tail[-1 - match]:
                break
            match += 1
        if match:
            token = text[end + 1]
            best[token] = max(best.get(token, (0, 0)), (match, end))
    return sorted(best, key=best.get, reverse=True)


@pytest.mark.parametrize("seed", range(4))
def test_scores_rank_what_followed_earlier_matches(seed):
    """Texts of different lengths, tails that end them and tails that a tree made."""
    rng = np.random.default_rng(seed)
    lengths, size = [30, 1, 12], 33
    text = np.full((3, size), ngram.NOBODY, np.int32)
    for slot, length in enumerate(lengths):
        text[slot, :length] = rng.integers(0, 4, length)
    tails = np.full((3, 4, LONGEST), ngram.NOBODY, np.int32)
    for slot, length in enumerate(lengths):
        for row in range(4):
            path = [*text[slot, :length], *rng.integers(0, 4, row)][-LONGEST:]
            tails[slot, row, LONGEST - len(path) :] = path
    last = jnp.asarray(lengths) - 1
    scores = jax.jit(ngram._scores, static_argnums=3)(text, last, tails, V)
    for slot, length in enumerate(lengths):
        for row in range(4):
            tail = [t for t in tails[slot, row] if t != ngram.NOBODY]
            want = by_hand(text[slot, :length].tolist(), tail)
            found = np.asarray(scores)[slot, row]
            assert np.argsort(-found, kind="stable")[: len(want)].tolist() == want
            assert (found > 0).sum() == len(want)


@pytest.fixture(scope="module")
def prompts():
    """A text that repeats itself, and one that does not."""
    rng = np.random.default_rng(0)
    motif = rng.integers(3, 97, 6).tolist()
    return [motif * 4, rng.integers(3, 97, 20).tolist(), [5]]


def engine_of(target, tree, rule="exact") -> Engine:
    config = EngineConfig(
        max_batch=3,
        max_len=128,
        page_size=16,
        steps_per_dispatch=4,
        prefill_chunks=(16,),
    )
    return Engine(
        target, config, make(SpeculativeConfig(method="ngram", tree=tree, rule=rule))
    )


@pytest.mark.slow
@pytest.mark.parametrize("tree", ["chain:4", "dynamic:7@4"])
def test_texts_are_those_of_plain_decoding(tree, tiny_target, prompts):
    """Greedy texts of a small model soon repeat themselves, which it finds."""
    plain, fast = (
        build(tiny_target, None, "none", 3, 16, 4),
        engine_of(tiny_target, tree),
    )
    for temperature in (0.0, 0.3):
        params = SamplingParams(max_tokens=60, temperature=temperature, ignore_eos=True)
        want = [r.tokens for r in run(plain, prompts, params)]
        requests = run(fast, prompts, params)
        assert [r.tokens for r in requests] == want
        if temperature == 0.0:
            accepted = sum(r.stats.accepted for r in requests)
            assert accepted > 0, "it never found anything: a dead test"
    assert fast.compilations == {"begin": 1, "prefill": 1, "dispatch": 1}


def test_options_are_checked():
    config = SpeculativeConfig(method="ngram", options={"longest": 0})
    with pytest.raises(UserError, match="longest must be a whole number >= 1"):
        make(config)
    assert make(SpeculativeConfig(method="ngram", options={"longest": 2})).drafter
