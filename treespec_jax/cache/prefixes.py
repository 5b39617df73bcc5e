"""Which texts begin alike: names of full pages, on the host; free of jax.

The name of a page is a digest of all tokens up to its end, so that equal names mean
equal rows: a row of keys and values depends on the tokens up to it and on nothing else
of a request. Rows of a drafter's cache may depend on a token more (EAGLE pairs each row
with the token after it), which then belongs to the name.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from treespec_jax.cache.allocator import PageAllocator

# Pages with the rows of all models, and pages with the target's alone.
WHOLE, TARGET = "whole", "target"


@dataclasses.dataclass(eq=False)
class HeldPages:
    """Pages that one text holds.

    Attributes:
      pages: in order.
      digests: of the first of them, those that are named or were found.
    """

    pages: list[int] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)


class Prefixes:
    """Finds and names the pages of texts.

    Args:
      allocator: of the pages.
      page_size: rows per page.
      next_tokens: tokens after a row that it depends on.
      enabled: False: nothing is named, so that nothing is found.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        page_size: int,
        next_tokens: int = 0,
        enabled: bool = True,
    ):
        self._allocator = allocator
        self._page_size, self._next_tokens = page_size, next_tokens
        self._enabled = enabled

    def digests(
        self, tokens: Sequence[int], rows: int, known: Sequence[bytes] = ()
    ) -> list[bytes]:
        """Of every page that the first rows of a text fill.

        Args:
          tokens: of the text.
          rows: of it that count.
          known: the first digests, if they were made before.
        """
        found, size = list(known), self._page_size
        full = min(rows, len(tokens) - self._next_tokens) // size
        for page in range(len(found), full if self._enabled else 0):
            end = (page + 1) * size + self._next_tokens
            run = np.asarray(tokens[page * size : end], np.int32)
            above = found[-1] if found else b""
            digest = hashlib.blake2b(above + run.tobytes(), digest_size=16)
            found.append(digest.digest())
        return found

    def find(
        self, digests: Sequence[bytes], kinds: Sequence[str] = (WHOLE,)
    ) -> HeldPages:
        """Pages that hold the beginning of a text. Nobody holds them for it yet.

        Args:
          digests: of the text's pages.
          kinds: of pages that will do, the better ones first.
        """
        found = HeldPages()
        for digest in digests:
            pages = [self._allocator.find((kind, digest)) for kind in kinds]
            page = next((page for page in pages if page is not None), None)
            if page is None:
                break
            found.pages.append(page)
            found.digests.append(digest)
        return found

    def name(
        self, held: HeldPages, tokens: Sequence[int], rows: int, kind: str = WHOLE
    ) -> None:
        """Names the pages of a text that are full.

        Args:
          held: by the text.
          tokens: of it.
          rows: of it that are in the caches for good.
          kind: whose rows they are.
        """
        named = len(held.digests)
        held.digests = self.digests(tokens, rows, held.digests)
        for page, digest in zip(held.pages[named:], held.digests[named:], strict=False):
            self._allocator.name(page, (kind, digest))
