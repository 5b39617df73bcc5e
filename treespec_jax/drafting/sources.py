"""Drafters without a model: sources of guesses, and one drafter over any of them.

A source looks at what the target has said so far and guesses what may follow a node, as
few tokens with calibrated probabilities. Several sources share the nodes of a tree:
their guesses are put together, and the tree takes the likeliest paths. Everything is
gather, scatter and top-k on the device; there is no pass of a model.

Where sources agree on a token, the more confident one is named for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from treespec_jax.cache.pages import Copies
from treespec_jax.drafting import growth
from treespec_jax.drafting.matches import Texts
from treespec_jax.drafting.protocol import (
    Committed,
    DraftContext,
    Expand,
    Guesses,
    Level,
    Needs,
    NoOptions,
    Sizes,
)
from treespec_jax.trees.shapes import TreeShape

# Temperature of the estimate that a child is right, once the noise is known.
TAU = 1.0


@dataclasses.dataclass(frozen=True)
class Outlook:
    """What all sources look at when a tree is proposed.

    Attributes:
      context: of the proposal.
      texts: so far, with the roots; None if no source reads them.
      depth: C, of the tree.
    """

    context: DraftContext
    texts: Texts | None
    depth: int


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Nodes of one depth whose children are wanted.

    Attributes:
      tokens: int32 [B, W]; the root's own at depth 0.
      depth: edges from the root.
      parents: int32 [B, W], number of each one's parent in the order of expansion; 0
        for the root itself.
    """

    tokens: jax.Array
    depth: int
    parents: jax.Array


