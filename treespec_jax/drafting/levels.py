"""Whether one more level of a best-first tree pays, decided while the tree is grown.

A step that emits E tokens in expectation and takes t seconds is worth E / t tokens per
second. One more level of the drafter adds dE tokens and takes c seconds. Because

    (E + dE) / (t + c) > E / t    exactly if    dE * (t / E) > c,

a level pays if the tokens that it adds, at the time that a token costs now, are worth
more than its time: marginal gain over marginal cost against their ratio so far. Where
the gains of the levels only fall, the ratio rises up to the first level that does not
pay and falls from there on, so that stopping there is the best of all depths (the rule
of marginal values; of chains, where dE is the probability of the whole path, it is the
stopping rule of 2405.19715). Texts of a batch share the time of a level: their tokens
are summed.

With p = c / (t of the step without any level), `level_price`, and n levels so far,
t / c = 1 / p + n, and a level pays if dE (1 + n p) > p E.

E is known: 1, and the paths of the N best candidates. dE is not, before the level has
run. It is what the N best would gain if the children of every node were as sure as
those of the level before, rank by rank (`family_profile`). A child that would not get
among the N best gains nothing: a full tree of likely paths does not grow on.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from treespec_jax.sampling.select import top_k_rows


def pays(
    gain: jax.Array | float,
    tokens: jax.Array | float,
    levels: int,
    level_price: jax.Array | float,
) -> jax.Array:
    """bool: whether one more level pays, see above.

    Args:
      gain: dE, expected tokens that it adds, over all texts.
      tokens: E, expected tokens of the step so far.
      levels: n, run so far.
      level_price: p >= 0; at 0 whatever gains anything pays.
    """
    return gain * (1 + levels * level_price) > level_price * tokens


def best_tokens(path_BN: jax.Array, nodes: int) -> jax.Array:
    """float32 [B]: tokens of the `nodes` likeliest of some paths (probabilities)."""
    return jnp.sum(top_k_rows(path_BN, min(nodes, path_BN.shape[1]))[0], axis=1)


def family_profile(parent_BW: jax.Array, path_BWX: jax.Array) -> jax.Array:
    """float32 [B, X]: how sure the first, second, … children are, given their parents.

    Args:
      parent_BW: probabilities of the paths of a level's parents.
      path_BWX: of their children, best first.
    """
    parents_B1 = jnp.sum(parent_BW, axis=1, keepdims=True)
    return jnp.sum(path_BWX, axis=1) / jnp.maximum(parents_B1, 1e-30)


def gain_of_level(
    seen_BN: jax.Array, frontier_BW: jax.Array, profile_BX: jax.Array, nodes: int
) -> jax.Array:
    """float32 [B]: expected tokens that expanding a frontier adds to the best paths.

    Args:
      seen_BN: probabilities of the paths of all candidates so far.
      frontier_BW: of those that would be expanded.
      profile_BX: of their children, see `family_profile`.
      nodes: N, of the tree.
    """
    new_BWX = frontier_BW[:, :, None] * profile_BX[:, None]
    all_BN = jnp.concatenate([seen_BN, new_BWX.reshape(len(seen_BN), -1)], axis=1)
    return best_tokens(all_BN, nodes) - best_tokens(seen_BN, nodes)
