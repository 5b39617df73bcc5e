"""Who owns which page, on the host."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treespec_jax.cache.allocator import TRASH_PAGE, PageAllocator


def test_all_but_the_trash_page_are_handed_out_once():
    allocator = PageAllocator(5)
    pages = allocator.take(5)
    assert sorted(pages) == [1, 2, 3, 4, 5]
    assert TRASH_PAGE not in pages and allocator.free == 0


def test_a_wish_that_is_too_large_is_met_in_part():
    allocator = PageAllocator(3)
    assert len(allocator.take(2)) == 2
    assert len(allocator.take(2)) == 1
    assert allocator.take(2) == [] and allocator.take(0) == []


@pytest.mark.parametrize("page", [TRASH_PAGE, -1, 4, 3], ids=str)
def test_what_was_not_handed_out_cannot_come_back(page):
    """The trash page, ids out of range, and a page that is free."""
    allocator = PageAllocator(3)
    taken = allocator.take(2)
    assert 3 not in taken
    with pytest.raises(ValueError, match=f"page {page} was not handed out"):
        allocator.give_back([page])
    assert allocator.free == 1


def test_a_page_comes_back_once():
    allocator = PageAllocator(3)
    pages = allocator.take(2)
    allocator.give_back(pages)
    with pytest.raises(ValueError, match="not handed out"):
        allocator.give_back(pages[:1])
    other = allocator.take(1)
    with pytest.raises(ValueError, match="not handed out"):
        allocator.give_back([*other, *other])


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.integers(-3, 4), max_size=30))
def test_no_page_has_two_owners(moves):
    """Takes of n pages (n > 0), and returns of the oldest takes (n < 0)."""
    allocator, held = PageAllocator(7), []
    for move in moves:
        if move > 0:
            held.append(allocator.take(move))
        for _ in range(-move if move < 0 else 0):
            if held:
                allocator.give_back(held.pop(0))
        pages = sum(held, [])
        assert len(set(pages)) == len(pages)
        assert set(pages) <= set(range(1, 8))
        assert allocator.free + len(pages) == 7
