"""Log-probabilities of tokens, of those in their stead, and of the prompt's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.checkpoints.support import train_sentencepiece
from tests.engine.scripted import follow, scripted, write
from tests.engine.support import build, serve
from tests.oracles import full_logits
from treespec_jax.checkpoints.tokenizers import load_tokenizer
from treespec_jax.config import SamplingParams
from treespec_jax.engine.request import Request
from treespec_jax.errors import UserError
from treespec_jax.llm import LLM

TOKENS = 12
# Penalties that change nearly every token, so that log p after them would show.
PARAMS = [
    SamplingParams(max_tokens=TOKENS, temperature=0.9, logprobs=5, prompt_logprobs=2),
    SamplingParams(max_tokens=TOKENS, logprobs=3, repetition_penalty=2.0, top_k=2),
    SamplingParams(max_tokens=TOKENS, temperature=1.5, logprobs=1, prompt_logprobs=12),
    SamplingParams(max_tokens=TOKENS, logprobs=True, prompt_logprobs=True),
    SamplingParams(max_tokens=TOKENS),
]


def requests(prompts) -> list[Request]:
    return [
        Request(prompt, dataclasses.replace(one, seed=seed))
        for seed, (prompt, one) in enumerate(zip(prompts, PARAMS, strict=True))
    ]


def check(logits, tokens, logprobs, top, count) -> None:
    """Against numpy, column by column."""
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    want = log_p[np.arange(len(tokens)), tokens]
    np.testing.assert_allclose(logprobs, want, atol=1e-4)
    assert len(top) == (len(tokens) if count else 0)
    for best, row, token in zip(top, log_p, tokens, strict=bool(count)):
        order = np.argsort(-row)[:count]
        assert best.tokens == order.tolist()
        np.testing.assert_allclose(best.log_probs, row[order], atol=1e-4)
        assert best.rank == 1 + (row > row[token]).sum()


@pytest.mark.slow
def test_of_tokens_and_prompts(tiny_target, tiny_draft, ragged_prompts):
    """Of the target, before penalties; prompts of one chunk and of three."""
    engine = build(tiny_target, tiny_draft, "regular:3x2x1", 5, 16, 4)
    found = serve(engine, requests(ragged_prompts))
    for request in found:
        prompt, params = request.prompt, request.params
        logits = full_logits(tiny_target, [*prompt, *request.tokens])
        if params.logprobs is None:
            assert not request.logprobs and not request.top
        else:
            rows = logits[len(prompt) - 1 : -1]
            args = request.tokens, request.logprobs, request.top
            check(rows, *args, params.logprobs)
        if params.prompt_logprobs is None:
            assert not request.prompt_logprobs and not request.prompt_top
            continue
        assert request.prompt_logprobs[0] is None and request.prompt_top[0] is None
        args = prompt[1:], request.prompt_logprobs[1:], request.prompt_top[1:]
        check(logits[: len(prompt) - 1], *args, params.prompt_logprobs)
    # Pages of an equal prompt save no pass of one that is to be scored.
    (same,) = serve(engine, [Request(ragged_prompts[3], PARAMS[0])])
    assert same.stats.prefix_hits == 0
    logits = full_logits(tiny_target, same.prompt)[:-1]
    check(logits, same.prompt[1:], same.prompt_logprobs[1:], same.prompt_top[1:], 2)
    # Nobody asked: neither program has any of it.
    compiled = dict(engine.compilations)
    again = serve(engine, [Request(ragged_prompts[0], PARAMS[4])])
    assert again[0].tokens and not again[0].top
    assert engine.compilations["prefill"] == compiled["prefill"]


@pytest.mark.slow
def test_a_text_that_had_to_wait_again_has_them_once(tiny_target, ragged_prompts):
    """Few pages: prompts are computed twice; of plain decoding too."""
    engine = build(tiny_target, None, "none", 5, 16, 4, num_pages=5)
    one = dataclasses.replace(PARAMS[0], max_tokens=20, prompt_logprobs=0)
    found = [Request(ragged_prompts[2], one) for _ in range(3)]
    serve(engine, found)
    assert sum(request.stats.restarts for request in found) > 0
    for request in found:
        assert len(request.prompt_logprobs) == 17 and len(request.top) == 20
        assert request.prompt_logprobs == found[0].prompt_logprobs
        logits = full_logits(tiny_target, [*request.prompt, *request.tokens])[16:-1]
        check(logits, request.tokens, request.logprobs, request.top, one.logprobs)


@pytest.mark.slow
def test_in_a_completion(tmp_path):
    """With texts; the emitted token behind the best ones where it is none of them."""
    tokenizer = load_tokenizer(train_sentencepiece(tmp_path))
    script = write(tokenizer)
    successors = follow([script.prompt_ids[-1], *script.ids])
    llm = LLM(
        scripted(tokenizer, successors),
        speculative=None,
        max_batch=2,
        max_len=64,
        page_size=16,
        prefill_chunks=(16,),
    )
    params = SamplingParams(max_tokens=40, logprobs=2, prompt_logprobs=1)
    least = SamplingParams(max_tokens=1, logprobs=1, logit_bias={script.ids[3]: 100})
    said, forced = llm.generate([script.prompt] * 2, [params, least])
    assert [some[0].token_id for some in said.top_logprobs] == script.ids
    for token, logprob, some in zip(
        said.token_ids, said.logprobs, said.top_logprobs, strict=True
    ):
        assert [one.rank for one in some] == [1, 2] and some[0].logprob == logprob
        shown = tokenizer.piece(token).replace("\u2581", " ")
        if "<0x" not in shown:
            assert some[0].text == shown
    assert said.prompt_logprobs[0] is None and said.prompt_top_logprobs[0] is None
    assert len(said.prompt_logprobs) == len(said.prompt_top_logprobs)
    for token, some in zip(
        script.prompt_ids[1:], said.prompt_top_logprobs[1:], strict=True
    ):
        assert token in [one.token_id for one in some] and len(some) <= 2
    ((best, emitted),) = forced.top_logprobs
    assert (best.token_id, best.rank) == (script.ids[0], 1)
    assert emitted.token_id == forced.token_ids[0] == script.ids[3]
    assert emitted.rank > 1 and emitted.logprob == forced.logprobs[0] < best.logprob
    assert forced.prompt_logprobs is forced.prompt_top_logprobs is None
    with pytest.raises(UserError, match="logprobs=1000 is more than the .* tokens"):
        llm.generate(script.prompt, SamplingParams(logprobs=1000))
    stream = llm.stream(script.prompt, params)
    stream.close()
    assert stream.completion.prompt_logprobs is None
