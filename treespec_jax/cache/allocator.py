"""Which pages belong to whom, on the host; free of jax."""

from __future__ import annotations

from collections.abc import Iterable

# Belongs to nobody: rows that must not be kept are written there.
TRASH_PAGE = 0


class PageAllocator:
    """Pages 1..num_pages with reference counts; page 0 is the trash page.

    A page is free while nobody holds it. Whoever shares a page of another holds it
    too.

    Args:
      num_pages: pages that can be handed out.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages, TRASH_PAGE, -1))
        self._holders = [0] * (num_pages + 1)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return self._holders[page]

    def take(self, count: int, into: list[int] | None = None) -> list[int]:
        """Hands out up to `count` pages; fewer when fewer are free.

        Args:
          count: pages wanted.
          into: the holder's list, which every page enters before it is taken: whatever
            fails, what was taken is on the list and can be given back.

        Returns:
          the pages handed out.
        """
        into = [] if into is None else into
        first = len(into)
        for _ in range(min(count, len(self._free))):
            page = self._free[-1]
            into.append(page)
            self._holders[page] = 1
            self._free.pop()
        return into[first:]

    def share(self, pages: Iterable[int]) -> None:
        """Adds a holder to pages that are held.

        Raises:
          ValueError: a page that nobody holds.
        """
        for page in pages:
            self._check(page)
            self._holders[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Takes one holder off each page; without any it is free again.

        Raises:
          ValueError: a page that nobody holds.
        """
        for page in pages:
            self._check(page)
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def _check(self, page: int) -> None:
        if not TRASH_PAGE < page <= self.num_pages or not self._holders[page]:
            raise ValueError(f"page {page} was not handed out")
