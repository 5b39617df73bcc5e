"""What lives on the device between dispatches, and what the host decides for each."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from treespec_jax.config import EngineConfig
from treespec_jax.models.views import Pages
from treespec_jax.sampling.penalties import TextSoFar
from treespec_jax.sampling.policy import Sampling
from treespec_jax.sampling.temperature import Adaptive
from treespec_jax.trees.shapes import TreeShape
from treespec_jax.trees.token_tree import TokenTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Owned by the device and donated to every call.

    Attributes:
      pages: the target's cache.
      lengths: int32 [B], tokens in the cache; the root's absolute position.
      root: int32 [B], the newest emitted token, whose K/V is not in the cache yet.
      ended: bool [B], whether a token ended the slot's text.
      draft: the drafter's own state.
    """

    pages: Pages
    lengths: jax.Array
    root: jax.Array
    ended: jax.Array
    draft: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Control:
    """Owned by the host and sent with every dispatch; `engine.plan.Plan` has it.

    Attributes:
      page_table: int32 [B, max_pages].
      limits: int32 [B], tokens that a slot may hold; it is idle with as many.
      eos: int32 [B, E], tokens that end a slot's text, padded with -1.
      sampling: settings per slot.
      want_logprobs: bool [B].
      speculate: bool [B], whether a slot has a tree; the others decode plainly.
      max_steps: int32 [], steps to run at most, up to the compiled bound.
      level_price: float32 [], see `drafting.protocol.DraftContext`.
      top: K, tokens whose log p is told beside that of an emitted one; another number
        is another program.
      text: what penalties look at; None, another program, if no request has any.
      adaptive: of the policy; None, another program, if no request has any.
    """

    page_table: jax.Array
    limits: jax.Array
    eos: jax.Array
    sampling: Sampling
    want_logprobs: jax.Array
    speculate: jax.Array
    max_steps: jax.Array
    level_price: jax.Array
    text: TextSoFar | None = None
    adaptive: Adaptive | None = None
    top: int = dataclasses.field(default=0, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopTokens:
    """The target's likeliest tokens at some positions, before penalties and the like.

    Attributes:
      tokens: int32 [..., K], best first.
      log_probs: float32 [..., K], natural.
      ranks: int32 [...], of the token that stands there: 1 is the likeliest.
    """

    tokens: jax.Array
    log_probs: jax.Array
    ranks: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptScores:
    """What the target says of a prefilled chunk [1, T]: of the token after each one.

    Attributes:
      log_probs: float32 [1, T].
      top: [1, T]; None if no more is wanted.
    """

    log_probs: jax.Array
    top: TopTokens | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trees:
    """What became of the drafted trees, for statistics.

    Attributes:
      parents: int32 [B, T].
      log_prob: float32 [B, T], `TokenTree.draft_logprob`; -inf where invalid.
      path: int32 [B, C + 1], accepted nodes from the root down, padded with 0.
      tokens: int32 [B, T].
      sources: int32 [B, T], see `TokenTree.source`.
      target_log_prob: float32 [B, T], log p of a node's token after its parent under
        the target, before penalties, bias and temperature; 0 for the root.
    """

    parents: jax.Array
    log_prob: jax.Array
    path: jax.Array
    tokens: jax.Array
    sources: jax.Array
    target_log_prob: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emission:
    """What a step tells the host.

    Attributes:
      tokens: int32 [B, C + 1], tokens emitted.
      counts: int32 [B], how many of them; 0 for an idle slot.
      logprobs: float32 [B, C + 1], log p of those tokens where asked for.
      ranks: int32 [B, C], which child of its parent each accepted node was.
      sources: int32 [B, C], where each accepted node comes from (`Drafter.sources`).
      orders: int32 [B, C], of the accepted nodes, see `trees.token_tree.orders`.
      top: of those tokens [B, C + 1]; None if K is 0.
      trees: if they are recorded.
    """

    tokens: jax.Array
    counts: jax.Array
    logprobs: jax.Array
    ranks: jax.Array
    sources: jax.Array
    orders: jax.Array
    top: TopTokens | None
    trees: Trees | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step leaves behind.

    Attributes:
      state: for the next step.
      emission: for the host.
    """

    state: DecodeState
    emission: Emission


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outbox:
    """What a dispatch tells the host.

    Attributes:
      emission: every array with a leading axis S, the compiled number of steps.
      steps: int32 [], steps that ran.
      rehearsed: a tree that was grown before them; None: none was.
    """

    emission: Emission
    steps: jax.Array
    rehearsed: TokenTree | None = None

    @classmethod
    def empty(cls, config: EngineConfig, shape: TreeShape, top: int = 0) -> Outbox:
        """Before the first step of a dispatch with trees of that shape.

        Args:
          config: fixed sizes.
          shape: of the trees.
          top: K, see `Control`.
        """
        lead = config.steps_per_dispatch, config.max_batch
        nodes, width = shape.num_nodes, shape.depth + 1
        trees = Trees(
            parents=jnp.zeros((*lead, nodes), jnp.int32),
            log_prob=jnp.zeros((*lead, nodes), jnp.float32),
            path=jnp.zeros((*lead, width), jnp.int32),
            tokens=jnp.zeros((*lead, nodes), jnp.int32),
            sources=jnp.zeros((*lead, nodes), jnp.int32),
            target_log_prob=jnp.zeros((*lead, nodes), jnp.float32),
        )
        top_tokens = TopTokens(
            tokens=jnp.zeros((*lead, width, top), jnp.int32),
            log_probs=jnp.zeros((*lead, width, top), jnp.float32),
            ranks=jnp.zeros((*lead, width), jnp.int32),
        )
        emission = Emission(
            tokens=jnp.zeros((*lead, width), jnp.int32),
            counts=jnp.zeros(lead, jnp.int32),
            logprobs=jnp.zeros((*lead, width), jnp.float32),
            ranks=jnp.zeros((*lead, width - 1), jnp.int32),
            sources=jnp.zeros((*lead, width - 1), jnp.int32),
            orders=jnp.zeros((*lead, width - 1), jnp.int32),
            top=top_tokens if top else None,
            trees=trees if config.record else None,
        )
        return cls(emission, jnp.zeros((), jnp.int32))
