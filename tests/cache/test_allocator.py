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


def test_a_named_page_is_found_until_it_is_handed_out():
    allocator = PageAllocator(3)
    first, second = allocator.take(2)
    allocator.name(first, "a")
    allocator.name(second, "b")
    allocator.name(second, "c")
    assert allocator.find("a") == first and allocator.find("c") is None
    allocator.give_back([first, second])
    assert allocator.free == 3
    # The nameless page goes first, then the end of what was given back last.
    third, *_ = allocator.take(1)
    assert third not in (first, second) and not allocator.evictions
    assert allocator.take(1) == [second] and allocator.find("b") is None
    allocator.share([first])
    assert allocator.holders(first) == 1 and allocator.take(1) == []
    allocator.give_back([first, second])
    assert allocator.take(2) == [second, first] and allocator.evictions == 2


def test_the_first_page_of_a_name_has_it():
    allocator = PageAllocator(2)
    first, second = allocator.take(2)
    allocator.name(first, "a")
    allocator.name(second, "a")
    allocator.give_back([second])
    allocator.give_back([first])
    assert allocator.find("a") == first
    with pytest.raises(ValueError, match="not handed out"):
        allocator.name(second, "b")
    with pytest.raises(ValueError, match="not handed out"):
        allocator.share([second])
    allocator.forget_names()
    assert allocator.find("a") is None and sorted(allocator.take(2)) == [1, 2]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=60))
def test_counts_are_right_after_every_operation(moves):
    """Takes, shares, names and returns against lists of holders."""
    allocator, held, names = PageAllocator(5), [], {}
    for kind, number in moves:
        pick = held[number % len(held)] if held else None
        if kind == 0:
            before = {page: allocator.holders(page) for page in range(1, 6)}
            for page in allocator.take(1 + number % 2):
                assert not before[page]
                names = {n: p for n, p in names.items() if p != page}
                held.append(page)
        elif kind == 1 and pick:
            allocator.share([pick])
            held.append(pick)
        elif kind == 2 and pick:
            allocator.name(pick, number)
            if number not in names and pick not in names.values():
                names[number] = pick
        elif kind == 3 and pick:
            allocator.give_back([pick])
            held.remove(pick)
        elif kind == 4 and number in names:
            allocator.share([names[number]])
            held.append(names[number])
        assert allocator.free == 5 - len(set(held))
        assert all(allocator.holders(p) == held.count(p) for p in range(1, 6))
        assert all(allocator.find(n) == names.get(n) for n in range(10))
