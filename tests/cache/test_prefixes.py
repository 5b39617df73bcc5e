"""Texts that begin alike find each other's pages."""

from __future__ import annotations

import pytest

from treespec_jax.cache.allocator import PageAllocator
from treespec_jax.cache.prefixes import TARGET, WHOLE, HeldPages, Prefixes

PAGE = 4
TEXT = list(range(14))


@pytest.fixture
def allocator():
    return PageAllocator(8)


def hold(allocator, pages: int) -> HeldPages:
    return HeldPages(allocator.take(pages))


@pytest.mark.parametrize(("next_tokens", "pages"), [(0, 3), (1, 3), (3, 2)])
def test_full_pages_are_found_as_far_as_texts_agree(allocator, next_tokens, pages):
    """Rows that depend on later tokens are found if these agree, too."""
    prefixes = Prefixes(allocator, PAGE, next_tokens)
    held = hold(allocator, 4)
    prefixes.name(held, TEXT, 13)
    for agree in range(len(TEXT) + 1):
        other = [*TEXT[:agree], *(99 for _ in TEXT[agree:])]
        found = prefixes.find(prefixes.digests(other, len(other)))
        count = min(pages, max(0, agree - next_tokens) // PAGE)
        assert found.pages == held.pages[:count]
        assert found.digests == held.digests[:count]
    assert len(prefixes.find(prefixes.digests(TEXT, 7)).pages) == 1


def test_the_same_page_after_another_beginning_is_another_one(allocator):
    prefixes = Prefixes(allocator, PAGE)
    prefixes.name(hold(allocator, 2), TEXT[:8], 8)
    moved = [7, *TEXT[1:4], *TEXT[4:8]]
    assert not prefixes.find(prefixes.digests(moved, 8)).pages
    assert not prefixes.find(prefixes.digests(TEXT[4:8], 4)).pages


def test_a_text_is_named_as_it_grows_and_the_first_to_be_named_is_found(allocator):
    prefixes = Prefixes(allocator, PAGE)
    first, second = hold(allocator, 3), hold(allocator, 3)
    for rows in range(13):
        prefixes.name(first, TEXT[:rows], rows)
        assert len(first.digests) == rows // PAGE
    prefixes.name(second, TEXT, 12)
    allocator.give_back(second.pages)
    assert prefixes.find(prefixes.digests(TEXT, 12)).pages == first.pages


def test_pages_of_the_target_alone_are_found_by_those_whom_they_do_for(allocator):
    prefixes = Prefixes(allocator, PAGE)
    whole, target = hold(allocator, 1), hold(allocator, 2)
    prefixes.name(whole, TEXT[:4], 4)
    prefixes.name(target, TEXT[:8], 8, TARGET)
    digests = prefixes.digests(TEXT[:8], 8)
    assert prefixes.find(digests).pages == whole.pages
    both = prefixes.find(digests, (WHOLE, TARGET)).pages
    assert both == [*whole.pages, target.pages[1]]


def test_nothing_is_found_if_it_is_switched_off(allocator):
    prefixes = Prefixes(allocator, PAGE, enabled=False)
    held = hold(allocator, 3)
    prefixes.name(held, TEXT, 12)
    assert held.digests == [] == prefixes.digests(TEXT, 12)
