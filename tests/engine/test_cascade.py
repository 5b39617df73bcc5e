"""Cascades in the whole engine: the distribution of two tokens, and what is said of it.

Chi-square as in test_rules; under these trees the first two tokens of a request always
follow a node that the drafter expanded, so that both are the cascade's. The target's
own distribution must be refused.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.acceptance.policies import greedy_token, mixture
from tests.engine.small import (
    CONFIG,
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
from treespec_jax.acceptance.cascade import Cascade
from treespec_jax.engine.engine import Engine
from treespec_jax.engine.stats import total

PARAMS = dataclasses.replace(SAMPLED, top_k=0)
WIDTHS = {"regular:2x1": (2, 1), "chain:2": (1, 1)}
# Quantile 0.999 of chi-square, 35 degrees of freedom.
CRITICAL = 66.62


def distribution_of(policy) -> np.ndarray:
    first = policy(PROMPT)
    return first[:, None] * np.stack([policy([*PROMPT, x]) for x in range(V)])


def softmax_of(model):
    def policy(ids):
        scaled = full_logits(model, ids, size=32)[-1].astype(float) / PARAMS.temperature
        p = np.exp(scaled - scaled.max())
        return p / p.sum()

    return policy


def softmax_at_one(model, ids):
    scores = full_logits(model, ids, size=32)[-1].astype(float)
    p = np.exp(scores - scores.max())
    return p / p.sum()


def greedy_text(target, draft, cascade, widths) -> list[int]:
    """Step by step: pi's token where the drafter has children, else the target's."""
    text, level, own = list(PROMPT), 0, 0
    while len(text) < len(PROMPT) + GREEDY.max_tokens:
        p, q = (softmax_at_one(model, text) for model in (target, draft))
        if level < len(widths):
            token = greedy_token(cascade.name, cascade.alpha, p, q)
            own += token != p.argmax()
            held = token in np.argsort(-q)[: widths[level]]
        else:
            token, held = int(p.argmax()), False
        text.append(token)
        level = level + 1 if held else 0
    assert own, "it is the target's own text: a dead test"
    return text[len(PROMPT) :]


@pytest.fixture(scope="module")
def target():
    return model(0)


@pytest.fixture(scope="module")
def draft():
    return between(0, 1)


def build(target, draft, rule, tree, cascade) -> Engine:
    return Engine(
        target, CONFIG, speculate(draft, tree, rule, tau=0.7, cascade=cascade)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "tree", "cascade"),
    [
        ("exact", "regular:2x1", Cascade("token_v3", 0.3)),
        ("token", "chain:2", Cascade("opt", 0.2)),
        ("terminal", "regular:2x1", Cascade("diff", 0.3)),
    ],
)
def test_two_tokens_have_the_cascades_distribution(rule, tree, cascade, target, draft):
    engine = build(target, draft, rule, tree, cascade)
    params = [dataclasses.replace(PARAMS, seed=n) for n in range(REQUESTS)]
    requests = run(engine, params)
    counts = np.zeros((V, V))
    for request in requests:
        counts[tuple(request.tokens)] += 1
    p, q = softmax_of(target), softmax_of(draft)
    distribution = distribution_of(
        lambda ids: mixture(cascade.name, cascade.alpha, p(ids), q(ids))
    )
    statistic, freedom = chi_square(counts, distribution)
    assert freedom == 35 and statistic < CRITICAL
    statistic, _ = chi_square(counts, distribution_of(p))
    assert statistic > 2 * CRITICAL, "the cascade is the target: a dead test"
    stats = total([r.stats for r in requests], 0, 0)
    assert stats.tokens_per_step > 1.05 and not stats.lossless
    assert stats.label == f"{rule} (lossy: cascade {cascade.name}, {cascade.alpha:g})"
    assert stats.as_dict()["cascade"] == cascade.name
    # A greedy request beside a sampled one, and alone.
    want = greedy_text(target, draft, cascade, WIDTHS[tree])
    greedy, _ = run(engine, [GREEDY, PARAMS])
    (alone,) = run(engine, [GREEDY])
    assert greedy.tokens == alone.tokens == want
    assert not alone.stats.lossless and alone.stats.tokens_per_step > 1
