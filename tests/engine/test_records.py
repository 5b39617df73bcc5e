"""What an engine records of its trees, against passes over the text alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx

from tests.engine.support import build, run
from tests.oracles import full_logits
from treespec_jax.config import SamplingParams
from treespec_jax.engine.request import Request

pytestmark = pytest.mark.slow

PARAMS = SamplingParams(max_tokens=14, temperature=0.8, ignore_eos=True)
SIZE = 64


@pytest.fixture(scope="module")
def requests(tiny_draft, ragged_prompts) -> list[Request]:
    """Two texts; the drafter is the target with a weaker layer."""
    near = nnx.clone(tiny_draft)
    near.layers[-1].mlp.down[...] = near.layers[-1].mlp.down[...] * 0.5
    engine = build(tiny_draft, near, "regular:2x2x1", batch=2, steps=3, record=True)
    assert engine.config.record
    return run(engine, [ragged_prompts[1], ragged_prompts[2]], PARAMS)


def log_prob(model, ids, token) -> float:
    """Log p of a token after a text, by one pass over the text."""
    logits = full_logits(model, ids, SIZE)[-1]
    return float(logits[token] - np.logaddexp.reduce(logits))


def test_log_probabilities_of_nodes_are_those_of_a_pass_over_the_text(
    requests, tiny_draft
):
    for request in requests:
        text = list(request.prompt)
        for record, step in zip(request.records, request.steps, strict=True):
            assert record.tokens[0] == text[-1]
            assert record.target_log_prob[0] == 0
            texts = {0: text}
            for node in range(1, len(record.parents)):
                parent = texts[int(record.parents[node])]
                token = int(record.tokens[node])
                texts[node] = [*parent, token]
                wanted = log_prob(tiny_draft, parent, token)
                assert record.target_log_prob[node] == pytest.approx(wanted, abs=1e-3)
            text = (
                text + request.tokens[len(text) - len(request.prompt) :][: step.emitted]
            )


def test_log_probabilities_of_emitted_tokens_need_not_be_asked_for(
    requests, tiny_draft
):
    for request in requests:
        assert not request.params.logprobs and not request.logprobs
        text = list(request.prompt)
        for record, step in zip(request.records, request.steps, strict=True):
            for number in range(step.emitted):
                token = request.tokens[len(text) - len(request.prompt)]
                wanted = log_prob(tiny_draft, text, token)
                found = record.emitted_log_prob[number]
                assert found == pytest.approx(wanted, abs=1e-3)
                text.append(token)
        assert text[len(request.prompt) :] == request.tokens


def test_recording_changes_no_token(requests, tiny_draft, ragged_prompts):
    plain = build(tiny_draft, None, "none", batch=2, steps=3)
    params = dataclasses.replace(PARAMS, logprobs=True)
    others = run(plain, [ragged_prompts[1], ragged_prompts[2]], params)
    assert [r.tokens for r in requests] == [r.tokens for r in others]
