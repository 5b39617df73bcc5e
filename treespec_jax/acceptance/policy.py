"""What each request samples from, and where its randomness comes from.

The policy is the target's own distribution after temperature, top-k, top-p and min-p,
in that order. All three truncations keep tokens above a threshold, so they compose as
the highest of the three. A token that ties with the threshold is kept.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from treespec_jax.acceptance.select import argmax

# Sorted candidates looked at before the whole vocabulary is sorted. Distributions that
# need more (a flat one with top-p, or a larger top-k) take the slow path, same result.
SHORT_LIST = 256
# Temperatures below this are greedy: logits / temperature would overflow.
MIN_TEMPERATURE = 1e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings per slot, as arrays, so that they may differ within a batch.

    Attributes:
      temperature: float32 [B]; 0 is greedy.
      top_k: int32 [B]; 0 keeps all.
      top_p: float32 [B].
      min_p: float32 [B].
      seed: uint32 [B].
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array

    @property
    def greedy(self) -> jax.Array:
        """bool [B]."""
        return self.temperature < MIN_TEMPERATURE


def gumbel_noise(seed_B: jax.Array, positions_BC: jax.Array, vocab: int) -> jax.Array:
    """float32 [B, C, V] Gumbel noise, a function of (seed, absolute position) alone.

    Counter based (threefry), so that plain decoding, every drafter and every tree see
    the same noise for the token at a position (common random numbers).
    """

    def draw(seed, position):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (vocab,), jnp.float32)

    return jax.vmap(jax.vmap(draw, (None, 0)))(seed_B, positions_BC)


def truncate(logits_BTV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits over temperature, with -inf where top-k, top-p or min-p cut.

    Greedy slots come back unscaled.

    Args:
      logits_BTV: float32.
      sampling: settings per slot.
    """

    def per_slot(x):
        return x[:, None, None]

    greedy = per_slot(sampling.greedy)
    scaled = logits_BTV / jnp.where(greedy, 1.0, per_slot(sampling.temperature))
    best = jnp.max(scaled, axis=-1, keepdims=True)
    min_p = per_slot(jnp.where(sampling.greedy, 0.0, sampling.min_p))
    floor = best + jnp.log(min_p)

    cuts = ~sampling.greedy & ((sampling.top_k > 0) | (sampling.top_p < 1.0))
    cut = lax.cond(
        jnp.any(cuts),
        lambda: _rank_threshold(scaled, best, sampling),
        lambda: jnp.full_like(best, -jnp.inf),
    )
    floor = jnp.maximum(floor, jnp.where(per_slot(cuts), cut, -jnp.inf))
    return jnp.where(scaled >= floor, scaled, -jnp.inf)


def _rank_threshold(scaled_BTV, best_BT1, sampling):
    """Lowest kept score [B, T, 1] under top-k, then top-p of what top-k kept."""
    vocab = scaled_BTV.shape[-1]
    top_k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    top_k = top_k[:, None, None]
    top_p = sampling.top_p[:, None, None]
    weights = jnp.exp(scaled_BTV - best_BT1)
    whole = jnp.sum(weights, axis=-1, keepdims=True)

    def from_list(length):
        sorted_BTJ = lax.top_k(scaled_BTV, length)[0]
        weight_BTJ = jnp.exp(sorted_BTJ - best_BT1)
        kept = jnp.arange(length) < top_k
        mass = jnp.cumsum(jnp.where(kept, weight_BTJ, 0.0), axis=-1)
        # The list holds all that top-k keeps, or top-k keeps everything.
        total = jnp.where(top_k <= length, mass[..., -1:], whole)
        enough = mass >= top_p * total
        by_p = jnp.where(
            jnp.any(enough, axis=-1, keepdims=True) & (top_p < 1.0),
            jnp.argmax(enough, axis=-1, keepdims=True),
            length - 1,
        )
        last = jnp.minimum(by_p, top_k - 1)
        last = jnp.minimum(last, length - 1)
        found = jnp.any(enough, axis=-1, keepdims=True) | (top_p >= 1.0)
        found &= (top_k <= length) | (top_p < 1.0)
        threshold = jnp.take_along_axis(sorted_BTJ, last, axis=-1)
        nothing = (top_k >= vocab) & (top_p >= 1.0)
        return jnp.where(nothing, -jnp.inf, threshold), jnp.all(found | nothing)

    if vocab <= SHORT_LIST:
        return from_list(vocab)[0]
    short, found = from_list(SHORT_LIST)
    return lax.cond(found, lambda: short, lambda: from_list(vocab)[0])


def choose(
    logits_BTV: jax.Array,
    depth_BT: jax.Array,
    noise_BCV: jax.Array,
    sampling: Sampling,
) -> jax.Array:
    """int32 [B, T]: the token that the policy emits after each node.

    `argmax(log p + g)` with the noise of the position after the node (Gumbel-max); a
    sample from p. Greedy slots take the argmax of the logits.

    Args:
      logits_BTV: float32, the target's.
      depth_BT: int32, depth of each node.
      noise_BCV: float32 [B, C + 1, V], noise of the positions after depth 0..C.
      sampling: settings per slot.
    """

    def sampled():
        return argmax(perturbed(logits_BTV, depth_BT, noise_BCV, sampling))

    return lax.cond(jnp.all(sampling.greedy), lambda: argmax(logits_BTV), sampled)


def perturbed(logits_BTV, depth_BT, noise_BCV, sampling) -> jax.Array:
    """float32 [B, T, V]: truncated log p (up to a constant) plus noise of the node."""
    noise_BTV = jnp.take_along_axis(noise_BCV, depth_BT[:, :, None], axis=1)
    quiet = sampling.greedy[:, None, None]
    return truncate(logits_BTV, sampling) + jnp.where(quiet, 0.0, noise_BTV)


def step_noise(
    sampling: Sampling, next_position_B: jax.Array, count: int, vocab: int
) -> jax.Array:
    """Noise [B, count, V] of the positions from `next_position` on; zeros if greedy."""
    positions = next_position_B[:, None] + jnp.arange(count)
    shape = (*positions.shape, vocab)
    return lax.cond(
        jnp.all(sampling.greedy),
        lambda: jnp.zeros(shape, jnp.float32),
        lambda: gumbel_noise(sampling.seed, positions, vocab),
    )
