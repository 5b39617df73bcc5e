"""Penalties and logit bias: plain decoding against numpy, trees against plain decoding.

The oracle penalises one causal pass token by token, with loops over the text.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.support import build, run
from tests.oracles import TIE, full_logits
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.engine.request import Request
from treespec_jax.engine.scheduler import Scheduler
from treespec_jax.engine.slots import SlotSettings
from treespec_jax.errors import UserError
from treespec_jax.sampling import noise
from treespec_jax.sampling.penalties import TextSoFar

TOKENS = 24
# A small vocabulary's logits: penalties this strong decide most tokens.
BOTH = dict(
    repetition_penalty=1.3,
    presence_penalty=0.6,
    frequency_penalty=0.4,
    logit_bias={5: 3.0, 11: -100.0, 40: 2.5},
)
SETTINGS = {
    "greedy": SamplingParams(max_tokens=TOKENS, **BOTH),
    "sampled": SamplingParams(max_tokens=TOKENS, temperature=0.8, **BOTH),
    "encouraged": SamplingParams(
        max_tokens=TOKENS,
        temperature=0.5,
        repetition_penalty=0.8,
        presence_penalty=-0.5,
        frequency_penalty=-0.2,
    ),
    "none": SamplingParams(max_tokens=TOKENS, temperature=0.8),
}
SHAPES = ["regular:3x2x1", "dynamic:9@4"]


def penalised(logits, prompt, output, params):
    """By the book: one token after the other."""
    logits = logits.astype(np.float64)
    for token in set(prompt) | set(output):
        by = params.repetition_penalty
        logits[token] = logits[token] / by if logits[token] > 0 else logits[token] * by
    for token in output:
        logits[token] -= params.frequency_penalty
    for token in set(output):
        logits[token] -= params.presence_penalty
    for token, bias in params.logit_bias:
        logits[token] += bias
    return logits


def scores(target, prompt, output, params):
    """[V], whose argmax is the next token."""
    logits = full_logits(target, prompt + output)[-1]
    logits = penalised(logits, prompt, output, params)
    if params.temperature == 0:
        return logits
    seed, at = np.full(1, params.seed, np.uint32), len(prompt) + len(output)
    own = _gumbel(seed, np.full(1, at), len(logits))[:, 0]
    return logits / params.temperature + own


_gumbel = jax.jit(noise.gumbel, static_argnums=2)


@pytest.fixture(scope="module")
def engine(tiny_target):
    return build(tiny_target, None, "none", 5, 16, 4)


@pytest.fixture(scope="module")
def plain(engine, ragged_prompts):
    """Texts of plain decoding, by setting."""
    return {
        name: [r.tokens for r in run(engine, ragged_prompts, params)]
        for name, params in SETTINGS.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_plain_decoding_takes_the_best_penalised_score(
    name, plain, tiny_target, ragged_prompts
):
    """Every token, or one within rounding of the best."""
    for seed, (prompt, tokens) in enumerate(
        zip(ragged_prompts, plain[name], strict=True)
    ):
        params = dataclasses.replace(SETTINGS[name], seed=seed)
        for at in range(0, TOKENS, 3):
            own = scores(tiny_target, prompt, tokens[:at], params)
            assert own.max() - own[tokens[at]] < TIE
    if name != "none":
        assert plain[name] != plain["none"]
    if SETTINGS[name].logit_bias:
        assert not any(11 in tokens for tokens in plain[name])


@pytest.mark.slow
def test_reported_log_probabilities_are_those_before_penalties(
    plain, engine, tiny_target, ragged_prompts
):
    """The model's own: of temperature, penalties and bias they know nothing."""
    params = dataclasses.replace(SETTINGS["sampled"], logprobs=True)
    requests = run(engine, ragged_prompts[:3], params)
    moved = 0.0
    for number, request in enumerate(requests):
        assert request.tokens == plain["sampled"][number]
        text = [*request.prompt, *request.tokens]
        logits = full_logits(tiny_target, text).astype(np.float64)
        for at, token in enumerate(request.tokens):
            before = logits[len(request.prompt) - 1 + at]
            after = penalised(before, request.prompt, request.tokens[:at], params)
            own, other = (x[token] - np.log(np.exp(x).sum()) for x in (before, after))
            assert abs(request.logprobs[at] - own) < 1e-3
            moved = max(moved, abs(own - other))
    assert moved > 1, "penalties change nothing here: a dead test"


