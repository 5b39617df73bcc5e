"""Branches of an LLM with a tokenizer and a drafter that keeps rows in the pages."""

from __future__ import annotations

import numpy as np
import pytest

from treespec_jax import Branch, SamplingParams, UserError


@pytest.fixture
def llm(scripted_llm):
    yield scripted_llm
    with scripted_llm.exclusive() as engine:
        assert engine.free_pages == 2 * 64 // 16


def pieces(branch, most) -> list[str]:
    """What the branch says token by token, to its end."""
    said = []
    for _ in range(most):
        found = branch.produce()
        branch.commit(found.token)
        said.append(found.text)
        if found.is_stop:
            break
    return said


def test_a_branch_says_the_text_piece_by_piece(llm, script):
    """Characters of several tokens come with the last of them."""
    with Branch.create(llm).prefill(script.prompt) as branch:
        assert list(branch.tokens) == script.prompt_ids and branch.text == ""
        said = pieces(branch, 64)
        assert "".join(said) == branch.text == script.text
        assert "" in said and "\ufffd" not in "".join(said)
        assert list(branch.tokens[len(script.prompt_ids) :]) == script.ids


def test_a_branch_stops_where_a_stop_text_is_complete(llm, script):
    stop = script.text[: len(script.text) // 2][-3:]
    params = SamplingParams(stop=stop)
    (want,) = llm.generate([script.prompt], params)
    with Branch.create(llm, params).prefill(script.prompt) as branch:
        assert stop in "".join(pieces(branch, 64))
        emitted = branch.tokens[len(script.prompt_ids) :]
        assert list(emitted) == want.token_ids
    with pytest.raises(UserError, match="a branch is one text, and n=2"):
        Branch.create(llm, SamplingParams(n=2, temperature=1.0))


def test_requests_find_no_pages_that_their_drafter_has_not_filled(llm):
    """Branches find those of requests, and of each other."""
    rng = np.random.default_rng(0)
    known, new = rng.integers(3, 200, (2, 40)).tolist()
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    (first,) = llm.generate([known], params)
    with Branch.create(llm).prefill(known) as branch:
        assert branch.shared_pages == 2
    with Branch.create(llm).prefill(new) as branch:
        assert not branch.shared_pages
        with Branch.create(llm).prefill([*new[:33], 5]) as other:
            assert other.shared_pages == 2
    (cold,) = llm.generate([new], params)
    (warm,) = llm.generate([known], params)
    assert not cold.stats.prefix_hits and warm.stats.prefix_hits == 1
    assert warm.token_ids == first.token_ids
    # Now the request's pages are there as well.
    (again,) = llm.generate([new], params)
    assert again.token_ids == cold.token_ids