class Source(Protocol):
    """Where guesses come from.

    Attributes:
      name: for statistics.
      needs: what it wants to be given; `history` is for `Outlook.texts`.
      history: H, tokens of other requests that it searches.
    """

    name: str
    needs: Needs
    history: int

    def init(self, sizes: Sizes) -> Any:
        """An empty state."""

    def ingest(self, state: Any, committed: Committed) -> Any:
        """See `Drafter.ingest`."""

    def copy_slot(self, state: Any, source: jax.Array, destination: jax.Array) -> Any:
        """See `Drafter.copy_slot`."""

    def copy_pages(self, state: Any, copies: Copies) -> Any:
        """See `Drafter.copy_pages`."""

    def resume(self, state: Any, committed: Committed) -> Any:
        """See `Drafter.resume`."""

    def look(self, state: Any, outlook: Outlook) -> Any:
        """The state once it has looked at where each slot stands."""

    def guess(
        self, state: Any, nodes: Nodes, scratch: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Guesses after nodes.

        Args:
          state: what `look` gave.
          nodes: a level.
          scratch: what it remembered of the levels above; None at the root.

        Returns:
          int32 tokens [B, W, K], float32 log probabilities [B, W, K] (-inf for none;
          the tokens of a node that have one differ), and scratch for the next level.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SourcesState:
    """What `SourceDrafter` remembers.

    Attributes:
      texts: None if no source reads them.
      parts: the states of the sources, in order.
    """

    texts: Texts | None
    parts: tuple[Any, ...]


class SourceDrafter:
    """See `protocol.Drafter`; its state is `SourcesState`.

    Args:
      parts: the sources.
      tau: see `TAU`.
    """

    module = None
    Options = NoOptions

    def __init__(self, parts: tuple[Source, ...], tau: float = TAU):
        self.parts = parts
        self.tau = tau
        self.sources = tuple(part.name for part in parts)
        self.needs = Needs(
            history=any(part.needs.history for part in parts),
            successors=max(part.needs.successors for part in parts),
            in_pages=any(part.needs.in_pages for part in parts),
        )

    def with_module(self, module):
        return self

    def init(self, sizes: Sizes) -> SourcesState:
        texts = None
        if self.needs.history:
            history = max(part.history for part in self.parts)
            texts = Texts.empty(sizes, history)
        return SourcesState(texts, tuple(part.init(sizes) for part in self.parts))

    def ingest(self, state: SourcesState, committed: Committed) -> SourcesState:
        texts = state.texts and state.texts.ingest(committed)
        pairs = zip(self.parts, state.parts, strict=True)
        parts = tuple(part.ingest(known, committed) for part, known in pairs)
        return SourcesState(texts, parts)

    def copy_slot(self, state: SourcesState, source, destination) -> SourcesState:
        texts = state.texts and state.texts.copy_slot(source, destination)
        pairs = zip(self.parts, state.parts, strict=True)
        parts = (part.copy_slot(s, source, destination) for part, s in pairs)
        return SourcesState(texts, tuple(parts))

    def copy_pages(self, state: SourcesState, copies) -> SourcesState:
        pairs = zip(self.parts, state.parts, strict=True)
        parts = tuple(part.copy_pages(known, copies) for part, known in pairs)
        return dataclasses.replace(state, parts=parts)

    def resume(self, state: SourcesState, committed: Committed) -> SourcesState:
        texts = state.texts and state.texts.ingest(committed)
        pairs = zip(self.parts, state.parts, strict=True)
        parts = tuple(part.resume(known, committed) for part, known in pairs)
        return SourcesState(texts, parts)

    def propose(self, state: SourcesState, shape, context: DraftContext):
        state, root, expand = self.look(state, shape, context)
        return growth.grow(shape, context, root, expand, self.tau), state

    def look(
        self, state: SourcesState, shape: TreeShape, context: DraftContext
    ) -> tuple[SourcesState, Guesses, Expand | None]:
        """The state after a look at where each slot stands, and what to grow from.

        Returns:
          The state, guesses after the roots, and `protocol.Expand`; without a guess
          and None for a shape that has no node to guess.
        """
        outlook = Outlook(context, state.texts, shape.depth)
        pairs = zip(self.parts, state.parts, strict=True)
        looked = tuple(part.look(known, outlook) for part, known in pairs)
        state = SourcesState(state.texts, looked)
        root_B1 = context.root[:, None]
        if shape.depth == 0:
            nothing = jnp.zeros((*root_B1.shape, 0), jnp.int32)
            return state, Guesses(nothing, nothing * 0.0, nothing), None

        def guess(nodes: Nodes, scratch):
            parts = zip(self.parts, looked, scratch, strict=True)
            found = [part.guess(known, nodes, seen) for part, known, seen in parts]
            numbered = enumerate(found)
            guesses = together([guesses_of(n, *some[:2]) for n, some in numbered])
            return guesses, tuple(seen for *_, seen in found)

        def expand(level: Level, scratch):
            nodes = Nodes(level.tokens, level.depth, level.parents)
            return guess(nodes, scratch or first)

        root = Nodes(root_B1, 0, jnp.zeros_like(root_B1))
        guesses, first = guess(root, (None,) * len(self.parts))
        return state, guesses, expand


def guesses_of(source: int, tokens: jax.Array, log_prob: jax.Array) -> Guesses:
    """Guesses that all come from one source, by its number."""
    return Guesses(tokens, log_prob, jnp.full(tokens.shape, source, jnp.int32))


# Traced once for all levels of one width.
@jax.jit
def together(found: Sequence[Guesses]) -> Guesses:
    """The guesses of all sources, each token once: the most confident one stays."""
    tokens_BWK, log_BWK, source_BWK = (
        jnp.concatenate([getattr(guesses, name) for guesses in found], axis=2)
        for name in ("tokens", "log_prob", "source")
    )
    if len(found) > 1:
        K = tokens_BWK.shape[2]
        earlier = jnp.arange(K) < jnp.arange(K)[:, None]
        mine, other = log_BWK[..., :, None], log_BWK[..., None, :]
        better = (other > mine) | ((other == mine) & earlier)
        same = tokens_BWK[..., :, None] == tokens_BWK[..., None, :]
        log_BWK = jnp.where(jnp.any(same & better, axis=3), -jnp.inf, log_BWK)
        # Sources that contradict each other may promise more than 1 together.
        total = jnp.sum(jnp.exp(log_BWK), axis=2, keepdims=True)
        log_BWK -= jnp.log(jnp.maximum(total, 1.0))
    # What is no guess must still be a token.
    tokens_BWK = jnp.where(log_BWK > -jnp.inf, tokens_BWK, 0)
    return Guesses(tokens_BWK, log_BWK, source_BWK)
