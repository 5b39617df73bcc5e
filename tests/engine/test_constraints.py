"""What a request forbids, and its own functions: an oracle, and trees against plain.

Every request of a batch has settings of its own, so that one program has all parts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.support import build, run, serve, speculate
from tests.oracles import TIE, full_logits
from treespec_jax.acceptance.cascade import Cascade
from treespec_jax.arguments import with_token_ids
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.request import Request
from treespec_jax.engine.slots import SlotSettings
from treespec_jax.errors import UserError
from treespec_jax.sampling import noise
from treespec_jax.sampling.penalties import TextSoFar

TOKENS, SHORTEST = 24, 9
# So many that a text soon ends where it may.
ENDS = tuple(range(3, 97, 3))


def no_bigram_twice(tokens, logits):
    """Forbids what came behind the newest token before (n-gram size 2)."""
    before = (tokens[:-1] == tokens[-1]) & (tokens[:-1] >= 0)
    seen = jnp.zeros(logits.shape, bool).at[tokens[1:]].max(before)
    return jnp.where(seen, -jnp.inf, logits)


def even_after_odd(tokens, logits):
    """Prefers even tokens where the text is odd in length, and odd ones elsewhere."""
    odd = jnp.sum(tokens >= 0) % 2
    return logits + jnp.where(jnp.arange(logits.size) % 2 == odd, 0.0, 1.5)


@pytest.fixture(scope="module")
def params(tiny_target, ragged_prompts):
    """One for each prompt; the bad words are what plain decoding says without them."""
    free = SamplingParams(max_tokens=TOKENS)
    engine = build(tiny_target, None, "none", 5, 16, 4)
    said = [request.tokens for request in run(engine, ragged_prompts, free)]
    words = [said[1][2:4], said[1][7:10], said[1][12:13], [ragged_prompts[1][-1], 5]]
    words += [[ragged_prompts[1][-1], said[1][0]]]
    return [
        SamplingParams(
            max_tokens=TOKENS, temperature=0.8, allowed_token_ids=range(20, 50)
        ),
        SamplingParams(max_tokens=TOKENS, bad_words=words),
        SamplingParams(max_tokens=TOKENS, temperature=1.0, min_tokens=SHORTEST),
        SamplingParams(max_tokens=TOKENS, logits_processors=no_bigram_twice),
        SamplingParams(
            max_tokens=TOKENS,
            min_tokens=SHORTEST,
            stop_token_ids=[31, 32],
            temperature=0.7,
            bad_words=[[40], [41, 43], [44, 46, 47], [20, 20]],
            allowed_token_ids=range(10, 80),
            logits_processors=[no_bigram_twice, even_after_odd],
            presence_penalty=0.5,
        ),
    ]


def texts(engine, prompts, params) -> list[list[int]]:
    requests = [
        Request(prompt, dataclasses.replace(one, seed=seed))
        for seed, (prompt, one) in enumerate(zip(prompts, params, strict=True))
    ]
    return [request.tokens for request in serve(engine, requests)]


@pytest.fixture(scope="module")
def plain(tiny_target, ragged_prompts, params):
    engine = build(tiny_target, None, "none", 5, 16, 4, eos_ids=ENDS)
    found = texts(engine, ragged_prompts, params)
    # With all parts however the batch runs empty, and without any for the request that
    # only had to be long enough.
    assert engine.compilations["dispatch"] <= 2
    return found


def forbidden(prompt, output, params) -> set[int]:
    """Token by token, by the book."""
    found = set()
    if params.allowed_token_ids is not None:
        found |= set(range(97)) - set(params.allowed_token_ids)
    for word in params.bad_words:
        text = [*prompt, *output]
        if text[len(text) - len(word) + 1 :] == list(word[:-1]):
            found.add(word[-1])
    if len(output) < params.min_tokens:
        found |= {*ENDS, *params.stop_token_ids}
    return found


_gumbel = jax.jit(noise.gumbel, static_argnums=2)


def scores(target, prompt, output, params):
    """[V], whose argmax is the next token."""
    text = [*prompt, *output]
    logits = full_logits(target, text)[-1].copy()
    for token in set(output):
        logits[token] -= params.presence_penalty
    padded = jnp.asarray([-1] * (128 - len(text)) + text)
    for function in params.logits_processors:
        logits = np.array(function(padded, jnp.asarray(logits)))
    logits[list(forbidden(prompt, output, params))] = -np.inf
    if params.temperature == 0:
        return logits
    seed, at = np.full(1, params.seed, np.uint32), np.full(1, len(text))
    return logits / params.temperature + _gumbel(seed, at, 97)[:, 0]


@pytest.mark.slow
def test_plain_decoding_takes_the_best_score_that_is_allowed(
    plain, params, tiny_target, ragged_prompts
):
    lengths = [len(tokens) for tokens in plain]
    for seed, (prompt, tokens) in enumerate(zip(ragged_prompts, plain, strict=True)):
        one = dataclasses.replace(params[seed], seed=seed)
        for at in range(0, len(tokens), 2):
            found = scores(tiny_target, prompt, tokens[:at], one)
            assert found.max() - found[tokens[at]] < TIE, (seed, at)
        for at, token in enumerate(tokens):
            assert token not in forbidden(prompt, tokens[:at], one), (seed, at)
    # Texts end as soon as they may.
    assert min(lengths[i] for i in (2, 4)) > SHORTEST and lengths[0] < SHORTEST


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["regular:3x2x1", "dynamic:9@4"])
def test_trees_give_the_tokens_of_plain_decoding(
    shape, plain, params, tiny_target, tiny_draft, ragged_prompts
):
    engine = build(tiny_target, tiny_draft, shape, 5, 16, 4, eos_ids=ENDS)
    requests = [
        Request(prompt, dataclasses.replace(one, seed=seed))
        for seed, (prompt, one) in enumerate(zip(ragged_prompts, params, strict=True))
    ]
    serve(engine, requests)
    assert [request.tokens for request in requests] == plain
    steps = sum(request.stats.steps for request in requests)
    assert sum(map(len, plain)) / steps > 1.2, "the drafter is never right"


@pytest.mark.slow
def test_no_policy_emits_what_is_forbidden(
    params, tiny_target, tiny_draft, ragged_prompts
):
    """A sampling rule and a cascade, whose text is the drafter's here and there."""
    config = EngineConfig(
        max_batch=5,
        max_len=128,
        page_size=16,
        steps_per_dispatch=4,
        prefill_chunks=(16,),
    )
    cascade = Cascade("chow", 0.3)
    speculation = speculate(tiny_draft, "chain:3", "token", cascade=cascade)
    engine = Engine(tiny_target, config, speculation, ENDS)
    for one, prompt, tokens in zip(
        params, ragged_prompts, texts(engine, ragged_prompts, params), strict=True
    ):
        for at, token in enumerate(tokens):
            assert token not in forbidden(prompt, tokens[:at], one)


