"""Speculation never changes a token (fp32), whatever drafts, however it is batched."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest
from flax import nnx

from tests.engine.support import build, run, serve
from tests.oracles import Ties, perturbed_scores
from treespec_jax.config import SamplingParams
from treespec_jax.engine.request import Request
from treespec_jax.models.transformer import Transformer

TOKENS = 32
SETTINGS = {
    "greedy": SamplingParams(max_tokens=TOKENS),
    "t0.3": SamplingParams(max_tokens=TOKENS, temperature=0.3),
    "t0.7": SamplingParams(max_tokens=TOKENS, temperature=0.7),
    "t1.0": SamplingParams(max_tokens=TOKENS, temperature=1.0),
    "top_p": SamplingParams(max_tokens=TOKENS, temperature=1.0, top_p=0.9),
    "top_k": SamplingParams(max_tokens=TOKENS, temperature=1.0, top_k=40),
    "min_p": SamplingParams(max_tokens=TOKENS, temperature=1.0, min_p=0.05),
}
# The third is irregular.
SHAPES = ["none", "chain:5", "static:2+0.1+1.0+3.0.0+3.0.1+0.0.0.0", "dynamic:9@4"]
# (batch, page size, steps per dispatch, lanes; heads are 8 wide)
LAYOUTS = [(5, 16, 8, 1), (1, 64, 1, 1), (5, 64, 1, 16), (1, 16, 8, 1)]


@pytest.fixture(scope="module")
def plain(tiny_target, ragged_prompts):
    """Tokens of plain decoding, one prompt at a time."""
    engine = build(tiny_target, None, "none")
    return {
        name: [r.tokens for r in run(engine, ragged_prompts, params)]
        for name, params in SETTINGS.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["greedy", "t0.7", "top_p"])
def test_plain_decoding_takes_the_best_perturbed_score(
    name, plain, tiny_target, ragged_prompts
):
    """The oracle is one causal pass without cache, paging or batching."""
    prompt, tokens = ragged_prompts[2], plain[name][2]
    params = dataclasses.replace(SETTINGS[name], seed=2)
    for at in range(0, TOKENS, 7):
        scores = perturbed_scores(tiny_target, prompt + tokens[:at], params)
        assert scores.argmax() == tokens[at]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_equal_plain_decoding(
    shape, layout, plain, tiny_target, tiny_draft, ragged_prompts, capsys
):
    batch, page, steps, lanes = layout
    engine = build(tiny_target, tiny_draft, shape, batch, page, steps, lanes=lanes)
    ties = Ties(tiny_target)
    per_step = {}
    for name, params in SETTINGS.items():
        requests = run(engine, ragged_prompts, params)
        for i, request in enumerate(requests):
            assert request.finish_reason == "length"
            ties.check(
                ragged_prompts[i],
                plain[name][i],
                request.tokens,
                dataclasses.replace(params, seed=i),
            )
        steps_run = sum(r.stats.steps for r in requests)
        per_step[name] = sum(r.stats.tokens for r in requests) / steps_run
    with capsys.disabled():
        print(
            f"\n{shape} {layout}: {ties.seen} near ties in {ties.tokens} tokens; "
            f"tokens per step {min(per_step.values()):.2f}-{max(per_step.values()):.2f}"
        )
    if shape != "none":
        assert max(per_step.values()) > 1.2, "the drafter is never right: a dead test"
    assert engine.compilations == {"begin": 1, "prefill": 1, "dispatch": 1}


@pytest.mark.slow
def test_text_does_not_depend_on_slot_or_neighbours(
    plain, tiny_target, tiny_draft, ragged_prompts
):
    """Other prompts around it, another order, a queue longer than the batch."""
    engine = build(tiny_target, tiny_draft, "regular:4x2x1", 2, 16, 8)
    for order in ([4, 3, 2, 1, 0], [2, 0, 2, 4, 2]):
        requests = [
            Request(ragged_prompts[i], dataclasses.replace(SETTINGS["t0.7"], seed=i))
            for i in order
        ]
        serve(engine, requests)
        for i, request in zip(order, requests, strict=True):
            assert request.tokens == plain["t0.7"][i]


@pytest.mark.slow
def test_a_mixed_batch_gives_each_request_its_own_settings(
    plain, tiny_target, tiny_draft, ragged_prompts
):
    engine = build(tiny_target, tiny_draft, "chain:5", 5, 16, 8)
    names = ["greedy", "t0.3", "top_p", "top_k", "greedy"]
    requests = [
        Request(prompt, dataclasses.replace(SETTINGS[name], seed=i, logprobs=i == 1))
        for i, (prompt, name) in enumerate(zip(ragged_prompts, names, strict=True))
    ]
    serve(engine, requests)
    for i, (request, name) in enumerate(zip(requests, names, strict=True)):
        assert request.tokens == plain[name][i]
        assert len(request.logprobs) == (TOKENS if i == 1 else 0)


def resized(model: Transformer, rows: int) -> Transformer:
    """The model with the first of its rows, or with rows that it likes best of all."""
    config = dataclasses.replace(model.config, vocab_size=rows)
    other = Transformer(config, rngs=nnx.Rngs(2))
    more = rows - model.config.vocab_size
    for name in ("embedding", "head"):
        table = getattr(model, name)[...]
        if more > 0:
            table = jnp.concatenate([table, 3.0 * table[:more]])
        getattr(other, name)[...] = table[:rows]
    other.norm.scale[...] = model.norm.scale[...]
    for ours, theirs in zip(other.layers, model.layers, strict=True):
        nnx.update(ours, nnx.state(theirs))
    return other


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "rows"), [("chain:5", 128), ("dynamic:9@4", 80)])
def test_drafter_of_fewer_or_more_rows(
    shape, rows, plain, tiny_target, tiny_draft, ragged_prompts
):
    """Prompts and texts hold tokens that the smaller one lacks; the larger one would
    propose tokens that the target lacks."""
    engine = build(tiny_target, resized(tiny_draft, rows), shape, 5, 16, 8)
    most, lacking = 0.0, 0
    for name in ("greedy", "top_p"):
        requests = run(engine, ragged_prompts, SETTINGS[name])
        assert [r.tokens for r in requests] == plain[name]
        lacking += sum(t >= rows for r in requests for t in r.prompt + r.tokens)
        steps = sum(r.stats.steps for r in requests)
        most = max(most, sum(r.stats.tokens for r in requests) / steps)
    assert most > 1.2, "the drafter is never right: a dead test"
    assert (lacking > 40) == (rows < tiny_target.config.vocab_size)
