"""TokenTree: the only thing that a drafter hands to the verifier."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from treespec_jax.trees.topology import Topology


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("log_q", "remaining"),
    meta_fields=("nodes", "level_sizes", "max_children", "replacement"),
)
@dataclasses.dataclass(frozen=True)
class Proposal:
    """The distributions that the nodes of a tree were proposed from.

    log_q[x, b, e] is log q(x | n) of the expanded node n = nodes[e]. Its child t was
    sampled from q without the siblings before it, which leaves the share
    remaining[b, t] of q.

    Attributes:
      log_q: float32 [Vd, B, E], normalised, after all processing; -inf where q is 0.
        Vd may be less than the target's V; q is 0 beyond. Of greedy slots it is q at
        temperature 1 with nothing cut, which only a cascade reads.
      remaining: float32 [B, T], 1 for the root, for first children and with
        replacement. Of a tree of likeliest tokens ("best_kept") it is 1.
      nodes: static, E ascending numbers of the nodes that may have children.
      level_sizes: static, nodes at depth 0, 1, …, C; they are numbered level by level.
      max_children: static, bound of the children of a node at depth 0, …, C - 1.
      replacement: static, whether siblings were sampled independently.
    """

    log_q: jax.Array
    remaining: jax.Array
    nodes: tuple[int, ...]
    level_sizes: tuple[int, ...]
    max_children: tuple[int, ...]
    replacement: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTree:
    """A tree of guesses per slot.

    Siblings carry different tokens, unless they were sampled with replacement; of a
    sampled tree they are numbered in the order in which they were sampled.

    Attributes:
      tokens: int32 [B, T]; node 0 is the root, the newest emitted token.
      parents: int32 [B, T], topological; the root is its own parent.
      depth: int32 [B, T], edges from the root.
      ancestors: bool [B, T, T], self included.
      valid: bool [B, T]; an invalid node is never accepted.
      draft_logprob: float32 [B, T], the drafter's estimate of the log probability that
        a node is right, given that its parent is; 0 for the root. Of a sampled tree it
        is log q.
      source: int32 [B, T], where a node comes from (`Drafter.sources`); None if all
        come from the first.
      proposal: how a tree was drawn that keeps q (`compatibility.KEPT`); None for any
        other.
    """

    tokens: jax.Array
    parents: jax.Array
    depth: jax.Array
    ancestors: jax.Array
    valid: jax.Array
    draft_logprob: jax.Array
    source: jax.Array | None = None
    proposal: Proposal | None = None


def static_tree(topology: Topology, tokens_BT, logprob_BT, **more) -> TokenTree:
    """Dresses a static topology with tokens; `more` are further fields."""
    B, T = tokens_BT.shape
    parents = jnp.maximum(jnp.asarray(topology.parents, jnp.int32), 0)
    return TokenTree(
        tokens=tokens_BT,
        parents=jnp.broadcast_to(parents, (B, T)),
        depth=jnp.broadcast_to(jnp.asarray(topology.depths), (B, T)),
        ancestors=jnp.broadcast_to(jnp.asarray(topology.ancestors), (B, T, T)),
        valid=logprob_BT > -jnp.inf,
        draft_logprob=logprob_BT,
        **more,
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


def only_roots(tree: TokenTree, slots_B: jax.Array) -> TokenTree:
    """The tree without nodes below the root in some slots (bool [B])."""
    if tree.tokens.shape[1] == 1:
        return tree
    exists_BT = ~slots_B[:, None] | (tree.depth == 0)
    return dataclasses.replace(
        tree,
        valid=tree.valid & exists_BT,
        draft_logprob=jnp.where(exists_BT, tree.draft_logprob, -jnp.inf),
    )


def number_of_children(tree: TokenTree) -> jax.Array:
    """int32 [B, T]: how many valid nodes have each node as their parent."""
    below_BT = tree.valid & (tree.depth > 0)
    node_T = jnp.arange(tree.tokens.shape[1])
    child_BTT = (tree.parents[:, :, None] == node_T) & below_BT[:, :, None]
    return jnp.sum(child_BTT, axis=1, dtype=jnp.int32)


def orders(tree: TokenTree, path_BC: jax.Array) -> jax.Array:
    """int32 [B, C]: nodes that stand before those of a path by estimated probability.

    That is the probability of the whole path to a node; the root (1) always comes
    first, and of equal nodes the one of lower number.

    Args:
      tree: see `TokenTree`.
      path_BC: int32 [B, C + 1], nodes from the root down.
    """
    log_BT = jnp.where(tree.valid, tree.draft_logprob, -jnp.inf)
    worth_BT = jnp.sum(jnp.where(tree.ancestors, log_BT[:, None], 0.0), axis=2)
    node_BC = path_BC[:, 1:]
    mine_BC1 = jnp.take_along_axis(worth_BT, node_BC, axis=1)[:, :, None]
    node_T = jnp.arange(worth_BT.shape[1])
    before_BCT = worth_BT[:, None] > mine_BC1
    before_BCT |= (worth_BT[:, None] == mine_BC1) & (node_T < node_BC[:, :, None])
    return jnp.sum(before_BCT, axis=2, dtype=jnp.int32)
