"""Which pages every slot holds, and which texts find theirs; free of jax."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treespec_jax.cache.allocator import TRASH_PAGE, PageAllocator
from treespec_jax.cache.prefixes import HeldPages, Prefixes
from treespec_jax.config import EngineConfig
from treespec_jax.engine.plan import DraftCache, Slot


class PageTables:
    """Takes, shares, names and releases the pages of slots.

    Args:
      config: fixed sizes.
      drafted: what the drafter keeps by page.

    Attributes:
      allocator: of the pages.
      prefixes: that finds those of equal texts.
      table: int32 [B, max_pages], as it is now.
    """

    def __init__(self, config: EngineConfig, drafted: DraftCache):
        self._page_size = config.page_size
        self._per_slot = -(-config.max_len // config.page_size)
        self._drafted = drafted
        self.allocator = PageAllocator(
            config.num_pages or config.max_batch * self._per_slot
        )
        self.prefixes = Prefixes(
            self.allocator, config.page_size, drafted.next_tokens, config.prefix_cache
        )
        self.table = np.full((config.max_batch, self._per_slot), TRASH_PAGE, np.int32)

    def count(self, rows: int) -> int:
        """Pages that so many rows of a slot take."""
        return min(-(-rows // self._page_size), self._per_slot)

    def missing(self, rows: int, found: HeldPages) -> int:
        """Free pages that a text of so many rows takes, of which some were found."""
        idle = sum(not self.allocator.holders(page) for page in found.pages)
        return self.count(rows) - len(found.pages) + idle

    def share(self, index: int, slot: Slot, pages: Sequence[int]) -> None:
        """A new slot holds pages of others, too."""
        self.allocator.share(pages, slot.pages)
        self.table[index, : len(pages)] = pages
        slot.request.stats.shared_pages += len(pages)

    def hold(self, index: int, slot: Slot, pages: int) -> None:
        """Takes pages for a slot until it holds so many, or none is free."""
        first, evicted = len(slot.pages), self.allocator.evictions
        taken = self.allocator.take(max(0, pages - first), slot.pages)
        self.table[index, first : first + len(taken)] = taken
        slot.request.stats.evictions += self.allocator.evictions - evicted

    def complete(self, slot: Slot, rows: int) -> None:
        """So many rows of a slot are in all caches: its full pages get their names."""
        slot.complete = max(slot.complete, rows)
        if slot.complete // self._page_size > len(slot.held.digests):
            text = [*slot.request.prompt, *slot.request.tokens]
            self.prefixes.name(slot.held, text, slot.complete)

    def release(self, index: int, slot: Slot) -> None:
        """A slot holds nothing any more."""
        pages, slot.held = slot.pages, HeldPages()
        self.table[index] = TRASH_PAGE
        self.allocator.give_back(pages)
