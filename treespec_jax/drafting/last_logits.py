"""The runners-up of the newest token draft the one after it.

LogitSpec (2507.01449): what the target nearly said instead of the newest token is often
what it says next. Each candidate is completed by what followed its latest earlier
match; other sources complete it too, where a tree has them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from treespec_jax.checks import check_int
from treespec_jax.drafting import matches as matching
from treespec_jax.drafting.matches import Matches
from treespec_jax.drafting.protocol import Committed, Needs, Sizes
from treespec_jax.drafting.rates import Rates
from treespec_jax.drafting.sources import Nodes, Outlook, SourceDrafter

# Worth of the first, second, … candidate, at first.
PRIOR = 0.08
# Tokens of a match of a candidate: itself, and the newest token before it.
LONGEST = 2


@dataclasses.dataclass(frozen=True)
class LastLogitsOptions:
    """Settings of method "last_logits".

    Attributes:
      candidates: K, runners-up.
    """

    candidates: int = 6

    def __post_init__(self):
        check_int("candidates", self.candidates, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LastLogitsState:
    """The candidates, and what completes them.

    Attributes:
      candidates: int32 [B, K], NOBODY where nothing is known.
      worth: of the candidates, by rank.
      found: a match for each candidate, which begins with it; of length 0 where it
        stands alone.
      rates: of these matches by length.
    """

    candidates: jax.Array
    worth: Rates
    found: Matches
    rates: Rates


class LastLogits:
    """See `sources.Source`.

    Args:
      candidates: see `LastLogitsOptions`.
    """

    name = "last logits"
    history = 0

    def __init__(self, candidates: int):
        self.candidates = candidates
        # The newest token itself may be among the best.
        self.needs = Needs(history=True, successors=candidates + 1)

    def init(self, sizes: Sizes) -> LastLogitsState:
        K = self.candidates
        return LastLogitsState(
            candidates=jnp.full((sizes.batch, K), matching.NOBODY, jnp.int32),
            worth=Rates.start([PRIOR / rank for rank in range(1, K + 1)]),
            found=Matches.none(sizes, K),
            rates=matching.start_rates(),
        )

    def ingest(self, state: LastLogitsState, committed: Committed) -> LastLogitsState:
        known, worth = state.candidates, state.worth
        found, rates = state.found, state.rates
        if committed.slot is None:
            slots_n = jnp.arange(known.shape[0])
            moved_n1 = (committed.count > 0)[:, None]
            hit_BK = known == committed.following[:, :1]
            rank_BK = jnp.broadcast_to(jnp.arange(known.shape[1]), known.shape)
            tried_BK = moved_n1 & (known != matching.NOBODY)
            worth = worth.after(rank_BK, hit_BK, tried_BK)
            rates = matching.observe(rates, found, committed, first=1)
            # A step that grows no tree finds nothing anew.
            found = found.forgotten()
        else:
            slots_n, moved_n1 = committed.slot[None], True
        fresh = jnp.where(moved_n1, self._runners_up(committed), known[slots_n])
        known = known.at[slots_n].set(fresh)
        return LastLogitsState(known, worth, found, rates)

    def _runners_up(self, committed: Committed):
        """The best tokens [n, K] beside the root, NOBODY if nothing was computed."""
        found, K = committed.successors, self.candidates
        newest_n1 = found.newest[:, None]
        best_nJ = jnp.take_along_axis(found.best, newest_n1[:, :, None], axis=1)[:, 0]
        real_n1 = jnp.take_along_axis(found.real, newest_n1, axis=1)
        # A stable sort by "is the root" moves it to the end.
        order_nJ = jnp.argsort(best_nJ == committed.root[:, None], axis=1)
        best_nK = jnp.take_along_axis(best_nJ, order_nJ, axis=1)[:, :K]
        lacking = K - best_nK.shape[1]
        best_nK = jnp.pad(
            best_nK, ((0, 0), (0, max(lacking, 0))), constant_values=matching.NOBODY
        )
        best_nK = jnp.where(
            best_nK == committed.root[:, None], matching.NOBODY, best_nK
        )
        return jnp.where(real_n1, best_nK, matching.NOBODY)

    def copy_slot(self, state: LastLogitsState, source, destination):
        known = state.candidates
        return dataclasses.replace(
            state,
            candidates=known.at[destination].set(known[source]),
            found=state.found.copy_slot(source, destination),
        )

    def copy_pages(self, state: LastLogitsState, copies) -> LastLogitsState:
        return state

    def resume(self, state: LastLogitsState, committed: Committed) -> LastLogitsState:
        # The candidates come from the newest row, which is not in the cache yet.
        return state

    def look(self, state: LastLogitsState, outlook: Outlook) -> LastLogitsState:
        if outlook.depth == 0:
            return state
        known_BK, texts = state.candidates, outlook.texts
        B, K = known_BK.shape
        root_BK = jnp.broadcast_to(outlook.context.root[:, None], (B, K))
        tail_BK2 = jnp.stack([root_BK, known_BK], axis=2)
        width = state.found.following.shape[2]
        best = matching.find(texts, tail_BK2, width, 1, self.history, guessed=1)
        # A candidate comes first, and then what followed its match.
        following_BKC = best.following.reshape(B, K, width)[:, :, :-1]
        following_BKC = jnp.concatenate([known_BK[:, :, None], following_BKC], axis=2)
        found = Matches(following_BKC, best.lengths.reshape(B, K))
        return dataclasses.replace(state, found=found)

    def guess(self, state: LastLogitsState, nodes: Nodes, scratch):
        if scratch is None:
            tokens_B1K = state.candidates[:, None]
            log_K = state.worth.log(jnp.arange(self.candidates))
            log_B1K = jnp.where(tokens_B1K != matching.NOBODY, log_K, -jnp.inf)
            return tokens_B1K, log_B1K, jnp.ones(tokens_B1K.shape, bool)
        return matching.guess(state.found, state.rates, nodes, scratch)


class LastLogitsDrafter(SourceDrafter):
    """The method "last_logits"; see `protocol.Drafter`."""

    Options = LastLogitsOptions

    @classmethod
    def make(cls, model, tau, options: LastLogitsOptions):
        return cls((LastLogits(options.candidates),))