@pytest.mark.slow
def test_a_request_without_penalties_runs_the_program_without_them(
    plain, engine, ragged_prompts
):
    """One more program in all, and it is left again when nobody needs it."""
    assert engine.compilations == {"begin": 1, "prefill": 1, "dispatch": 2}
    run(engine, ragged_prompts[:1], SETTINGS["none"])
    assert engine.compilations["dispatch"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_trees_give_the_tokens_of_plain_decoding(
    shape, plain, tiny_target, tiny_draft, ragged_prompts, capsys
):
    """Alone, and in a batch in which only some are penalised."""
    engine = build(tiny_target, tiny_draft, shape, 5, 16, 4)
    per_step = {}
    for name, params in SETTINGS.items():
        requests = run(engine, ragged_prompts, params)
        steps = sum(r.stats.steps for r in requests)
        per_step[name] = sum(r.stats.tokens for r in requests) / steps
        assert [r.tokens for r in requests] == plain[name]
    names = list(SETTINGS)
    mixed = [
        Request(prompt, dataclasses.replace(SETTINGS[name], seed=i))
        for i, (prompt, name) in enumerate(zip(ragged_prompts, names, strict=False))
    ]
    for request in mixed:
        engine.submit(request)
    while engine.busy:
        engine.advance()
    assert [r.tokens for r in mixed] == [plain[n][i] for i, n in enumerate(names)]
    assert engine.compilations["dispatch"] == 2
    with capsys.disabled():
        shown = ", ".join(f"{n} {x:.2f}" for n, x in per_step.items())
        print(f"\n{shape}: tokens per step {shown}")
    assert min(per_step.values()) > 1.1, "the drafter is never right: a dead test"


def test_nodes_of_a_tree_are_penalised_by_their_own_path():
    """Against loops; tokens come twice on a path, in the prompt and in the output."""
    rng = np.random.default_rng(0)
    V = 9
    params = [
        SamplingParams(**BOTH | {"logit_bias": {3: 1.5, 8: -4.0}}),
        SamplingParams(repetition_penalty=0.7, frequency_penalty=-1.0),
        SamplingParams(),
    ]
    texts = {0: ([1, 2, 2], [3, 3, 5]), 1: ([4], []), 2: ([6, 1], [6])}
    settings = SlotSettings(3, 8, (), V)
    for slot, own in enumerate(params):
        settings.insert(slot, own)
    tables = TextSoFar.of(settings.text(texts)).tables(V)
    step = jnp.asarray([[7, 3, 0], [4, 8, 8], [5, 5, 5]])
    tables = tables.after(step, jnp.asarray([2, 1, 0]))
    texts[0][1].extend([7, 3])
    texts[1][1].append(4)
    parents = [0, 0, 0, 1, 1, 3]
    tokens = rng.integers(0, V, (3, 6))
    tokens[0] = [3, 3, 5, 3, 7, 3]
    paths = [[]]
    for node in range(1, 6):
        paths.append([*paths[parents[node]], node])
    on_path = np.zeros((3, 6, 5), bool)
    for node, path in enumerate(paths):
        on_path[:, node, [n - 1 for n in path]] = True
    logits = rng.normal(0, 2, (V, 18)).astype(np.float32)
    got = np.asarray(tables.apply(jnp.asarray(logits), tokens[:, 1:], on_path))
    short = np.asarray(tables.apply(jnp.asarray(logits[:7]), tokens[:, 1:], on_path))
    np.testing.assert_array_equal(short, got[:7])
    for slot, (prompt, output) in texts.items():
        for node, path in enumerate(paths):
            column = 6 * slot + node
            text = [*output, *(int(tokens[slot, n]) for n in path)]
            want = penalised(logits[:, column], prompt, text, params[slot])
            np.testing.assert_allclose(got[:, column], want, rtol=1e-5, atol=1e-5)


def test_texts_are_sent_only_while_somebody_has_penalties():
    """A request that has ended leaves nothing of its settings in its slot."""
    scheduler = Scheduler(EngineConfig(max_batch=2, max_len=8, page_size=8), (), 1, 97)
    asked = Request([1], SamplingParams(presence_penalty=1.0, temperature=0.5))
    other = Request([1], SamplingParams())
    for request in (asked, other):
        scheduler.submit(request)
    scheduler.admit()
    for chunk in scheduler.chunks():
        scheduler.fed(chunk, 0.0)
    plan, _ = scheduler.plan()
    assert plan.text["repeats"]["presence"].tolist() == [1.0, 0.0]
    scheduler.cancel(asked)
    plan, _ = scheduler.plan()
    assert plan.text is None and not plan.sampling["temperature"].any()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("repetition_penalty", 0, "repetition_penalty"),
        ("presence_penalty", 2.5, "presence_penalty"),
        ("frequency_penalty", float("nan"), "frequency_penalty"),
        ("logit_bias", 5, "logit_bias"),
        ("logit_bias", {"a": 1.0}, "token"),
        ("logit_bias", {-1: 1.0}, "token"),
        ("logit_bias", {1: 101}, "of token 1"),
        ("logit_bias", ((1, 1.0), (1, 2.0)), "twice"),
        ("logit_bias", dict.fromkeys(range(65), 1.0), "64 at most"),
    ],
)
def test_bad_values_are_named(name, value, expected):
    with pytest.raises(UserError, match=expected):
        SamplingParams(**{name: value})


def test_bias_has_one_form():
    pairs = SamplingParams(logit_bias={7: 1, 2: -3.5}).logit_bias
    assert pairs == ((2, -3.5), (7, 1.0))
    assert SamplingParams(logit_bias=[[7, 1], [2, -3.5]]).logit_bias == pairs
