"""Counts of accepted nodes by depth and by rank, and texts that are cut short."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from treespec_jax.config import SamplingParams
from treespec_jax.engine.emission import child_ranks
from treespec_jax.engine.request import BestTokens, Request
from treespec_jax.engine.stats import Stats, total
from treespec_jax.trees.records import StepRecord, TreeRecord
from treespec_jax.tuning.calibration import accepted_by_rank

DEPTH = 3


def step_of(ranks) -> StepRecord:
    """Of 7 nodes; first children come from the first source."""
    return StepRecord(7, list(ranks), [int(rank > 0) for rank in ranks])


def request_of(steps) -> Request:
    """As the engine files it: every step's accepted ranks, and one token more."""
    request = Request([1], SamplingParams(logprobs=1))
    request.stats.emitted_counts = [0] * (DEPTH + 2)
    request.stats.sources = ("copy", "guess")
    for ranks in steps:
        request.steps.append(step_of(ranks))
        request.stats.record_step(request.steps[-1])
        request.records.append(None)
        request.arrivals.append((len(request.steps) / 8, len(ranks) + 1))
        for _ in range(len(ranks) + 1):
            request.tokens.append(len(request.tokens))
            request.logprobs.append(-1.0)
            request.top.append(BestTokens([5], [-1.0], 1))
    return request


def test_counts_by_depth_and_rank():
    parts = [request_of([[0, 2], [], [1, 0, 0]]).stats, request_of([[0]]).stats]
    assert parts[0].rank_counts == [3, 1, 1]
    assert parts[0].acceptance_by_depth == [2 / 3, 2 / 3, 1 / 3]
    assert parts[1].acceptance_by_rank == [1.0]
    both = total(parts, 0, 0)
    assert both.rank_counts == [4, 1, 1] and both.accepted == 6
    assert both.as_dict()["acceptance_by_rank"] == [4 / 6, 1 / 6, 1 / 6]
    assert both.as_dict()["accepted_by_source"] == {"copy": 4, "guess": 2}
    assert both.drafted == 4 * 7 and both.nodes_per_step == 7
    assert total([], 0, 0).acceptance_by_rank == Stats().acceptance_by_rank == []


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 4), max_size=DEPTH), min_size=1, max_size=6),
    st.data(),
)
def test_a_cut_text_is_counted_as_if_no_more_had_come(steps, data):
    """Every count is that of the tokens kept, whichever step the cut falls into."""
    request = request_of(steps)
    whole = len(request.tokens)
    count = data.draw(st.integers(1, whole))
    request.cut(count)
    left, expected = count, []
    for ranks in steps:
        if left > 0:
            expected.append(ranks[: left - 1])
            left -= len(ranks) + 1
    assert request.steps == [step_of(ranks) for ranks in expected]
    assert request.stats == request_of(expected).stats
    assert request.stats.tokens == len(request.tokens) == len(request.logprobs) == count
    assert len(request.records) == request.stats.steps
    assert len(request.top) == count
    assert request.arrivals == request_of(expected).arrivals
    assert sum(request.stats.rank_counts) == request.stats.accepted


def test_ranks_leave_out_empty_places():
    """Against the records' own count, on a tree with a void among its siblings."""
    parents = np.array([[0, 0, 0, 0, 2, 2, 2, 5], [0, 0, 0, 0, 1, 1, 3, 3]])
    valid = np.array([[True] * 8, [True, True, False, True, True, True, False, True]])
    path = np.array([[0, 2, 5, 7], [0, 3, 7, 0]])
    tree = types.SimpleNamespace(parents=jnp.asarray(parents), valid=jnp.asarray(valid))
    ranks = np.asarray(jax.jit(lambda p: child_ranks(tree, p))(path))
    assert ranks[0].tolist() == [1, 1, 0] and ranks[1, :2].tolist() == [1, 0]
    probability = np.where(valid, -1.0, -np.inf)
    for slot, want in enumerate(([1, 2], [1, 1])):
        record = TreeRecord(parents[slot], probability[slot], path[slot])
        assert accepted_by_rank([record]) == want
