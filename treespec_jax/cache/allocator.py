"""Which pages belong to whom, on the host; free of jax."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Iterable

# Belongs to nobody: rows that must not be kept are written there.
TRASH_PAGE = 0


class PageAllocator:
    """Pages 1..num_pages with reference counts; page 0 is the trash page.

    A page is free while nobody holds it. Whoever shares a page of another holds it too.
    A page may be named by what is in it: once free it can then be found and shared
    again, until it is handed out. Nameless pages are handed out first, then those that
    have been free for longest.

    Args:
      num_pages: pages that can be handed out.

    Attributes:
      evictions: named pages that were handed out, so that their contents are lost.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.evictions = 0
        self._free = list(range(num_pages, TRASH_PAGE, -1))
        # Free pages with a name, those that were given back first in front.
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._holders = [0] * (num_pages + 1)
        self._names: dict[int, Hashable] = {}
        self._named: dict[Hashable, int] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._idle)

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
        for _ in range(min(count, self.free)):
            page = self._free[-1] if self._free else self._evict()
            into.append(page)
            self._holders[page] = 1
            self._free.pop()
        return into[first:]

    def share(self, pages: Iterable[int], into: list[int] | None = None) -> None:
        """Adds a holder to pages that are held, or free and named.

        Args:
          pages: to hold.
          into: the holder's list, as for `take`.

        Raises:
          ValueError: a page that nobody holds and that has no name.
        """
        into = [] if into is None else into
        for page in pages:
            if page not in self._idle:
                self._check(page)
            into.append(page)
            self._idle.pop(page, None)
            self._holders[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Takes one holder off each page; without any it is free again.

        The last of a text's pages come back first, so that the beginning, which more
        texts may share, can be found for longest.

        Raises:
          ValueError: a page that nobody holds.
        """
        for page in reversed([*pages]):
            self._check(page)
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._names:
                self._idle[page] = None
            else:
                self._free.append(page)

    def name(self, page: int, name: Hashable) -> None:
        """Names a page that is held; the first page of a name has it.

        Raises:
          ValueError: a page that nobody holds.
        """
        self._check(page)
        if page not in self._names and name not in self._named:
            self._names[page] = name
            self._named[name] = page

    def find(self, name: Hashable) -> int | None:
        """The page of that name."""
        return self._named.get(name)

    def forget_names(self) -> None:
        """No page can be found any more."""
        self._free += self._idle
        self._idle.clear()
        self._names.clear()
        self._named.clear()

    def _evict(self) -> int:
        """A named page that becomes a nameless free one."""
        page, _ = self._idle.popitem(last=False)
        self._free.append(page)
        del self._named[self._names.pop(page)]
        self.evictions += 1
        return page

    def _check(self, page: int) -> None:
        if not TRASH_PAGE < page <= self.num_pages or not self._holders[page]:
            raise ValueError(f"page {page} was not handed out")
