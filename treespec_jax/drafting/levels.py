"""Whether one more level of a best-first tree pays, decided while the tree is grown.

Steps i that emit E_i tokens in expectation and take t_i seconds are worth sum E_i /
sum t_i tokens per second. Let R be the most that any way of stopping attains. Then no
way attains more than 0 of sum (E_i - R t_i), and the best one attains 0 (Dinkelbach,
Management Science 1967; in foraging theory, the marginal value theorem of Charnov,
1976): every step by itself has to maximise E - R t. So a level that adds dE tokens and
takes c seconds pays if

    dE > R c,    or    dE * (seconds of a step per token) > c,

marginal gain over marginal cost against the ratio of all steps, not of this one: a sure
step goes on where its own ratio would already fall. Where the gains of the levels only
fall, the first level that does not pay is the best end. Any R below or above the best
one is drawn to it if it follows what the steps bring. Texts of a batch share the time
of a level: their gains are summed, and `level_price` is R c for each text.

dE is not known before the level has run. It is what the N best paths would gain if the
children of every node were as sure as those of the level before, rank by rank
(`family_profile`). A child that would not get among the N best gains nothing: a full
tree of likely paths does not grow on.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from treespec_jax.sampling.select import top_k_rows


def pays(
    gain_B: jax.Array, active_B: jax.Array, level_price: jax.Array | float
) -> jax.Array:
    """bool []: whether one more level pays, see above.

    Args:
      gain_B: dE, expected tokens that it adds to each text.
      active_B: bool, texts that count.
      level_price: R c, for each text; at 0 whatever gains anything pays.
    """
    worth_B = jnp.where(active_B, gain_B - level_price, 0.0)
    return jnp.sum(worth_B) > 0


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
