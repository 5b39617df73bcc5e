"""Texts in the target's cache that callers advance themselves; free of jax.

They take their pages from where requests take theirs. A fork shares the full pages and
copies the last one if it is partly filled. Pages with the target's rows alone are found
by other such texts only, unless the drafter keeps nothing by page.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from treespec_jax.cache.allocator import TRASH_PAGE, PageAllocator
from treespec_jax.cache.prefixes import TARGET, WHOLE, HeldPages, Prefixes
from treespec_jax.config import EngineConfig
from treespec_jax.engine.plan import ExtendPlan
from treespec_jax.errors import UserError


@dataclasses.dataclass(eq=False)
class CachedText:
    """Tokens whose rows are in the target's cache.

    Attributes:
      tokens: in order.
      held: their pages.
      logits: float32 [V], the target's after the last token; None without a token.
      shared_pages: pages of its beginning that were in the cache already.
      open: whether it may be used; False once it is released.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    held: HeldPages = dataclasses.field(default_factory=HeldPages)
    logits: np.ndarray | None = None
    shared_pages: int = 0
    open: bool = True


@dataclasses.dataclass(frozen=True)
class Addition:
    """Tokens to add to a text.

    Attributes:
      text: every text comes once.
      tokens: at least one.
      scored: whether their log probabilities are wanted.
    """

    text: CachedText
    tokens: Sequence[int]
    scored: bool = True


