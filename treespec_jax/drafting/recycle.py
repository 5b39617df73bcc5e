"""Token Recycling: what followed a token last time (Luo et al., 2408.08696).

A table on the device holds, for every token of the vocabulary, the K best successors
that the target named when it last looked past that token, on whatever path: nodes that
were rejected and the tokens of prompts teach it too. A node's children are its token's
row. What a row is worth is measured: by the rank of the guess and by the probability
that the target gave it then.

With two rows for one token in a step, the last one in the order of slots and nodes
wins, so that the table depends on the texts alone.

What the target named after committed tokens is kept in the pages of their text, too. A
prompt that finds its beginning in the cache teaches the table from there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treespec_jax.cache import pages as paging
from treespec_jax.cache.allocator import TRASH_PAGE
from treespec_jax.checks import check_int
from treespec_jax.drafting.protocol import (
    Committed,
    Drafter,
    Needs,
    Sizes,
    Successors,
)
from treespec_jax.drafting.rates import Rates
from treespec_jax.drafting.sources import Nodes, SourceDrafter
from treespec_jax.errors import UserError

# Lower bounds of the bins that a stored probability falls into.
BINS = (0.0, 0.02, 0.1, 0.3, 0.6, 0.9)
# Share of its stored probability that a guess keeps in another context, at first.
CARRIED = 0.5
SCOPES = ("engine", "request")


@dataclasses.dataclass(frozen=True)
class RecycleOptions:
    """Settings of method "recycle".

    Attributes:
      successors: K, kept for each token.
      scope: "engine": one table, which all requests teach; "request": each has its
        own, empty at first.
    """

    successors: int = 8
    scope: str = "engine"

    def __post_init__(self):
        check_int("successors", self.successors, 1)
        if self.scope not in SCOPES:
            raise UserError(
                f"scope {self.scope!r} is unknown; choose from {', '.join(SCOPES)}"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SuccessorPages:
    """Successors of the tokens in the cache, by its page table.

    Attributes:
      best: int32 [P, page, K].
      logits: float32 [P, page, K].
    """

    best: jax.Array
    logits: jax.Array

    @classmethod
    def empty(cls, sizes: Sizes, count: int) -> SuccessorPages:
        """Of nothing, with `count` successors a token."""
        shape = sizes.layout.num_pages, sizes.layout.page_size, count
        return cls(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))

    def write(self, committed: Committed) -> SuccessorPages:
        """With those of committed tokens."""
        found, K = committed.successors, self.best.shape[2]
        corner = self._corner(committed)
        path_nC1 = found.path[:, :, None]
        best, logits = (
            jnp.take_along_axis(x[:, :, :K], path_nC1, axis=1)
            for x in (found.best, found.logits)
        )
        return SuccessorPages(
            self.best.at[corner].set(best), self.logits.at[corner].set(logits)
        )

    def read(self, committed: Committed) -> Successors:
        """Of tokens that were committed before."""
        corner = self._corner(committed)
        column_C = jnp.arange(committed.tokens.shape[1])
        return Successors(
            tokens=committed.tokens,
            real=column_C < committed.count[:, None],
            best=self.best[corner],
            logits=self.logits[corner],
            newest=jnp.maximum(committed.count - 1, 0),
            path=jnp.broadcast_to(column_C, committed.tokens.shape),
        )

    def _corner(self, committed: Committed):
        """Page and row [n, C] of each token; the trash page's for those not real."""
        page, table = self.best.shape[1], committed.page_table
        column_C = jnp.arange(committed.tokens.shape[1])
        position_nC = committed.start[:, None] + column_C
        number_nC = jnp.minimum(position_nC // page, table.shape[1] - 1)
        page_nC = jnp.take_along_axis(table, number_nC, axis=1)
        real_nC = column_C < committed.count[:, None]
        return jnp.where(real_nC, page_nC, TRASH_PAGE), position_nC % page


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecycleState:
    """The tables and what they are worth.

    Attributes:
      best: int32 [tables, V, K], one table, or one a slot.
      logits: float32 [tables, V, K], -inf where nothing is known.
      rates: of guesses by rank and bin.
      pages: what to teach them from once more; None if no prompt finds its beginning in
        the cache.
    """

    best: jax.Array
    logits: jax.Array
    rates: Rates
    pages: SuccessorPages | None


class Recycling:
    """See `sources.Source`.

    Args:
      successors: see `RecycleOptions`.
      scope: likewise.
    """

    name = "recycle"
    history = 0

    def __init__(self, successors: int, scope: str):
        self.successors = successors
        self.scope = scope
        self.needs = Needs(successors=successors, in_pages=True)

    def init(self, sizes: Sizes) -> RecycleState:
        tables = sizes.batch if self.scope == "request" else 1
        count = min(self.successors, sizes.vocab)
        shape = tables, sizes.vocab, count
        # A guess may be worth the middle of its bin, and no more than its rank's share.
        edges = np.array([*BINS, 1.0])
        middle = CARRIED * (edges[:-1] + edges[1:]) / 2
        prior = np.minimum(middle, 1 / np.arange(1, count + 1)[:, None])
        return RecycleState(
            best=jnp.zeros(shape, jnp.int32),
            logits=jnp.full(shape, -jnp.inf, jnp.float32),
            rates=Rates.start(prior.reshape(-1)),
            pages=SuccessorPages.empty(sizes, count) if sizes.resumes else None,
        )

    def copy_slot(self, state: RecycleState, source, destination):
        if self.scope == "engine":
            return state
        best, logits = (
            x.at[destination].set(x[source]) for x in (state.best, state.logits)
        )
        return dataclasses.replace(state, best=best, logits=logits)

    def copy_pages(self, state: RecycleState, copies) -> RecycleState:
        return dataclasses.replace(state, pages=paging.copy(state.pages, copies))

    def resume(self, state: RecycleState, committed: Committed) -> RecycleState:
        slot_1 = committed.slot[None]
        state = self._forget(state, committed.slot, committed.start[0] == 0)
        return self._learn(state, slot_1, state.pages.read(committed))

    def look(self, state, outlook):
        return state

    def guess(self, state: RecycleState, nodes: Nodes, scratch):
        slots_B = jnp.arange(nodes.tokens.shape[0])
        best, cell, known = self._rows(state, slots_B, nodes.tokens)
        log_BWK = jnp.where(known, state.rates.log(cell), -jnp.inf)
        return best, log_BWK, None

    def ingest(self, state: RecycleState, committed: Committed) -> RecycleState:
        slots_n = jnp.arange(committed.tokens.shape[0])
        if committed.slot is not None:
            slots_n = committed.slot[None]
            state = self._forget(state, slots_n[0], committed.start[0] == 0)
        else:
            state = self._observe(state, slots_n, committed)
        if state.pages is not None:
            pages = state.pages.write(committed)
            state = dataclasses.replace(state, pages=pages)
        return self._learn(state, slots_n, committed.successors)

    def _rows(self, state, slots_n, tokens_nW):
        """Successors [n, W, K] of tokens, their cells, and whether they are known."""
        table_n1 = slots_n[:, None] if self.scope == "request" else 0
        best = state.best[table_n1, tokens_nW]
        logits = state.logits[table_n1, tokens_nW]
        known = logits > -jnp.inf
        prob = jax.nn.softmax(jnp.where(known, logits, -1e9), axis=2)
        bins = sum((prob >= low).astype(jnp.int32) for low in BINS) - 1
        rank_K = jnp.arange(best.shape[2])
        return best, rank_K * len(BINS) + bins, known

    def _observe(self, state, slots_n, committed: Committed):
        """Which of the guesses after the accepted nodes were right."""
        best, cell, known = self._rows(state, slots_n, committed.tokens)
        column_C = jnp.arange(committed.tokens.shape[1])
        real = (column_C < committed.count[:, None])[:, :, None]
        hit = best == committed.following[:, :, None]
        return dataclasses.replace(
            state, rates=state.rates.after(cell, hit, known & real)
        )

    def _forget(self, state, slot, begins):
        if self.scope == "engine":
            return state
        row = jnp.where(begins, -jnp.inf, state.logits[slot])
        return dataclasses.replace(state, logits=state.logits.at[slot].set(row))

    def _learn(self, state, slots_n, found: Successors) -> RecycleState:
        n, T = found.tokens.shape
        tokens_N, real_N = found.tokens.reshape(-1), found.real.reshape(-1)
        slots_N = jnp.repeat(slots_n, T)
        table_N = slots_N if self.scope == "request" else jnp.zeros_like(slots_N)
        number_N = jnp.arange(n * T)
        later_NN = (number_N > number_N[:, None]) & real_N
        later_NN &= tokens_N == tokens_N[:, None]
        later_NN &= table_N == table_N[:, None]
        wins_N = real_N & ~jnp.any(later_NN, axis=1)
        # What does not win is written past the end, that is nowhere.
        row_N = jnp.where(wins_N, tokens_N, state.best.shape[1])
        K = state.best.shape[2]
        best, logits = (x.reshape(n * T, -1)[:, :K] for x in (found.best, found.logits))
        return dataclasses.replace(
            state,
            best=state.best.at[table_N, row_N].set(best, mode="drop"),
            logits=state.logits.at[table_N, row_N].set(logits, mode="drop"),
        )


def table_of(drafter: Drafter, state: Any) -> RecycleState | None:
    """The table that all requests teach; None if the drafter has none.

    Args:
      drafter: any.
      state: of it, wherever the table stands in it.
    """
    parts = getattr(drafter, "parts", ())
    if not any(isinstance(p, Recycling) and p.scope == "engine" for p in parts):
        return None
    return next(filter(_is_table, jax.tree.leaves(state, is_leaf=_is_table)))


def with_table(state: Any, best: np.ndarray, logits: np.ndarray) -> Any:
    """A drafter's state with other successors; their worth is measured anew.

    Args:
      state: one that `table_of` finds a table in.
      best: int32 [V, K].
      logits: float32 [V, K].
    """

    def replaced(x):
        if not _is_table(x):
            return x
        # Copies on the device, where the others were: the next dispatch takes them.
        best_1VK, logits_1VK = x.best.at[0].set(best), x.logits.at[0].set(logits)
        return dataclasses.replace(x, best=best_1VK, logits=logits_1VK)

    return jax.tree.map(replaced, state, is_leaf=_is_table)


def _is_table(x: Any) -> bool:
    return isinstance(x, RecycleState)


class Recycle(SourceDrafter):
    """The method "recycle"; see `protocol.Drafter`."""

    Options = RecycleOptions

    @classmethod
    def make(cls, model, tau, options: RecycleOptions):
        return cls((Recycling(options.successors, options.scope),))
