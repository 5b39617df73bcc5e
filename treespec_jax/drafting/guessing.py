"""From the logits of a model to guesses of few tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from treespec_jax.branches import branch
from treespec_jax.drafting.protocol import Guesses
from treespec_jax.sampling import policy
from treespec_jax.sampling.policy import Sampling
from treespec_jax.sampling.select import top_k


def best_guesses(
    logits_VR: jax.Array,
    noise_VB: jax.Array | None,
    sampling: Sampling,
    count: int,
    tau: float,
    source: int = 0,
) -> Guesses:
    """The best tokens after R = B·W nodes, B major, as the model estimates them.

    Args:
      logits_VR: float32, after the nodes.
      noise_VB: float32, of their position, where the target's choice will share it.
      sampling: settings per slot.
      count: K, tokens of each node.
      tau: temperature by which estimates of greedy slots are sharpened.
      source: number in `Drafter.sources`.
    """
    count = min(count, logits_VR.shape[0])
    slots = sampling.greedy.shape[0]
    width = logits_VR.shape[1] // slots

    def greedy():
        values_RK, tokens_RK = top_k(logits_VR / tau, count)
        return tokens_RK, _log_softmax(values_RK, values_RK)

    def sampled():
        log_VR = policy.truncate(logits_VR, sampling)
        scores_VR = log_VR
        if noise_VB is not None:
            scores_VR = policy.perturbed(logits_VR, noise_VB, sampling)
        _, tokens_RK = top_k(scores_VR, count)
        log_VR /= jnp.repeat(jnp.where(sampling.greedy, tau, 1.0), width)
        column_R1 = jnp.arange(log_VR.shape[1])[:, None]
        values_RK = log_VR[tokens_RK, column_R1]
        return tokens_RK, _log_softmax(values_RK, log_VR.T)

    tokens_RK, log_RK = branch(sampling.all_greedy, greedy, sampled)
    shape = slots, width, count
    tokens, log_prob = tokens_RK.reshape(shape), log_RK.reshape(shape)
    return Guesses(tokens, log_prob, jnp.full(shape, source, jnp.int32))


def _log_softmax(values_RK, all_RJ):
    """Of values, over all those of their row; -inf stays."""
    log_RK = values_RK - jax.nn.logsumexp(all_RJ, axis=1, keepdims=True)
    return jnp.where(values_RK > -jnp.inf, log_RK, -jnp.inf)