def test_nodes_are_constrained_by_their_own_path():
    """Against loops; words begin in the prompt, in the output, and within the tree."""
    V = 9
    params = [
        SamplingParams(bad_words=[[3, 3], [3, 5, 7], [2, 3, 3, 5], [6]]),
        SamplingParams(min_tokens=4, stop_token_ids=[1], allowed_token_ids=range(1, 7)),
        SamplingParams(logits_processors=lambda tokens, logits: logits + tokens[-2]),
        SamplingParams(),
    ]
    settings = SlotSettings(4, 8, (0, 8), V)
    for slot, one in enumerate(params):
        settings.insert(slot, one)
    texts = {0: ([1, 2], [3]), 1: ([4], []), 2: ([6], []), 3: ([6, 1], [6])}
    step, counts = [[3, 5], [4, 8], [5, 5], [5, 5]], [1, 2, 0, 0]
    parents = [0, 0, 0, 1, 1, 3]
    paths = [[]]
    for node in range(1, 6):
        paths.append([*paths[parents[node]], node])
    tokens = np.random.default_rng(0).integers(0, V, (4, 6))
    tokens[0] = [3, 5, 3, 7, 3, 5]
    on_path = np.zeros((4, 6, 5), bool)
    for node, path in enumerate(paths):
        on_path[:, node, [n - 1 for n in path]] = True
    logits = np.random.default_rng(1).normal(0, 2, (V, 24)).astype(np.float32)

    @jax.jit
    def constrained(given):
        tables = given.tables(V)
        tables = tables.after(jnp.asarray(step), jnp.asarray(counts))
        some = [
            tables.apply(jnp.asarray(logits[:rows]), tokens[:, 1:], on_path)
            for rows in (V, 7)
        ]
        return *some, tables.apply_to_draft(logits[7:], tokens[:, 1:], on_path)

    got, short, late = map(np.asarray, constrained(TextSoFar.of(settings.text(texts))))
    np.testing.assert_array_equal(short[:, :12], got[:7, :12])
    for slot, (prompt, output) in texts.items():
        output = [*output, *step[slot][: counts[slot]]]
        for node, path in enumerate(paths):
            text = [*output, *(int(tokens[slot, n]) for n in path)]
            want = logits[:, 6 * slot + node].copy()
            if slot == 2:
                want += (np.array([-1, -1, *prompt, *text]))[-2]
            banned = _forbidden_here(prompt, text, params[slot])
            want[list(banned)] = -np.inf
            np.testing.assert_allclose(got[:, 6 * slot + node], want, rtol=1e-6)
    assert np.isinf(got).any(axis=0)[:12].all()
    # Of two tokens, both forbidden while the text is short.
    early = slice(6, 7)
    np.testing.assert_array_equal(late[:, early], logits[7:, early])
    assert np.isfinite(late).any(axis=0).all()


