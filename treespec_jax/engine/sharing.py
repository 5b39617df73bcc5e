"""Texts that share pages, on the device: begin with them, fork, go on one by one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from treespec_jax.cache import pages as paging
from treespec_jax.cache.pages import Copies, Destination
from treespec_jax.cache.prefill import Chunk
from treespec_jax.drafting.protocol import Committed
from treespec_jax.engine.state import DecodeState
from treespec_jax.models.transformer import Transformer
from treespec_jax.models.views import CacheView, Pages
from treespec_jax.sampling import policy
from treespec_jax.sampling.noise import Noise
from treespec_jax.sampling.penalties import TextSoFar
from treespec_jax.sampling.policy import Sampling
from treespec_jax.sampling.temperature import Adaptive
from treespec_jax.speculation import Speculation


def resume(
    speculation: Speculation,
    state: DecodeState,
    slot: jax.Array,
    chunk: Chunk,
    following: tuple[jax.Array, jax.Array],
) -> DecodeState:
    """Tells the drafter of tokens of a prompt that are in the caches already.

    Arguments as for `step.prefill`, which takes in the rest of the prompt.
    """
    following_1T, root_1 = following
    committed = Committed(
        slot=slot,
        tokens=chunk.tokens,
        following=following_1T,
        root=root_1,
        start=chunk.start,
        count=chunk.count,
        features=(),
        page_table=chunk.page_table,
    )
    with jax.named_scope("resume"):
        draft = speculation.drafter.resume(state.draft, committed)
    return dataclasses.replace(state, draft=draft)


def fork(
    speculation: Speculation,
    state: DecodeState,
    slots: Copies,
    copies: Copies,
) -> DecodeState:
    """Slots that stand where others do.

    Args:
      speculation: its drafter is copied too.
      state: of all slots.
      slots: to copy.
      copies: of the pages that will be written, of all caches.
    """
    drafter = speculation.drafter
    state = dataclasses.replace(
        state,
        pages=paging.copy(state.pages, copies),
        draft=drafter.copy_pages(state.draft, copies),
    )

    def copy_one(i, carry):
        rows, draft = carry
        source, destination = slots.sources[i], slots.destinations[i]
        rows = jax.tree.map(lambda x: x.at[destination].set(x[source]), rows)
        return rows, drafter.copy_slot(draft, source, destination)

    rows = state.lengths, state.root, state.ended
    with jax.named_scope("fork"):
        rows, draft = lax.fori_loop(0, slots.count, copy_one, (rows, state.draft))
    lengths, root, ended = rows
    return dataclasses.replace(
        state, lengths=lengths, root=root, ended=ended, draft=draft
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Additions:
    """Tokens that go on some texts; see `plan.ExtendPlan`.

    Attributes:
      tokens: int32 [W, T].
      starts: int32 [W].
      counts: int32 [W].
      page_table: int32 [W, max_pages].
    """

    tokens: jax.Array
    starts: jax.Array
    counts: jax.Array
    page_table: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extended:
    """What the target says of added tokens.

    Attributes:
      logits: float32 [W, V], after the last of each row.
      log_probs: float32 [W, T - 1], log p of every token but the first; None if they
        were not asked for.
    """

    logits: jax.Array
    log_probs: jax.Array | None


def extend(
    target: Transformer, pages: Pages, additions: Additions, scored: bool
) -> tuple[Pages, Extended]:
    """Runs tokens after cached prefixes, chain-shaped trees, and commits them.

    Args:
      target: the model.
      pages: of it.
      additions: the tokens.
      scored: whether their log probabilities are wanted, for which the output head
        runs over all rows.
    """
    tokens_WT = additions.tokens
    W, T = tokens_WT.shape
    row_T = jnp.arange(T)
    forward = target(
        tokens_WT,
        additions.starts[:, None] + row_T,
        jnp.broadcast_to(row_T[:, None] >= row_T, (W, T, T)),
        CacheView(pages, additions.page_table, additions.starts),
    )
    last_W = jnp.arange(W) * T + jnp.maximum(additions.counts - 1, 0)
    log_probs = None
    if scored:
        logits_VR = target.logit_columns(forward.hidden)
        logits_VW = logits_VR[:, last_W]
        above_R = jnp.arange(W * T).reshape(W, T)[:, :-1].reshape(-1)
        chosen_R = logits_VR[tokens_WT[:, 1:].reshape(-1), above_R]
        total_R = jax.nn.logsumexp(logits_VR, axis=0)[above_R]
        log_probs = (chosen_R - total_R).reshape(W, T - 1)
    else:
        logits_VW = target.logit_columns(forward.hidden[:, last_W])
    destination = Destination(additions.page_table, additions.starts, additions.counts)
    path_WT = jnp.broadcast_to(row_T, (W, T))
    # Known once every layer has read the cache.
    after = jnp.max(logits_VW) < jnp.inf
    pages = paging.commit(pages, destination, forward.kv, path_WT, after)
    return pages, Extended(logits_VW.T, log_probs)


def scores(
    logits_1V: jax.Array,
    position_1: jax.Array,
    sampling: Sampling,
    text: TextSoFar | None,
    adaptive: Adaptive | None = None,
) -> jax.Array:
    """float32 [V], of which plain decoding emits the best at a position.

    Log p of the policy up to a constant, plus the noise of the position.

    Args:
      logits_1V: float32, the target's before it.
      position_1: int32, absolute.
      sampling: settings of the one text.
      text: what penalties look at; None without any.
      adaptive: of the policy; a root without a child.
    """
    logits_V1, vocab = logits_1V.T, logits_1V.shape[1]
    if text is not None:
        nothing = jnp.zeros((1, 0), jnp.int32)
        logits_V1 = text.tables(vocab).apply(
            logits_V1, nothing, jnp.zeros((1, 1, 0), bool)
        )
    if adaptive is not None:
        root_11 = jnp.zeros((1, 1), jnp.int32)
        logits_V1 = adaptive.temper(logits_V1, root_11, root_11)
    noise = Noise(sampling.seed, position_1, vocab).after(jnp.int32(0))
    return policy.perturbed(logits_V1, noise, sampling)[:, 0]
