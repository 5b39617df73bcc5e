"""What the scheduler tells the device to do, as NumPy arrays; free of jax."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from treespec_jax.cache.allocator import TRASH_PAGE
from treespec_jax.cache.prefixes import HeldPages
from treespec_jax.config import EngineConfig, SamplingParams
from treespec_jax.engine.clock import Stopwatch
from treespec_jax.engine.request import Request
from treespec_jax.engine.slots import adaptive_of_all, sampling_of_all


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """A run of one slot's text to prefill.

    Attributes:
      slot: index.
      tokens: int32 [1, T], the first `count` real.
      following: int32 [1, T], the token after each of them.
      root: int32 [1], the token after the chunk.
      start: int32 [1], absolute position of the first.
      count: int32 [1], may be 0.
      page_table: int32 [1, max_pages].
      cached: whether its rows are in the caches already, so that only the drafter has
        to be told.
      top: K of the prompt's log p, see `cache.prefill.Chunk`.
    """

    slot: int
    tokens: np.ndarray
    following: np.ndarray
    root: np.ndarray
    start: np.ndarray
    count: np.ndarray
    page_table: np.ndarray
    cached: bool = False
    top: int | None = None

    @property
    def variant(self) -> tuple[int, int | None]:
        """Which program prefills it: its rows, and `top`."""
        return self.tokens.shape[1], self.top


@dataclasses.dataclass(frozen=True)
class ForkPlan:
    """Slots that are to stand where others do.

    Attributes:
      slots: source and destination of each.
      pages: source and destination of pages to copy.
    """

    slots: list[tuple[int, int]]
    pages: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class MovePlan:
    """Where the beams of all slots go on; see `beam_step.Moves`.

    Attributes:
      origin: int32 [B].
      path: int32 [B, C + 1].
      emitted: int32 [B, C + 1].
      count: int32 [B].
      page_table: int32 [B, max_pages].
      fork: what to copy first.
    """

    origin: np.ndarray
    path: np.ndarray
    emitted: np.ndarray
    count: np.ndarray
    page_table: np.ndarray
    fork: ForkPlan


@dataclasses.dataclass(frozen=True)
class ExtendPlan:
    """Tokens to run through the target after some cached texts, W of them.

    Attributes:
      tokens: int32 [W, T], the first `counts` of each row real.
      starts: int32 [W], absolute positions of the first ones.
      counts: int32 [W]; 0 for an idle row.
      page_table: int32 [W, max_pages].
      scored: whether log probabilities of the tokens are wanted.
    """

    tokens: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    page_table: np.ndarray
    scored: bool


@dataclasses.dataclass(frozen=True)
class DraftCache:
    """What a drafter keeps by page, for whoever shares pages.

    Attributes:
      trails: rows by which it may be behind the target after a step.
      next_tokens: see `drafting.protocol.Needs`.
      in_pages: whether it keeps anything there at all.
      hears_all: whether it has to be told of tokens that are in the caches already.
    """

    trails: int = 0
    next_tokens: int = 0
    in_pages: bool = False
    hears_all: bool = False

    @classmethod
    def of(cls, needs: Any, trails: int) -> DraftCache:
        """Of a drafter with `drafting.protocol.Needs`, whose model may be behind."""
        return cls(
            trails=trails if needs.in_pages else 0,
            next_tokens=needs.next_tokens,
            in_pages=needs.in_pages,
            hears_all=needs.history or needs.successors > 0,
        )


NOTHING_DRAFTED = DraftCache()


@dataclasses.dataclass(frozen=True)
class Plan:
    """One dispatch.

    Attributes:
      page_table: int32 [B, max_pages].
      limits: int32 [B], tokens that a slot may hold after it; 0 is idle.
      eos: int32 [B, E], padded with -1.
      want_logprobs: bool [B].
      speculate: bool [B], whether a slot has a tree.
      sampling: fields of `sampling.policy.Sampling`.
      text: fields of `sampling.penalties.TextSoFar`; None if nobody has penalties.
      top: K, see `engine.state.Control`.
      max_steps: int32 [], steps to run at most.
      slots: who runs, by index; for `Scheduler.file`.
      level_price: of a level of the drafter, see `engine.costs`.
      adaptive: fields of `sampling.temperature.Adaptive`; None if nobody asked for it.
    """

    page_table: np.ndarray
    limits: np.ndarray
    eos: np.ndarray
    want_logprobs: np.ndarray
    speculate: np.ndarray
    sampling: Mapping[str, np.ndarray]
    text: Mapping[str, np.ndarray] | None
    top: int
    max_steps: np.ndarray
    slots: Mapping[int, Slot]
    level_price: float = 0.0
    adaptive: Mapping[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Requests stay with whoever planned.
        return vars(self) | {"slots": dict.fromkeys(self.slots)}

    def asking(self, params: SamplingParams) -> Plan:
        """The same, as if every slot sampled like `params`."""
        batch = len(self.limits)
        sampling = sampling_of_all(batch, params)
        adaptive = adaptive_of_all(batch, params)
        return dataclasses.replace(self, sampling=sampling, adaptive=adaptive)


@dataclasses.dataclass(eq=False)
class Slot:
    """A running request.

    Attributes:
      request: whose slot it is.
      order: arrivals before it; the youngest has the largest.
      text: tokens to prefill, the newest included, which is not prefilled.
      chunks: what of it is not prefilled yet, see `prefill_plan`.
      held: pages of the slot.
      digests: of the pages that its text fills.
      cached: tokens of the text that were in the caches before.
      length: tokens in the cache, as far as results are in.
      complete: tokens that are in the caches of all models for good.
      limit: tokens that it will hold in the end.
      planned: tokens that dispatches under way may add at most.
      behind: tokens in the backlog of the drafter's model at most.
      watch: times its decoding.
    """

    request: Request
    order: int
    text: list[int]
    chunks: collections.deque[tuple[int, int, int]]
    held: HeldPages
    digests: list[bytes]
    cached: int
    length: int
    limit: int
    watch: Stopwatch
    complete: int = 0
    planned: int = 0
    behind: int = 0

    @property
    def pages(self) -> list[int]:
        """Pages of the slot, in order."""
        return self.held.pages

    @property
    def ready(self) -> bool:
        """Whether all of its text is in the cache."""
        return not self.chunks

    @property
    def bound(self) -> int:
        """Tokens that it may hold once all dispatches under way are done."""
        return min(self.limit, self.length + self.planned)


def idle_chunk(size: int, config: EngineConfig, cached: bool = False) -> ChunkPlan:
    """A prefill of nothing, for the shapes of its arrays.

    Args:
      size: T, of `EngineConfig.prefill_chunks`.
      config: fixed sizes.
      cached: as of rows that are in the caches already.
    """
    tokens, one = np.zeros((1, size), np.int32), np.zeros(1, np.int32)
    table = np.full((1, -(-config.max_len // config.page_size)), TRASH_PAGE, np.int32)
    return ChunkPlan(0, tokens, tokens, one, one, one, table, cached=cached)


def prefill_plan(tokens: int, chunks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Cuts a prompt into compiled chunk sizes: (start, size, real tokens) each.

    A chunk of the next size up is used once it would be at least half full. A prompt
    of one token still makes one (empty) chunk, which brings its root.
    """
    plan, start = [], 0
    while start < tokens or not plan:
        missing = tokens - start
        size = max([c for c in chunks if c <= 2 * missing] or [chunks[0]])
        count = min(size, missing)
        plan.append((start, size, count))
        start += count
    return plan


def chunk_of(
    index: int,
    slot: Slot,
    page_table: np.ndarray,
    top: int | None,
) -> ChunkPlan:
    """The next piece of a slot's text.

    Args:
      index: of the slot.
      slot: with a chunk to come.
      page_table: int32 [1, max_pages], its row.
      top: see `ChunkPlan`.
    """
    start, size, count = slot.chunks[0]
    tokens, following = np.zeros((2, 1, size), np.int32)
    tokens[0, :count] = slot.text[start : start + count]
    following[0, :count] = slot.text[start + 1 : start + count + 1]
    return ChunkPlan(
        slot=index,
        tokens=tokens,
        following=following,
        root=np.array([slot.text[start + count]], np.int32),
        start=np.array([start], np.int32),
        count=np.array([count], np.int32),
        page_table=page_table,
        cached=start < slot.cached,
        top=top,
    )
