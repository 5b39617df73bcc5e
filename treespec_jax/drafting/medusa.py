"""Heads on the target's last row draft all levels at once (Medusa; `models.medusa`).

A head says the same of every node at its depth: what it scores is a tree's level, not a
node's children. Deeper levels than heads stay empty.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from treespec_jax.drafting import growth
from treespec_jax.drafting.guessing import best_guesses
from treespec_jax.drafting.protocol import (
    Committed,
    DraftContext,
    Level,
    Needs,
    NoOptions,
    Scores,
    Sizes,
)
from treespec_jax.models.eagle import spread
from treespec_jax.models.medusa import MedusaHeads

# Tokens of a level that are looked at.
GUESSES = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MedusaState:
    """What the heads read.

    Attributes:
      hidden: [B, D], the target's normed row of the token before the root; of no use
        where no token is.
    """

    hidden: jax.Array


class Medusa:
    """See `protocol.Drafter`.

    Args:
      heads: with their last matrix.
      tau: temperature of the estimate that a child is right.
    """

    sources = ("medusa",)
    Options = NoOptions

    def __init__(self, heads: MedusaHeads, tau: float):
        self.module = heads
        self.tau = tau
        self.needs = Needs(feature_layers=heads.config.feature_layers)

    @classmethod
    def make(cls, model, tau, options):
        return cls(model, tau)

    def with_module(self, module):
        return Medusa(module, self.tau)

    def init(self, sizes: Sizes) -> MedusaState:
        width = self.module.config.target_dim
        dtype = self.module.types.dtype
        return MedusaState(jnp.zeros((sizes.batch, width), dtype))

    def ingest(self, state: MedusaState, committed: Committed) -> MedusaState:
        (rows_nCD,) = committed.features
        last_n = jnp.maximum(committed.count - 1, 0)
        last_nD = jnp.take_along_axis(rows_nCD, last_n[:, None, None], axis=1)[:, 0]
        if committed.slot is None:
            moved_B1 = (committed.count > 0)[:, None]
            return MedusaState(jnp.where(moved_B1, last_nD, state.hidden))
        return MedusaState(state.hidden.at[committed.slot].set(last_nD[0]))

    def copy_slot(self, state: MedusaState, source, destination) -> MedusaState:
        return jax.tree.map(lambda x: x.at[destination].set(x[source]), state)

    def copy_pages(self, state: MedusaState, copies) -> MedusaState:
        return state

    def resume(self, state: MedusaState, committed: Committed) -> MedusaState:
        # The heads read the newest row, which is not in the cache yet.
        return state

    def propose(self, state: MedusaState, shape, context: DraftContext):
        logits_KVB = self._logits(state, context)
        heads = self.module.config.heads

        def scores(depth: int, width: int) -> Scores:
            logits_VB = logits_KVB[min(depth, heads - 1)]
            if depth >= heads:
                logits_VB = jnp.full_like(logits_VB, -jnp.inf)
            few = context.proposal in ("shared", "best") and context.penalties is None
            # Plain steps have a root alone, and noise for no level.
            if not few or not shape.depth:
                return jnp.repeat(logits_VB, width, axis=1)
            noise_VB = None
            if context.proposal == "shared":
                noise_VB = context.randomness.noise_rows()[depth]
            found = best_guesses(
                logits_VB, noise_VB, context.sampling, GUESSES, self.tau
            )
            return jax.tree.map(lambda x_B1K: jnp.repeat(x_B1K, width, 1), found)

        def expand(level: Level, scratch):
            return scores(level.depth, level.tokens.shape[1]), ()

        tree = growth.grow(shape, context, scores(0, 1), expand, self.tau)
        return tree, state

    def _logits(self, state: MedusaState, context: DraftContext) -> jax.Array:
        """float32 [K, V, B] over the target's tokens, -inf for those not known."""
        logits_KVB = self.module.logit_columns(state.hidden.T, context.root)
        if self.module.token_ids is None:
            return logits_KVB
        return spread(logits_KVB, self.module.token_ids[...], context.vocab)
