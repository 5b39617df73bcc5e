"""Kinds of arguments: what is natural is taken, the rest refused in one line."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treespec_jax.arguments import as_params, as_prompt, as_prompts, each_params
from treespec_jax.commands.settings import build as settings_of
from treespec_jax.config import EngineConfig, EngineSettings, SamplingParams
from treespec_jax.engine.request import Request
from treespec_jax.errors import UserError


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("the cat", ["the cat"]),
        (["the", "cat"], ["the", "cat"]),
        (("the", [1, 2]), ["the", [1, 2]]),
        ([1, 2], [[1, 2]]),
        (range(3), [[0, 1, 2]]),
        ((text for text in ("a", "b")), ["a", "b"]),
        (np.arange(3), [[0, 1, 2]]),
        (np.arange(4, dtype=np.uint8).reshape(2, 2), [[0, 1], [2, 3]]),
        ([np.int32(1), 2], [[1, 2]]),
        ([], []),
        ([[]], [[]]),
        ({"prompt": "the cat"}, ["the cat"]),
        ({"prompt_token_ids": [1, 2]}, [[1, 2]]),
        ({"prompt": "x", "prompt_token_ids": [1]}, [[1]]),
        ({"prompt": "x", "prompt_token_ids": None}, ["x"]),
        ([{"prompt": "x"}, "y", {"prompt_token_ids": np.array([3])}], ["x", "y", [3]]),
    ],
)
def test_prompts(given, want):
    found = as_prompts(given)
    assert found == want
    assert all(type(i) is int for p in found if not isinstance(p, str) for i in p)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "prompts must be a text, texts, or lists of token ids, got None"),
        (5, "prompts must be a text, texts, or lists of token ids, got 5"),
        (b"the cat", "prompts must be a text, .* got b'the cat'"),
        (bytearray(b"x"), "prompts must be a text"),
        (np.int64(3), "prompts must be a text"),
        (np.array(3), "prompts must be a text"),
        ([b"a"], "a prompt must be text or token ids, got b'a'"),
        ([None], "a prompt must be text or token ids, got None"),
        ([1.5], "a prompt must be text or token ids, got 1.5"),
        ([True, False], "a prompt must be text or token ids, got True"),
        ([[1, True]], r"a prompt must be text or token ids, got \[1, True\]"),
        ([[np.float32(1)]], "a prompt must be text or token ids"),
        (["a", 1], "a prompt must be text or token ids, got 1"),
        ({"text": "a"}, "holds 'prompt' or 'prompt_token_ids' and nothing else"),
        ({"role": "user", "content": "a"}, "nothing else, .*; messages go to chat"),
        ({"prompt": None}, "holds 'prompt' or 'prompt_token_ids'"),
        ({"prompt": [1]}, r"'prompt' must be a text, got \[1\]"),
        ({"prompt_token_ids": "12"}, "'prompt_token_ids' must be token ids, got '12'"),
        ({"prompt": "a", "multi_modal_data": {}}, "and nothing else"),
        ("a\ud800", r"the prompt holds '\\ud800', which is no character"),
    ],
)
def test_prompts_that_are_none(given, message):
    with pytest.raises(UserError, match=message) as caught:
        as_prompts(given)
    assert "\n" not in str(caught.value)


def test_params():
    usual = SamplingParams()
    assert as_params(None) == as_params({}) == as_params(usual) == usual
    assert as_params({"top_k": 3}) == SamplingParams(top_k=3)
    assert each_params([None, {"seed": 1}], 2, "prompts")[1].seed == 1


def test_one_for_all_is_the_first_ones():
    """Seeds follow, modulo 2**32; those of a list are taken as they are."""
    one = SamplingParams(top_k=3, seed=2**32 - 1)
    found = each_params(one, 3, "prompts")
    assert [p.seed for p in found] == [2**32 - 1, 0, 1]
    assert {dataclasses.replace(p, seed=5) for p in found} == {
        SamplingParams(top_k=3, seed=5)
    }
    assert each_params({"seed": 4}, 2, "prompts")[1].seed == 5
    assert each_params(None, 2, "prompts")[1] == SamplingParams(seed=1)
    assert each_params([one] * 2, 2, "prompts") == [one] * 2


@pytest.mark.parametrize("seed", [None, -1])
def test_no_seed_is_a_fresh_one_for_each(seed):
    params = SamplingParams(seed=seed)
    assert params.seed is None
    for some in (params, [params] * 8):
        seeds = {p.for_text().seed for p in each_params(some, 8, "prompts")}
        assert len(seeds) == 8 and all(0 <= s < 2**32 for s in seeds)
    request = Request([1], params)
    assert request.params.seed is not None
    assert settings_of({"sampling": {"seed": seed}}).sampling.seed is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "params must be SamplingParams, got 5"),
        ("greedy", "params must be SamplingParams, got 'greedy'"),
        ({"max_token": 3}, "unknown key 'max_token' in params; did you mean 'max_to"),
        ({5: 3}, "unknown key 5 in params"),
        ({"top_p": 2}, "top_p must be"),
        (["a", "b"], "params must be SamplingParams or its fields, got 'a'"),
        ([None], "2 prompts but 1 sampling parameters"),
    ],
)
def test_params_that_are_none(given, message):
    with pytest.raises(UserError, match=message):
        each_params(given, 2, "prompts")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ignore_eos": "false"}, "ignore_eos must be true or false, got 'false'"),
        ({"ignore_eos": 0}, "ignore_eos must be true or false, got 0"),
        ({"top_k": -2}, "top_k must be a whole number >= -1, got -2"),
        ({"seed": -2}, "seed must be a whole number >= -1, got -2"),
        ({"logprobs": -1}, "logprobs must be a whole number >= 0, got -1"),
        ({"logprobs": "5"}, "logprobs must be a whole number >= 0, got '5'"),
        ({"prompt_logprobs": 1.0}, "prompt_logprobs must be a whole number >= 0"),
        ({"temperature": "0.5"}, "temperature must be a number, got '0.5'"),
        ({"temperature": b"1"}, "temperature must be a number, got b'1'"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"temperature": 10**400}, "temperature must be a number, got 1000"),
        ({"temperature": 1e39}, "temperature=1e.39 cannot be told from infinity in fl"),
        ({"temperature": 1e-39}, "temperature=1e-39 cannot be told from 0 in float32"),
        ({"temperature": np.ones(1)}, "temperature must be a number"),
        ({"top_p": 1e-38}, "top_p=1e-38 cannot be told from 0 in float32"),
        ({"min_p": 1e-46}, "min_p=1e-46 cannot be told from 0 in float32"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty=1e-46 cannot be told"),
        ({"repetition_penalty": 1e300}, "repetition_penalty=1e.300 cannot be told"),
        ({"presence_penalty": -1e-40}, "presence_penalty=-1e-40 cannot be told from 0"),
        ({"logit_bias": {3: 1e-40}}, "logit_bias of token 3=1e-40 cannot be told"),
        ({"logit_bias": {3: "1"}}, "logit_bias of token 3 must be a number"),
        ({"logit_bias": {"3": 1}}, "logit_bias token must be a whole number"),
        ({"logit_bias": 5}, "logit_bias must map token ids to numbers, got 5"),
        ({"max_tokens": True}, "max_tokens must be a whole number >= 1, got True"),
        ({"max_tokens": 2**31}, "max_tokens must be below 2..31, got 2147483648"),
        ({"max_tokens": 8.0}, "max_tokens must be a whole number >= 1, got 8.0"),
        ({"top_k": 2**31}, "top_k must be below 2..31"),
        ({"seed": 2**32}, "seed must be below 2..32"),
        ({"seed": "1"}, "seed must be a whole number >= -1, got '1'"),
    ],
)
def test_values_that_are_none(values, message):
    with pytest.raises(UserError, match=message) as caught:
        SamplingParams(**values)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_become_those_of_python():
    params = SamplingParams(
        max_tokens=np.int64(3),
        top_k=np.uint8(2),
        seed=np.uint32(2**32 - 1),
        temperature=np.float32(0.5),
        top_p=1,
        ignore_eos=np.bool_(True),
        logit_bias={np.int32(3): np.float64(-1)},
    )
    plain = SamplingParams(
        max_tokens=3,
        top_k=2,
        seed=2**32 - 1,
        temperature=0.5,
        ignore_eos=True,
        logit_bias={3: -1.0},
    )
    assert params == plain and hash(params) == hash(plain)
    assert json.dumps(dataclasses.asdict(params)) == (
        json.dumps(dataclasses.asdict(plain))
    )
    sizes = EngineConfig(max_batch=np.int64(2), prefill_chunks=np.array([4, 8]))
    assert sizes == EngineConfig(max_batch=2, prefill_chunks=(4, 8))
    assert type(sizes.max_batch) is int
    assert SamplingParams(logit_bias=None) == SamplingParams()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prefill_chunks": "16"}, "prefill_chunks must be a whole number >= 1"),
        ({"prefill_chunks": None}, r"prefill_chunks must ascend .* got \(\)"),
        ({"max_batch": "2"}, "max_batch must be a whole number >= 1, got '2'"),
        ({"page_size": 64.0}, "page_size must be a whole number >= 1, got 64.0"),
        ({"max_len": [3]}, r"max_len must be a whole number >= 2, got \[3\]"),
        ({"num_pages": b"1"}, "num_pages must be a whole number >= 1"),
    ],
)
def test_sizes_that_are_none(values, message):
    with pytest.raises(UserError, match=message):
        EngineSettings(**values)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=4)
    | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=5,
)
NAMES = [field.name for field in dataclasses.fields(SamplingParams)]


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(NAMES), value=ANYTHING)
def test_any_value_is_what_it_says_or_refused(name, value):
    try:
        found = getattr(SamplingParams(**{name: value}), name)
    except UserError as error:
        assert "\n" not in str(error)
        return
    special = {"top_k": {-1: 0}, "seed": {-1: None}}.get(name, {})
    if name in ("logprobs", "prompt_logprobs") and isinstance(value, bool):
        special = {True: 0, False: None}
    if name in ("stop_token_ids", "allowed_token_ids") and isinstance(value, int):
        special = {value: (value,)}  # one token stands for a list of it
    if isinstance(value, (int, float, bool)):
        assert found == special.get(value, value)


@settings(max_examples=300, deadline=None)
@given(value=ANYTHING)
def test_any_prompt_is_what_it_says_or_refused(value):
    for read in (as_prompts, as_prompt, as_params):
        try:
            found = read(value)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        if read is as_prompt and isinstance(value, (str, list)):
            assert found == value
