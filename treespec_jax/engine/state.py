"""What lives on the device between dispatches, and what the host decides for each."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from treespec_jax.acceptance.penalties import TextSoFar
from treespec_jax.acceptance.policy import Sampling
from treespec_jax.models.views import Pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Owned by the device and donated to every call.

    Attributes:
      pages: the target's cache.
      lengths: int32 [B], tokens in the cache; the root's absolute position.
      root: int32 [B], the newest emitted token, whose K/V is not in the cache yet.
      draft: the drafter's own state.
    """

    pages: Pages
    lengths: jax.Array
    root: jax.Array
    draft: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Control:
    """Owned by the host and sent with every dispatch.

    Attributes:
      page_table: int32 [B, max_pages].
      remaining: int32 [B], tokens a slot may still emit; 0 is idle.
      eos: int32 [B, E], tokens that end a slot's text, padded with -1.
      sampling: settings per slot.
      want_logprobs: bool [B].
      max_steps: int32 [], steps to run at most, up to the compiled bound.
      text: what penalties look at; None, another program, if no request has any.
    """

    page_table: jax.Array
    remaining: jax.Array
    eos: jax.Array
    sampling: Sampling
    want_logprobs: jax.Array
    max_steps: jax.Array
    text: TextSoFar | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trees:
    """What became of the drafted trees, for statistics; of S steps.

    Attributes:
      parents: int32 [S, B, T].
      log_chance: float32 [S, B, T], `TokenTree.draft_logprob`; -inf where invalid.
      path: int32 [S, B, C + 1], accepted nodes from the root down, padded with 0.
    """

    parents: jax.Array
    log_chance: jax.Array
    path: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outbox:
    """What a dispatch tells the host; S is the compiled number of steps.

    Attributes:
      tokens: int32 [S, B, C + 1], tokens emitted at each step.
      counts: int32 [S, B], how many of them; 0 for an idle slot.
      logprobs: float32 [S, B, C + 1], of those tokens where asked for.
      ranks: int32 [S, B, C], which child of its parent each accepted node was.
      steps: int32 [], steps that ran.
      trees: if they are recorded.
    """

    tokens: jax.Array
    counts: jax.Array
    logprobs: jax.Array
    ranks: jax.Array
    steps: jax.Array
    trees: Trees | None = None
