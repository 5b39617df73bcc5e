"""TokenTree: the only thing that a drafter hands to the verifier."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from treespec_jax.trees.topology import Topology


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("mass", "total", "left"),
    meta_fields=("nodes", "levels", "most", "replacement"),
)
@dataclasses.dataclass(frozen=True)
class Proposal:
    """The distributions that the nodes of a tree were drawn from.

    q(x | n) = mass[x, b, e] / total[b, e] for the expanded node n = nodes[e]; its child
    t was drawn from q without the siblings before it, whose complement has the share
    left[b, t].

    Attributes:
      mass: float32 [Vd, B, E], q up to a factor, after all processing. Vd may be less
        than the target's V; q is 0 beyond. Of greedy slots it is q at temperature 1
        with nothing cut, and if all slots are greedy the logarithm of that instead, up
        to a constant (total is 1): only a cascade looks at it then.
      total: float32 [B, E], its sums.
      left: float32 [B, T], 1 for the root, for first children and with replacement.
      nodes: static, E ascending numbers of the nodes that may have children.
      levels: static, nodes at depth 0, 1, …, C; they are numbered level by level.
      most: static, the most children that a node of depth 0, …, C - 1 may have.
      replacement: static, whether siblings were drawn independently.

    Of a tree of likeliest tokens (draws "best_kept") `left` is 1 and means nothing.
    """

    mass: jax.Array
    total: jax.Array
    left: jax.Array
    nodes: tuple[int, ...]
    levels: tuple[int, ...]
    most: tuple[int, ...]
    replacement: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTree:
    """A tree of guesses per slot.

    Siblings carry different tokens, unless they were drawn with replacement; of a
    sampled tree they are numbered in the order in which they were drawn.

    Attributes:
      tokens: int32 [B, T]; node 0 is the root, the newest emitted token.
      parents: int32 [B, T], topological; the root is its own parent.
      depth: int32 [B, T], edges from the root.
      ancestors: bool [B, T, T], self included.
      valid: bool [B, T]; an invalid node is never accepted.
      draft_logprob: float32 [B, T], the drafter's estimate of the log chance that a
        node is right, given that its parent is; 0 for the root. Of a sampled tree it is
        log q.
      proposal: how a tree was drawn that keeps q (`facts.KEPT`); None for any other.
    """

    tokens: jax.Array
    parents: jax.Array
    depth: jax.Array
    ancestors: jax.Array
    valid: jax.Array
    draft_logprob: jax.Array
    proposal: Proposal | None = None


def static_tree(
    topology: Topology, tokens_BT, logprob_BT, proposal: Proposal | None = None
) -> TokenTree:
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
        proposal=proposal,
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
