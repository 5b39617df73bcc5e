"""What a step tells the host of its trees and of the tokens that it emitted."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from treespec_jax.acceptance.protocol import Verdict
from treespec_jax.branches import branch
from treespec_jax.engine.state import Control, Emission, TopTokens, Trees
from treespec_jax.sampling import select
from treespec_jax.trees.token_tree import TokenTree, orders


@dataclasses.dataclass(frozen=True)
class Decided:
    """What of a tree is kept.

    Attributes:
      verdict: of the rule.
      counts: int32 [B], tokens to emit; 0 for an idle slot.
      ended: bool [B], whether one of them ends the text.
    """

    verdict: Verdict
    counts: jax.Array
    ended: jax.Array


def emission_of(
    tree: TokenTree, logits_VR: jax.Array, decided: Decided, control: Control
) -> Emission:
    """What a step tells, of a tree and the target's logits [V, B·T] of its nodes."""
    verdict, sources_BT = decided.verdict, tree.source
    if sources_BT is None:
        sources_BT = jnp.zeros_like(tree.parents)
    logprobs, top = _logprobs(logits_VR, verdict, control)
    return Emission(
        tokens=verdict.emitted,
        counts=decided.counts,
        logprobs=logprobs,
        top=top,
        ranks=child_ranks(tree, verdict.path),
        sources=jnp.take_along_axis(sources_BT, verdict.path[:, 1:], axis=1),
        orders=orders(tree, verdict.path),
        trees=Trees(
            parents=tree.parents,
            log_prob=jnp.where(tree.valid, tree.draft_logprob, -jnp.inf),
            path=verdict.path,
            tokens=tree.tokens,
            sources=sources_BT,
            target_log_prob=_target_log_prob(logits_VR, tree),
        ),
    )


def log_probs_of(
    logits_VR: jax.Array, tokens: jax.Array, count: int
) -> tuple[jax.Array, TopTokens | None]:
    """Log p of tokens, and the `count` likeliest ones in their stead; None for 0.

    Args:
      logits_VR: float32, the target's, a column for each of R tokens.
      tokens: int32 of any shape with R entries.
      count: K.
    """
    logits_R = logits_VR[tokens.reshape(-1), jnp.arange(tokens.size)]
    total_R = jax.nn.logsumexp(logits_VR, axis=0)
    log_probs = (logits_R - total_R).reshape(tokens.shape)
    if not count:
        return log_probs, None
    best_RK, tokens_RK = select.top_k(logits_VR, count)
    ranks_R = 1 + jnp.sum(logits_VR > logits_R, axis=0, dtype=jnp.int32)
    top = TopTokens(
        tokens=tokens_RK.reshape(*tokens.shape, count),
        log_probs=(best_RK - total_R[:, None]).reshape(*tokens.shape, count),
        ranks=ranks_R.reshape(tokens.shape),
    )
    return log_probs, top


def _logprobs(logits_VR, verdict: Verdict, control: Control):
    """Log p [B, C + 1] of the emitted tokens, and the likeliest ones beside them.

    Computed only when somebody asked.
    """
    slots = verdict.path.shape[0]
    nodes = logits_VR.shape[1] // slots
    column_BC = verdict.path + nodes * jnp.arange(slots)[:, None]
    if control.top:
        columns_VR = logits_VR[:, column_BC.reshape(-1)]
        return log_probs_of(columns_VR, verdict.emitted, control.top)

    def compute():
        rows_BCV = logits_VR.T[column_BC]
        chosen = jnp.take_along_axis(rows_BCV, verdict.emitted[:, :, None], axis=2)
        return chosen[..., 0] - jax.nn.logsumexp(rows_BCV, axis=-1)

    said = control.sampling.known.logprobs
    chosen = branch(
        jnp.any(control.want_logprobs) if said is None else said,
        compute,
        lambda: jnp.zeros(verdict.path.shape, jnp.float32),
    )
    return chosen, None


def _target_log_prob(logits_VR, tree: TokenTree):
    """Log p of every node's token after its parent [B, T]; 0 for the root."""
    B, T = tree.tokens.shape
    column_BT = tree.parents + T * jnp.arange(B)[:, None]
    total_BT = jax.nn.logsumexp(logits_VR, axis=0)[column_BT]
    log_BT = logits_VR[tree.tokens, column_BT] - total_BT
    return jnp.where(jnp.arange(T) > 0, log_BT, 0.0)


def child_ranks(tree: TokenTree, path_BC: jax.Array) -> jax.Array:
    """How many siblings stand before each node of a path [B, C], the root left out."""
    node_T = jnp.arange(tree.parents.shape[1])
    above_BC1, node_BC1 = path_BC[:, :-1, None], path_BC[:, 1:, None]
    sibling_BT = tree.valid & (node_T > 0)
    before_BCT = (tree.parents[:, None] == above_BC1) & (node_T < node_BC1)
    return jnp.sum(before_BCT & sibling_BT[:, None], axis=2, dtype=jnp.int32)
