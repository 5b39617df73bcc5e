"""TokenTree: the only thing that a drafter hands to the verifier."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from treespec_jax.trees.topology import Topology


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTree:
    """A tree of guesses per slot. Siblings carry different tokens.

    Attributes:
      tokens: int32 [B, T]; node 0 is the root, the newest emitted token.
      parents: int32 [B, T], topological; the root is its own parent.
      depth: int32 [B, T], edges from the root.
      ancestors: bool [B, T, T], self included.
      valid: bool [B, T]; an invalid node is never accepted.
      draft_logprob: float32 [B, T], the drafter's estimate of the log chance that a
        node is right, given that its parent is; 0 for the root.
    """

    tokens: jax.Array
    parents: jax.Array
    depth: jax.Array
    ancestors: jax.Array
    valid: jax.Array
    draft_logprob: jax.Array


def static_tree(topology: Topology, tokens_BT, logprob_BT) -> TokenTree:
    """Dresses a static topology with tokens."""
    B, T = tokens_BT.shape
    parents = jnp.maximum(jnp.asarray(topology.parents, jnp.int32), 0)
    return TokenTree(
        tokens=tokens_BT,
        parents=jnp.broadcast_to(parents, (B, T)),
        depth=jnp.broadcast_to(jnp.asarray(topology.depths), (B, T)),
        ancestors=jnp.broadcast_to(jnp.asarray(topology.ancestors), (B, T, T)),
        valid=logprob_BT > -jnp.inf,
        draft_logprob=logprob_BT,
    )


def ancestors_of(parents_BT: jax.Array, depth: int) -> jax.Array:
    """bool [B, T, T] from parents, by walking up `depth` times."""
    B, T = parents_BT.shape
    node_T = jnp.arange(T, dtype=parents_BT.dtype)
    at_BT = jnp.broadcast_to(node_T, (B, T))
    seen = at_BT[:, :, None] == node_T
    for _ in range(depth):
        at_BT = jnp.take_along_axis(parents_BT, at_BT, axis=1)
        seen |= at_BT[:, :, None] == node_T
    return seen
