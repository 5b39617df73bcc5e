"""Several texts of one prompt, which share its pages."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from treespec_jax import LLM, SamplingParams, UserError
from treespec_jax.checkpoints import LoadedModel

PROMPT = [5, 9, 14, 20, 33, 41, 5, 9, 14, 21, 34, 42, 6, 10, 15, 22, 35, 43]
PARAMS = SamplingParams(max_tokens=6, temperature=1.0, seed=2**32 - 2, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_draft):
    loaded = LoadedModel(
        tiny_draft.config, tiny_draft, None, "tiny", np.dtype("float32")
    )
    engine = dict(max_batch=2, max_len=64, page_size=8, prefill_chunks=(8,))
    with LLM(loaded, speculative=None, steps_per_dispatch=2, **engine) as llm:
        yield llm


def alone(llm, seed):
    params = dataclasses.replace(PARAMS, seed=seed % 2**32, logprobs=0)
    (found,) = llm.generate([PROMPT], params)
    return found


def test_n_texts_have_the_seeds_from_the_first_on_and_share_the_prompt(llm):
    """More of them than slots."""
    llm.reset()
    (found,) = llm.generate([PROMPT], dataclasses.replace(PARAMS, n=4))
    texts = (found, *found.others)
    assert [text.seed for text in texts] == [2**32 - 2, 2**32 - 1, 0, 1]
    assert [t.token_ids for t in texts] == [alone(llm, t.seed).token_ids for t in texts]
    assert all(text.logprobs is None for text in texts)
    # Two full pages of eight, which only the first text computed.
    assert [text.stats.shared_pages for text in texts] == [0, 2, 2, 2]
    assert [text.stats.prefix_hits for text in texts] == [0, 1, 1, 1]


def test_the_best_of_some_texts_come_back_the_best_first(llm):
    params = dataclasses.replace(PARAMS, n=2, best_of=5)
    found = llm.generate([PROMPT], params)
    every = [alone(llm, PARAMS.seed + i) for i in range(5)]
    means = [float(np.mean(text.logprobs)) for text in every]
    want = [every[i].token_ids for i in np.argsort(means)[::-1][:2]]
    best = found[0]
    assert [best.token_ids, *(t.token_ids for t in best.others)] == want
    assert best.logprobs is None and len(best.others) == 1
    assert found.stats.requests == 5 and found.stats.tokens == 30


def test_a_prompt_is_finished_with_all_its_texts(llm):
    """Whoever waits for prompts hears of each once, by its number."""
    told = {}
    params = [dataclasses.replace(PARAMS, n=3, seed=1), PARAMS]
    params.append(dataclasses.replace(PARAMS, n=1, best_of=2, seed=4))
    found = llm.generate([PROMPT] * 3, params, on_finish=told.setdefault)
    assert sorted(told) == [0, 1, 2]
    for number, completion in enumerate(found):
        ours = [text.token_ids for text in completion.texts]
        assert [text.token_ids for text in told[number].texts] == ours
    assert [len(told[number].texts) for number in range(3)] == [3, 1, 1]


def test_prompts_that_ask_together_have_seeds_of_their_own(llm):
    found = llm.generate([PROMPT, PROMPT], dataclasses.replace(PARAMS, n=2, seed=0))
    assert [text.seed for c in found for text in (c, *c.others)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n": 0}, "n must be a whole number >= 1"),
        ({"best_of": 0}, "best_of must be a whole number >= 1"),
        ({"n": 3, "best_of": 2}, "best_of=2 is less than n=3"),
        ({"n": 2, "temperature": 0}, "greedy texts are all the same"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, says):
    with pytest.raises(UserError, match=says):
        SamplingParams(**{"temperature": 1.0, **fields})


def test_a_stream_is_one_text(llm):
    with pytest.raises(UserError, match="a stream is one text, and n=2"):
        llm.stream(PROMPT, dataclasses.replace(PARAMS, n=2))
