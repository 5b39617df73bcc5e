"""Models of six tokens, whose texts can be counted."""

from __future__ import annotations

from flax import nnx

from tests.engine.support import serve
from treespec_jax.config import EngineConfig, ModelConfig, SamplingParams
from treespec_jax.engine.request import Request
from treespec_jax.models.transformer import Transformer

V, REQUESTS = 6, 3072
PROMPT = [1, 4, 2]
SAMPLED = SamplingParams(max_tokens=2, temperature=0.8, top_k=5, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
# Ends a text, where it is not ignored.
END = 2
# Quantile 0.999 of chi-square by degrees of freedom.
CRITICAL = {16: 39.25, 23: 49.73, 24: 51.18}
MODEL = ModelConfig(
    vocab_size=V,
    embed_dim=16,
    mlp_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=64,
)
CONFIG = EngineConfig(
    max_batch=64, max_len=24, page_size=8, steps_per_dispatch=2, prefill_chunks=(4,)
)


def model(seed) -> Transformer:
    made = Transformer(MODEL, rngs=nnx.Rngs(seed))
    made.norm.scale[...] = made.norm.scale[...] * 2.0
    return made


def between(seed, other_seed) -> Transformer:
    """A model between two others."""
    made, other = model(seed), model(other_seed)
    for name in ("embedding", "head"):
        mine, its = getattr(made, name), getattr(other, name)
        mine[...] = 0.8 * mine[...] + 0.6 * its[...]
    return made


def run(engine, params) -> list[Request]:
    """Requests that go on from PROMPT."""
    return serve(engine, [Request(PROMPT, p) for p in params])


def chi_square(counts, distribution):
    """Statistic and degrees of freedom, over cells that can occur."""
    some = distribution > 0
    assert not counts[~some].any()
    expected = counts.sum() * distribution[some]
    return float(((counts[some] - expected) ** 2 / expected).sum()), some.sum() - 1