def _forbidden_here(prompt, output, params) -> set[int]:
    found = set()
    if params.allowed_token_ids:
        found |= set(range(9)) - set(params.allowed_token_ids)
    for word in params.bad_words:
        text = [*prompt, *output]
        if text[len(text) - len(word) + 1 :] == list(word[:-1]):
            found.add(word[-1])
    if len(output) < params.min_tokens:
        found |= {0, 8, *params.stop_token_ids}
    return found


def test_what_a_cascade_may_not_say():
    settings = SlotSettings(1, 8, (), 3)
    settings.insert(0, SamplingParams(allowed_token_ids=[1]))
    tables = TextSoFar.of(settings.text({})).tables(3)
    target = jnp.asarray([[-jnp.inf] * 2, [2.0, 3.0], [-jnp.inf] * 2])
    mixed = jnp.asarray([[0.5, 1.0], [0.2, -jnp.inf], [0.3, 0.0]])
    found = np.asarray(tables.keep_forbidden(mixed, target))
    assert found[1].tolist() == [np.float32(0.2), 3.0]
    assert np.isneginf(found[[0, 2]]).all()


def test_nothing_is_sent_that_nobody_asked_for():
    """And free slots forget their requests; sizes grow by powers of two."""
    settings = SlotSettings(2, 8, (3,), 40)
    names = ["repeats", "masks", "bad_words", "processors"]

    def sent():
        text = settings.text({0: ([1], [5]), 1: ([2], [])})
        return [name for name in names if text[name] is not None]

    for params, want in [
        (SamplingParams(), []),
        (SamplingParams(logit_bias={3: 1.0}), ["repeats"]),
        (SamplingParams(bad_words=[[4]]), ["masks"]),
        (SamplingParams(bad_words=[[4, 5]]), ["bad_words"]),
        (SamplingParams(logits_processors=even_after_odd), ["processors"]),
        (SamplingParams(min_tokens=2), ["masks"]),
    ]:
        settings.insert(0, params)
        assert sent() == want
        settings.insert(1, SamplingParams(min_tokens=1, max_tokens=1))
        both = sorted({*want, "masks"}, key=names.index)
        assert sent() == both
        settings.clear(0)
        # As before: it would be another program.
        assert sent() == both
        settings.clear(1)
        assert sent() == []
    for count, length, shape in [(1, 2, (2, 8, 3)), (9, 5, (2, 16, 7))]:
        word = tuple(range(length))
        params = SamplingParams(bad_words=[word] * count)
        settings.insert(0, params)
        assert settings.text({})["bad_words"]["start"].shape == shape


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_tokens": -1}, "min_tokens must be a whole number >= 0, got -1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 is more than max_tokens=8"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty; give one at least"),
        ({"allowed_token_ids": ["1"]}, "allowed_token_ids must be a whole number"),
        ({"bad_words": 5}, "bad_words must hold non-empty texts or lists .* got 5"),
        ({"bad_words": [5]}, "bad_words must hold non-empty texts or lists .* got 5"),
        ({"bad_words": [[]]}, r"bad_words must hold .* got \[\]"),
        ({"bad_words": [""]}, "bad_words must hold non-empty texts"),
        ({"bad_words": [["a"]]}, "bad_words token must be a whole number"),
        ({"bad_words": ["a\ud800"]}, r"bad_words holds '\\ud800'"),
        ({"logits_processors": "f"}, "logits_processors must hold functions, got 'f'"),
        ({"logits_processors": [1]}, "logits_processors must hold functions, got 1"),
    ],
)
def test_values_that_are_none(values, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**values)


