"""Which pages belong to whom, on the host."""

from __future__ import annotations

from treespec_jax.cache.pages import TRASH_PAGE


class PageAllocator:
    """A free list over pages 1..num_pages; page 0 is the trash page.

    Args:
      num_pages: pages that can be handed out.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages, TRASH_PAGE, -1))

    @property
    def free(self) -> int:
        """Pages not handed out."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Hands out up to `count` pages; fewer when fewer are free."""
        count = min(count, len(self._free))
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Takes pages back.

        Raises:
          ValueError: a page that is free already or was never handed out.
        """
        for page in pages:
            if not TRASH_PAGE < page <= self.num_pages or page in self._free:
                raise ValueError(f"page {page} was not handed out")
            self._free.append(page)
