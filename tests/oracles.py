"""Independent ways to get what the engine computes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from treespec_jax.config import SamplingParams
from treespec_jax.models.transformer import Transformer
from treespec_jax.sampling import noise, policy

# Two perturbed scores closer than this may be ordered either way by rounding.
TIE = 1e-4


def sampling(params: SamplingParams, batch: int = 1) -> policy.Sampling:
    """The same settings for every slot."""
    return policy.Sampling(
        temperature=jnp.full(batch, params.temperature, jnp.float32),
        top_k=jnp.full(batch, params.top_k, jnp.int32),
        top_p=jnp.full(batch, params.top_p, jnp.float32),
        min_p=jnp.full(batch, params.min_p, jnp.float32),
        seed=jnp.full(batch, params.seed, jnp.uint32),
    )


@functools.cache
def _jitted(model: Transformer, size: int):
    @jax.jit
    def logits(tokens):
        at = jnp.arange(size)[None]
        forward = model(tokens, at, jnp.tril(jnp.ones((1, size, size), bool)))
        return model.logits(forward.hidden)

    return logits


def full_logits(model: Transformer, ids: list[int], size: int = 256) -> np.ndarray:
    """Logits [len(ids), V] of one causal pass without cache, padded to one shape."""
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(_jitted(model, size)(tokens))[: len(ids)]


def perturbed_scores(model, ids, params: SamplingParams) -> np.ndarray:
    """Scores [V] whose argmax is the token after `ids`."""
    logits = jnp.asarray(full_logits(model, ids)[-1])[:, None]
    settings = sampling(params)
    own = noise.gumbel(settings.seed, jnp.full(1, len(ids)), logits.shape[0])
    return np.asarray(policy.perturbed(logits, own, settings))[:, 0]


class Ties:
    """Counts divergences that rounding explains; any other is an assertion."""

    def __init__(self, model: Transformer):
        self.model = model
        self.seen = 0
        self.tokens = 0

    def check(self, prompt, plain, speculative, params: SamplingParams) -> None:
        """Compares the two token lists of one request."""
        self.tokens += len(plain)
        if plain == speculative:
            return
        pairs = list(zip(plain, speculative, strict=False))
        at = next(
            (i for i, (a, b) in enumerate(pairs) if a != b),
            min(len(plain), len(speculative)),
        )
        scores = perturbed_scores(self.model, [*prompt, *plain[:at]], params)
        second, best = np.sort(scores)[-2:]
        assert best - second < TIE, (
            f"token {at} differs: plain {plain[at : at + 1]}, speculative "
            f"{speculative[at : at + 1]}, scores apart by {best - second}, {params}"
        )
        self.seen += 1
