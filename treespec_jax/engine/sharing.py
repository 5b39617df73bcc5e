"""Texts that share pages, on the device: begin with them, fork, and copy."""

from __future__ import annotations

import dataclasses

import jax
from jax import lax

from treespec_jax.cache import pages as paging
from treespec_jax.cache.pages import PageCopies
from treespec_jax.cache.prefill import Chunk
from treespec_jax.drafting.protocol import Committed
from treespec_jax.engine.state import DecodeState
from treespec_jax.speculation import Speculation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotCopies:
    """Slots to copy over others, one after the other.

    Attributes:
      sources: int32 [N], the first `count` of them real.
      destinations: int32 [N].
      count: int32 [].
    """

    sources: jax.Array
    destinations: jax.Array
    count: jax.Array


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
    slots: SlotCopies,
    copies: PageCopies,
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
