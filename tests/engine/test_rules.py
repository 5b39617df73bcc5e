"""Every rule in the whole engine: distributions, greedy texts, ends, labels.

Chi-square of the first two tokens of REQUESTS requests that differ in their seed,
against the target's exact probabilities (one causal pass without cache), at level
0.001. The first step may emit one of them or both, so that the second is at times a
drafted token, at times the bonus, at times the next step's. Power: as many draws from
a distribution with a tenth of the drafter's mixed in must be refused.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from tests.drafting import heads
from tests.engine.small import (
    CONFIG,
    CRITICAL,
    END,
    GREEDY,
    PROMPT,
    REQUESTS,
    SAMPLED,
    V,
    between,
    chi_square,
    model,
    run,
)
from tests.engine.support import speculate
from tests.oracles import full_logits
from treespec_jax.acceptance import rules
from treespec_jax.config import SpeculativeConfig
from treespec_jax.drafting.eagle import Eagle
from treespec_jax.drafting.medusa import Medusa
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.stats import total
from treespec_jax.errors import UserError
from treespec_jax.speculation import Speculation
from treespec_jax.trees import shapes

CASES = [
    ("exact", "regular:2x1", ""),
    ("token", "regular:2x1", ""),
    ("token", "allotted:4@2", ""),
    ("token", "regular:2x1", "with_replacement"),
    ("block", "chain:2", ""),
    ("traversal", "regular:2x1", ""),
    ("terminal", "dynamic:4@2", ""),
]


@pytest.fixture(scope="module")
def target():
    return model(0)


@pytest.fixture(scope="module")
def draft():
    return between(0, 1)


def build(target, draft, rule, tree, proposal="", **more) -> Engine:
    made = speculate(draft, tree, rule, tau=0.7, proposal=proposal, **more)
    return Engine(target, CONFIG, made, (END,))


def policy_of(model, ids) -> np.ndarray:
    """[V] after some tokens."""
    logits = full_logits(model, list(ids), size=32)[-1].astype(np.float64)
    scaled = logits / SAMPLED.temperature
    scaled[scaled < np.sort(scaled)[-SAMPLED.top_k]] = -np.inf
    p = np.exp(scaled - scaled.max())
    return p / p.sum()


def distribution_of(model) -> np.ndarray:
    """[V, V] of the next two tokens under the policy."""
    first, *second = (
        policy_of(model, ids) for ids in (PROMPT, *([*PROMPT, x] for x in range(V)))
    )
    return first[:, None] * np.stack(second)


@pytest.fixture(scope="module")
def distribution(target):
    return distribution_of(target)


@pytest.fixture(scope="module")
def greedy_text(target):
    """By one causal pass per token."""
    ids = list(PROMPT)
    for _ in range(GREEDY.max_tokens):
        ids.append(int(full_logits(target, ids, size=32)[-1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.slow
@pytest.mark.parametrize("rule, tree, proposal", CASES)
def test_two_tokens_have_the_targets_distribution(
    rule, tree, proposal, target, draft, distribution, greedy_text, capsys
):
    engine = build(target, draft, rule, tree, proposal)
    # A greedy request among sampled ones.
    params = [dataclasses.replace(SAMPLED, seed=n) for n in range(REQUESTS)]
    *requests, greedy = run(engine, [*params, GREEDY])
    assert greedy.tokens == greedy_text
    # And alone: all of the batch is greedy.
    (alone,) = run(engine, [GREEDY])
    assert alone.tokens == greedy_text and alone.stats.lossless
    check_edges(engine, greedy_text)
    assert engine.compilations["dispatch"] == 1
    counts = np.zeros((V, V))
    for request in requests:
        counts[tuple(request.tokens)] += 1
    statistic, freedom = chi_square(counts, distribution)
    stats = total([r.stats for r in requests], 0, 0)
    with capsys.disabled():
        print(
            f"\n{rule} {tree} {proposal}: chi-square {statistic:.1f} of {freedom}, "
            f"{stats.tokens_per_step:.2f} tokens per step"
        )
    assert stats.rule == rule and stats.tokens_per_step > 1.05
    assert statistic < CRITICAL[freedom]


@pytest.mark.parametrize(
    "rule, tree, proposal", [*CASES, ("typical", "regular:2x1", "")]
)
def test_no_rule_moves_data_to_the_host(rule, tree, proposal, target, draft):
    """Nothing in the program of a dispatch calls back or feeds a host."""
    function, arguments = build(target, draft, rule, tree, proposal).program()
    text = jax.jit(function).lower(*arguments).as_text()
    assert "stablehlo.while" in text and "stablehlo.dot_general" in text
    assert not re.findall("callback|outfeed|infeed|stablehlo.send|stablehlo.recv", text)


@pytest.mark.slow
@pytest.mark.parametrize("name, rule", [("eagle", "token"), ("medusa", "traversal")])
def test_drafters_over_rows_leave_the_distribution(
    name, rule, target, distribution, greedy_text
):
    """They know three of six tokens, and their parameters are random."""
    drafter = {
        "eagle": lambda: Eagle(heads.eagle(target, 3, few=True), 1.0),
        "medusa": lambda: Medusa(heads.medusa(target, few=True), 1.0),
    }[name]()
    made = rules.make(SpeculativeConfig(rule=rule))
    speculation = Speculation(drafter, (shapes.parse("regular:2x1"),), made)
    engine = Engine(target, CONFIG, speculation, (END,))
    params = [dataclasses.replace(SAMPLED, seed=n) for n in range(REQUESTS)]
    *requests, greedy = run(engine, [*params, GREEDY])
    assert greedy.tokens == greedy_text
    counts = np.zeros((V, V))
    for request in requests:
        counts[tuple(request.tokens)] += 1
    statistic, freedom = chi_square(counts, distribution)
    assert total([r.stats for r in requests], 0, 0).accepted > 0
    assert statistic < CRITICAL[freedom]


def check_edges(engine, greedy_text):
    """Temperatures at which all mass is on one token; an end within a path."""
    # The second is the least that is not taken for greedy.
    cold = [dataclasses.replace(GREEDY, temperature=t) for t in (1e-6, 1.01e-5)]
    assert [r.tokens for r in run(engine, cold)] == [greedy_text] * 2
    long = [dataclasses.replace(SAMPLED, seed=n, max_tokens=8) for n in range(64)]
    ending = [dataclasses.replace(p, ignore_eos=False) for p in long]
    inside = 0
    for whole, ended in zip(run(engine, long), run(engine, ending), strict=True):
        assert len(whole.tokens) == 8
        if END not in whole.tokens:
            assert ended.tokens == whole.tokens
            continue
        count = whole.tokens.index(END) + 1
        assert ended.tokens == whole.tokens[:count]
        assert ended.finish_reason == "stop" and ended.stats.tokens == count
        inside += ended.steps != whole.steps[: len(ended.steps)]
    assert inside, "the end never fell into an accepted path: a dead test"


def test_the_test_has_power(distribution, draft):
    """As stated above."""
    wrong = 0.9 * distribution + 0.1 * distribution_of(draft)
    wrong = np.where(distribution > 0, wrong, 0)
    wrong /= wrong.sum()
    for seed in range(3):
        counts = np.random.default_rng(seed).multinomial(REQUESTS, wrong.ravel())
        statistic, freedom = chi_square(counts.reshape(V, V), distribution)
        assert statistic > CRITICAL[freedom]


def typical_distribution(target, draft, eps, delta) -> np.ndarray:
    """[V, V] under typical acceptance of regular:2x1, step by step and by hand."""
    p, q = (
        functools.cache(functools.partial(policy_of, model))
        for model in (target, draft)
    )

    def bound(ids):
        some = p(ids)[p(ids) > 0]
        return min(eps, delta * np.exp((some * np.log(some)).sum()))

    def step(ids):
        """Tokens that are kept, of which the last is not drawn yet."""
        paths = []
        for x in np.argsort(-q(ids))[:2]:
            below = (*ids, int(x))
            if p(ids)[x] > bound(ids):
                paths.append((1, np.log(p(ids)[x]), below))
                y = int(q(below).argmax())
                if p(below)[y] > bound(below):
                    probability = p(ids)[x] * p(below)[y]
                    paths.append((2, np.log(probability), (*below, y)))
        return max(paths, default=(0, 0.0, ids))[2]

    distribution, root = np.zeros((V, V)), tuple(PROMPT)
    first = step(root)
    if len(first) == len(root) + 2:
        distribution[first[-2:]] = 1.0
    elif len(first) == len(root) + 1:
        distribution[first[-1]] = p(first)
    else:
        for x in range(V):
            below = (*root, x)
            then = step(below)
            if len(then) > len(below):
                distribution[x, then[len(below)]] = p(root)[x]
            else:
                distribution[x] = p(root)[x] * p(below)
    return distribution


@pytest.mark.slow
def test_typical_acceptance_is_labelled_lossy(target, distribution, greedy_text):
    """Greedy it is greedy matching; sampled it is its own distribution, and says so."""
    foreign, bounds = model(3), dict(eps=0.3, delta=1.0)
    more = {f"typical_{name}": value for name, value in bounds.items()}
    engine = build(target, foreign, "typical", "regular:2x1", **more)
    params = [dataclasses.replace(SAMPLED, seed=n) for n in range(REQUESTS)]
    *requests, greedy = run(engine, [*params, GREEDY])
    assert greedy.tokens == greedy_text
    check_edges(engine, greedy_text)
    counts = np.zeros((V, V))
    for request in requests:
        counts[tuple(request.tokens)] += 1
    stats = total([r.stats for r in requests], 0, 0).as_dict()
    assert stats["rule"] == "typical" and stats["lossless"] is False
    statistic, freedom = chi_square(counts, distribution)
    assert statistic > 3 * CRITICAL[freedom]
    own = typical_distribution(target, foreign, **bounds)
    statistic, freedom = chi_square(counts, own)
    assert statistic < CRITICAL[freedom]


@pytest.mark.parametrize(
    ("tree", "proposal", "expected"),
    [
        ("dynamic:4@2", "shared", "never pruned or re-ranked"),
        ("dynamic:4@2", "", "take tree='allotted:4@2'"),
    ],
)
def test_a_speculation_refuses_what_its_rule_cannot_judge(
    tree, proposal, expected, draft
):
    with pytest.raises(UserError, match=expected):
        speculate(draft, tree, "token", proposal=proposal)


def test_plain_decoding_by_a_sampling_rule_needs_no_proposal(target, distribution):
    """A tree that is its root: the last token is a draw of p."""
    engine = build(target, None, "token", "none")
    params = [dataclasses.replace(SAMPLED, seed=n) for n in range(REQUESTS)]
    counts = np.zeros((V, V))
    for request in run(engine, params):
        counts[tuple(request.tokens)] += 1
    statistic, freedom = chi_square(counts, distribution)
    assert statistic < CRITICAL[freedom]