def test_one_form_of_each():
    same = SamplingParams(bad_words="no", allowed_token_ids=np.array([3, 1, 3]))
    assert (same.bad_words, same.allowed_token_ids) == (("no",), (1, 3))
    assert SamplingParams(bad_words=None, logits_processors=None) == SamplingParams()
    assert SamplingParams(bad_words=[np.arange(2), "no"]).bad_words == ((0, 1), "no")
    one = SamplingParams(logits_processors=even_after_odd)
    assert one == SamplingParams(logits_processors=[even_after_odd])
    assert hash(one) != hash(SamplingParams())


def fails(tokens, logits):
    return logits[: tokens[0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"allowed_token_ids": [97]}, "allowed_token_ids: token id 97 is outside"),
        ({"bad_words": [[3, 97]]}, "bad_words: token id 97 is outside"),
        (
            {"allowed_token_ids": [5, 6], "bad_words": [[1, 5], [2, 6]]},
            "allowed_token_ids, bad_words may forbid every token at once",
        ),
        (
            {"allowed_token_ids": [3], "min_tokens": 2},
            "allowed_token_ids, min_tokens may forbid every token at once",
        ),
        ({"logits_processors": fails}, "logits processor fails fails when jax traces"),
        ({"logits_processors": jnp.add}, "logits processor add fails|must return"),
        (
            {"logits_processors": lambda tokens, logits: tokens},
            "logits processor <lambda> must return 97 logits, got ShapeDtypeStruct",
        ),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_requests_that_cannot_run(values, message, tiny_target):
    engine = build(tiny_target, None, "none", 5, 16, 4, eos_ids=ENDS)
    with pytest.raises(UserError, match=message) as caught:
        engine.submit(Request([1], SamplingParams(**values)))
    assert "\n" not in str(caught.value) and not engine.busy


def test_words_need_a_tokenizer():
    with pytest.raises(UserError, match="bad_words: 'no' needs a tokenizer"):
        with_token_ids(SamplingParams(bad_words=["no", [3]]), None)
    assert with_token_ids(SamplingParams(bad_words=[[3]]), None).bad_words == ((3,),)