class CachedTexts:
    """Extends, forks and releases texts.

    Args:
      config: fixed sizes.
      allocator: of the pages.
      prefixes: that finds those of equal texts.
      target_only: whether requests can do nothing with pages that a text fills.
      device: runs the plans; `executor.Executor`.
    """

    def __init__(
        self,
        config: EngineConfig,
        allocator: PageAllocator,
        prefixes: Prefixes,
        target_only: bool,
        device: Any,
    ):
        self._config = config
        self._allocator, self._prefixes = allocator, prefixes
        self._kind = TARGET if target_only else WHOLE
        self._device = device
        self._pages_per_text = -(-config.max_len // config.page_size)
        self._texts: weakref.WeakSet[CachedText] = weakref.WeakSet()

    @property
    def count(self) -> int:
        """Texts that are open."""
        return len(self._texts)

    def create(self) -> CachedText:
        """A text without a token."""
        text = CachedText()
        self._texts.add(text)
        return text

    def extend(self, additions: Sequence[Addition]) -> list[np.ndarray]:
        """Adds tokens to texts, in as few passes of the target as there can be.

        Args:
          additions: to different texts.

        Returns:
          float32 [n] per addition, the target's log p of each token; zeros if they are
          not wanted, and for the first token of a text.

        Raises:
          UserError: a text would be longer than max_len, or too few pages are free.
            Nothing has changed then, as after any other failure.
        """
        self._check_lengths(additions)
        held: list[HeldPages] = []
        try:
            self._reserve(additions, held)
            done = self._run(additions, held)
        except BaseException:
            for addition, pages in zip(additions, held, strict=False):
                mine = len(addition.text.held.pages)
                self._allocator.give_back(pages.pages[mine:])
            raise
        for addition, pages, (logits, _) in zip(additions, held, done, strict=True):
            text = addition.text
            if not text.tokens:
                text.shared_pages = len(pages.digests)
            text.tokens += addition.tokens
            text.held, text.logits = pages, logits
            self._prefixes.name(pages, text.tokens, len(text.tokens), self._kind)
        return [log_probs for _, log_probs in done]

    def fork(self, text: CachedText) -> CachedText:
        """A text of the same tokens.

        Raises:
          UserError: no page is free for the partly filled one.
        """
        full, rest = divmod(len(text.tokens), self._config.page_size)
        shared = text.held.pages[:full]
        held = HeldPages(list(shared), list(text.held.digests))
        if rest and not self._allocator.free:
            raise UserError(self._too_few(1))
        self._allocator.share(shared)
        try:
            if rest:
                self._allocator.take(1, held.pages)
                self._device.copy_pages([(text.held.pages[full], held.pages[full])])
        except BaseException:
            self._allocator.give_back(held.pages)
            raise
        fork = CachedText(list(text.tokens), held, text.logits, text.shared_pages)
        self._texts.add(fork)
        return fork

    def release(self, text: CachedText) -> None:
        """Gives the pages of a text back; it cannot be used any more."""
        if text.open:
            text.open = False
            self._texts.discard(text)
            pages, text.held = text.held.pages, HeldPages()
            self._allocator.give_back(pages)

    def replace(self, text: CachedText, other: CachedText) -> None:
        """A text becomes another one, which is released; nothing is computed."""
        mine = text.held.pages
        text.tokens, text.logits = other.tokens, other.logits
        text.held, other.held = other.held, HeldPages()
        self._allocator.give_back(mine)
        self.release(other)

    def release_all(self) -> None:
        """Closes every text, because the cache is lost."""
        for text in list(self._texts):
            self.release(text)

    def _check_lengths(self, additions: Sequence[Addition]) -> None:
        for addition in additions:
            length = len(addition.text.tokens) + len(addition.tokens)
            if length > self._config.max_len:
                raise UserError(
                    f"a branch of {length} tokens is past max_len="
                    f"{self._config.max_len}; raise max_len"
                )

    def _reserve(self, additions: Sequence[Addition], reserved: list) -> None:
        """Appends pages for all rows of every text, those that it holds first."""
        found = [self._found(addition) for addition in additions]
        missing = [
            -(-(len(a.text.tokens) + len(a.tokens)) // self._config.page_size)
            - len(a.text.held.pages)
            - len(pages.pages)
            for a, pages in zip(additions, found, strict=True)
        ]
        idle = {page for pages in found for page in pages.pages}
        idle = {page for page in idle if not self._allocator.holders(page)}
        needed = sum(missing) + len(idle)
        if needed > self._allocator.free:
            raise UserError(self._too_few(needed))
        for addition, pages in zip(additions, found, strict=True):
            mine = addition.text.held
            reserved.append(HeldPages(list(mine.pages), list(mine.digests)))
            self._allocator.share(pages.pages)
            reserved[-1].pages += pages.pages
            reserved[-1].digests += pages.digests
        for held, count in zip(reserved, missing, strict=True):
            self._allocator.take(count, held.pages)

    def _found(self, addition: Addition) -> HeldPages:
        """Pages that hold the beginning of a new text already."""
        if addition.text.tokens:
            return HeldPages()
        # The last token is computed in any case, for its logits.
        digests = self._prefixes.digests(addition.tokens, len(addition.tokens) - 1)
        return self._prefixes.find(digests, (WHOLE, TARGET))

    def _run(self, additions, held) -> list[tuple[np.ndarray, np.ndarray]]:
        """Logits after each text's last token, and log p of the tokens added."""
        rows = [self._pending(a, h) for a, h in zip(additions, held, strict=True)]
        while waiting := [row for row in rows if row.tokens]:
            longest = max(len(row.tokens) for row in waiting)
            size = _size(longest, self._config.prefill_chunks)
            for first in range(0, len(waiting), self._config.max_batch):
                self._advance(waiting[first : first + self._config.max_batch], size)
        return [(row.logits, np.concatenate(row.log_probs)) for row in rows]

    def _pending(self, addition: Addition, held: HeldPages) -> _Pending:
        text, page = addition.text, self._config.page_size
        start = len(text.tokens)
        if not start:
            start = len(held.digests) * page
        skipped = start - len(text.tokens)
        log_probs = [np.zeros(skipped, np.float32)]
        return _Pending(
            list(addition.tokens[skipped:]),
            start,
            held.pages,
            addition.scored,
            text.logits,
            log_probs,
        )

    def _advance(self, rows: Sequence[_Pending], size: int) -> None:
        """One pass over the next tokens of some texts, `size` each at most."""
        batch = 1 << (len(rows) - 1).bit_length()
        scored = size > 1 and any(row.scored for row in rows)
        plan = ExtendPlan(
            tokens=np.zeros((batch, size), np.int32),
            starts=np.zeros(batch, np.int32),
            counts=np.zeros(batch, np.int32),
            page_table=np.full((batch, self._pages_per_text), TRASH_PAGE, np.int32),
            scored=scored,
        )
        for index, row in enumerate(rows):
            run = row.tokens[:size]
            plan.tokens[index, : len(run)] = run
            plan.starts[index], plan.counts[index] = row.start, len(run)
            plan.page_table[index, : len(row.pages)] = row.pages
        logits, log_probs = self._device.extend(plan)
        for index, row in enumerate(rows):
            count = int(plan.counts[index])
            gained = np.zeros(count, np.float32)
            if row.scored and row.logits is not None:
                gained[0] = log_prob(row.logits, row.tokens[0])
            if scored and row.scored:
                gained[1:] = log_probs[index, : count - 1]
            row.log_probs.append(gained)
            row.logits = logits[index].copy()
            row.start += count
            del row.tokens[:count]

    def _too_few(self, needed: int) -> str:
        return (
            f"{needed} pages are needed, {self._allocator.free} of "
            f"{self._allocator.num_pages} are free; prune branches or raise num_pages"
        )


@dataclasses.dataclass(eq=False)
class _Pending:
    """Tokens on their way into the cache.

    Attributes:
      tokens: that are not there yet.
      start: position of the first.
      pages: of the text.
      scored: whether log probabilities are wanted.
      logits: after the tokens that are there; None without any.
      log_probs: of the tokens that were added, in runs.
    """

    tokens: list[int]
    start: int
    pages: list[int]
    scored: bool
    logits: np.ndarray | None
    log_probs: list[np.ndarray]


def log_prob(logits: np.ndarray, token: int) -> float:
    """Natural log p of a token after logits [V]."""
    shifted = logits.astype(np.float64) - np.max(logits)
    return float(shifted[token] - np.log(np.sum(np.exp(shifted))))


def _size(tokens: int, chunks: Sequence[int]) -> int:
    """The compiled run for so many tokens: one, or a chunk that is half full."""
    return max([1, *(chunk for chunk in chunks if chunk <= 2 * tokens and tokens > 1)])
