"""Speculation never changes a token, whatever the model family.

Tiny random targets, each with its own first layer as drafter, over prompts shorter and
much longer than the windows, in a ragged batch.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.engine.support import build, run
from tests.models.decoder import FAMILIES, random_model
from tests.oracles import Ties, perturbed_scores
from treespec_jax.config import SamplingParams
from treespec_jax.models.transformer import Transformer

TOKENS = 20
SETTINGS = [
    SamplingParams(max_tokens=TOKENS),
    SamplingParams(max_tokens=TOKENS, temperature=0.8, top_p=0.95),
]
# A window looks at positions within the tree, and two families with one run both kinds
# of tree; the other features do not, and one tree shows that the whole step has them.
TREES = {
    "llama3": ["dynamic:6@3"],
    "qwen2": ["dynamic:6@3"],
    "qwen3": ["regular:2x1x1"],
    "mistral": ["regular:2x1x1", "dynamic:6@3"],
    "gemma2": ["dynamic:6@3"],
    "gemma3": ["regular:2x1x1", "dynamic:6@3"],
}
# A prefix of more than one block of 64 rows: a window skips some.
_rng = np.random.default_rng(0)
PROMPTS = [_rng.integers(3, 61, n).tolist() for n in (2, 21, 90)]


def drafter_of(target: Transformer) -> Transformer:
    """The target's first layer between its embedding and head: right now and then."""
    config = target.config
    local = tuple(i for i in config.local_layers if i == 0)
    config = dataclasses.replace(
        config,
        num_layers=1,
        local_layers=local,
        window=config.window if local else None,
    )
    model = Transformer(config, rngs=nnx.Rngs(1))
    state = dict(nnx.to_flat_state(nnx.state(target)))
    own = nnx.state(model)
    for path, leaf in nnx.to_flat_state(own):
        leaf[...] = jnp.array(state[path][...])
    nnx.update(model, own)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_tokens_equal_plain_decoding(name, capsys):
    """Greedy and sampled, static and dynamic trees, some deeper than the window."""
    config = FAMILIES[name]
    if name == "gemma3":
        # One local and one global layer: compiling is what this test pays for.
        config = dataclasses.replace(config, num_layers=2, local_layers=(0,))
    target = random_model(config)
    draft = drafter_of(target)
    ties = Ties(target)

    def tokens_of(shape):
        engine = build(target, draft, shape, 3, 8, 4)
        return [run(engine, PROMPTS, params) for params in SETTINGS]

    plain = tokens_of("none")
    # Plain decoding itself, against one causal pass without cache.
    for params, requests in zip(SETTINGS, plain, strict=True):
        ids = PROMPTS[2] + requests[2].tokens[:-1]
        scores = perturbed_scores(target, ids, dataclasses.replace(params, seed=2))
        assert scores.argmax() == requests[2].tokens[-1]
    for shape in TREES[name]:
        found = tokens_of(shape)
        for params, want, requests in zip(SETTINGS, plain, found, strict=True):
            for i, request in enumerate(requests):
                seeded = dataclasses.replace(params, seed=i)
                ties.check(PROMPTS[i], want[i].tokens, request.tokens, seeded)
        steps = sum(r.stats.steps for requests in found for r in requests)
        emitted = sum(r.stats.tokens for requests in found for r in requests)
        with capsys.disabled():
            print(f"\n{name} {shape}: {emitted / steps:.2f} tokens per step", end="")
        assert emitted / steps > 1.2, "the drafter is never right: a dead test"
    with capsys.disabled():
        print(f"; {ties.seen} near ties in {ties.tokens} tokens")


@pytest.mark.slow
def test_a_model_with_a_window_drafts_for_itself_without_a_miss():
    """Drafted level by level, over waiting and earlier rows, as verified in one pass.

    A drafter that took wrong positions for a row of its scratch would look through
    another window than the target: text stays right, but guesses do not.
    """
    model = random_model(FAMILIES["mistral"])
    engine = build(model, model, "chain:4", 1, 8, 2)
    for params in SETTINGS:
        (request,) = run(engine, PROMPTS[1:2], params)
        assert (request.stats.tokens, request.stats.steps) == (TOKENS, TOKENS // 5)
