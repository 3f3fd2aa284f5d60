"""The book of SGLang's pages: what the length of a list says about the memory behind it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcached_plugins.sglang.pages import PageBook
from kvcached_vmm.extents import ExtentMap, Region
from kvcached_vmm.host_driver import GRANULARITY


def make_book(num_blocks: int = 18, span: int = 4) -> PageBook:
    """Extents of ``span`` pages; page 0 is the sink, so the first extent has one page less."""
    return PageBook(ExtentMap(num_blocks, [Region(0, GRANULARITY)], GRANULARITY, span))


class List:
    """A free list as SGLang keeps it: taken from the front, put back at the front."""

    def __init__(self, book: PageBook) -> None:
        self.book = book
        self.free: list[int] = []
        self.live: list[int] = []

    def grow(self, extents: int) -> None:
        self.book.credit += extents
        for extent in self.book.grow(extents):
            self.free += self.book.pages(extent)

    def take(self, count: int) -> None:
        self.live += self.free[:count]
        del self.free[:count]
        self.book.listed(len(self.free))

    def put(self, pages: list[int]) -> None:
        self.free[:0] = pages
        self.live = [page for page in self.live if page not in pages]

    def whole(self) -> list[int]:
        """The extents that are free as a whole, but for the one with the sink."""
        residents = self.book.resident_extents
        return [e for e in residents if e and set(self.book.pages(e)) <= set(self.free)]

    def sort(self) -> list[int]:
        found = self.whole()
        used = [page for page in self.free if self.book.extents.extent_of(page) not in found]
        self.free = sorted(used) + [page for e in found for page in self.book.pages(e)]
        self.book.reordered()
        return found

    def leave(self, count: int) -> list[int]:
        extents = self.book.leave(count)
        pages = sum(len(self.book.pages(extent)) for extent in extents)
        del self.free[len(self.free) - pages :]
        return extents


def test_the_first_extent_has_no_page_for_the_sink_and_is_never_idle() -> None:
    pages = List(make_book())
    pages.grow(1)
    assert pages.free == [1, 2, 3]
    assert list(pages.book.idle_extents) == []


def test_growth_takes_the_lowest_addresses() -> None:
    pages = List(make_book())
    pages.grow(2)
    pages.take(len(pages.free))
    pages.grow(1)
    assert pages.free == [8, 9, 10, 11]


def test_no_extent_grows_without_a_grant() -> None:
    with pytest.raises(AssertionError, match="grant"):
        make_book().grow(1)


def test_what_is_promised_counts_the_sink_and_the_short_last_extent() -> None:
    book = make_book(num_blocks=18, span=4)
    assert book.total_pages == 17
    book.room = 1
    assert book.promised_pages == 3
    book.room = 4
    assert book.promised_pages == 15
    book.room = 100
    assert book.promised_pages == 17


@given(num_blocks=st.integers(2, 60), span=st.integers(1, 9), pages=st.integers(0, 80))
def test_extents_for_is_the_least_that_holds_so_many_pages(
    num_blocks: int, span: int, pages: int
) -> None:
    book = make_book(num_blocks, min(span, num_blocks))
    count = book.extents_for(pages)
    book.room = count
    assert book.promised_pages >= min(pages, book.total_pages)
    book.room = count - 1
    assert count == 0 or book.promised_pages < pages


def test_an_extent_stops_being_idle_when_the_list_gets_shorter_than_it() -> None:
    pages = List(make_book())
    pages.grow(3)
    pages.take(3)
    assert list(pages.book.idle_extents) == [2, 1]
    pages.take(1)
    assert list(pages.book.idle_extents) == [2]
    pages.put([4])
    assert list(pages.book.idle_extents) == [2], "page 4 is free again, but nobody has looked"


def test_idle_extents_are_due_after_their_time_but_for_those_to_keep() -> None:
    pages = List(make_book())
    pages.grow(4)
    pages.book.found(pages.sort(), len(pages.free), now=10.0)
    assert pages.book.due(10.4, decay_seconds=0.5, keep=0) == 0
    assert pages.book.due(10.5, decay_seconds=0.5, keep=0) == 3
    assert pages.book.due(10.5, decay_seconds=0.5, keep=2) == 1


def test_a_look_does_not_make_idle_extents_younger() -> None:
    pages = List(make_book())
    pages.grow(4)
    for now in (10.0, 10.3):
        pages.book.found(pages.sort(), len(pages.free), now)
    assert pages.book.due(10.5, decay_seconds=0.5, keep=0) == 3


def test_what_was_taken_while_we_looked_is_not_idle() -> None:
    pages = List(make_book())
    pages.grow(3)
    found = pages.sort()
    pages.take(4)
    pages.put([4])
    pages.book.found(found, shortest=len(pages.free) - 1, now=0.0)
    assert list(pages.book.idle_extents) == [2]


def test_withheld_pages_and_available_and_live_ones_add_up_to_all() -> None:
    pages = List(make_book())
    pages.book.room = 1
    pages.grow(3)
    pages.take(5)
    leaving = pages.leave(1)
    book = pages.book
    available = len(pages.free) + book.promised_pages
    assert available + book.withheld_pages + 5 == book.total_pages
    assert book.live_pages(len(pages.free)) == 5
    book.left(leaving)
    available = len(pages.free) + book.promised_pages
    assert available + book.withheld_pages + 5 == book.total_pages


def test_after_sleep_the_sink_gets_its_memory_back_first() -> None:
    pages = List(make_book())
    pages.grow(3)
    pages.free.clear()
    pages.book.sleep()
    assert pages.book.live_pages(0) == 0
    pages.grow(2)
    assert pages.free == [1, 2, 3, 4, 5, 6, 7]


class Engine(RuleBasedStateMachine):
    """An engine that takes and frees pages at will, with a budget that changes at will."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = List(make_book(num_blocks=30, span=4))
        self.leaving: list[int] = []
        self.looking: list[int] | None = None
        self.shortest = 0
        self.now = 0.0
        self.pages.grow(1)

    @rule(count=st.integers(0, 8), room=st.integers(0, 9))
    def budget(self, count: int, room: int) -> None:
        self.pages.book.room = room
        grown = min(count, self.pages.book.empty_extents)
        if grown:
            self.looking = None
            self.pages.grow(grown)

    @rule(count=st.integers(0, 12))
    def take(self, count: int) -> None:
        self.pages.take(min(count, len(self.pages.free)))
        self.shortest = min(self.shortest, len(self.pages.free))

    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        if self.pages.live:
            freed = data.draw(st.lists(st.sampled_from(self.pages.live), unique=True))
            self.pages.put(freed)

    @rule()
    def look(self) -> None:
        self.looking = self.pages.sort()
        self.shortest = len(self.pages.free)

    @rule()
    def find(self) -> None:
        if self.looking is not None:
            self.pages.book.found(self.looking, self.shortest, self.now)
            self.looking = None

    @rule(seconds=st.floats(0, 2), keep=st.integers(0, 3))
    def give_back(self, seconds: float, keep: int) -> None:
        self.now += seconds
        if self.looking is None:
            self.leaving += self.pages.leave(self.pages.book.due(self.now, 1.0, keep))

    @rule()
    def left(self) -> None:
        self.pages.book.left(self.leaving)
        self.leaving = []

    @rule()
    def flush(self) -> None:
        self.looking = None
        resident = self.pages.book.cleared(self.now)
        self.pages.live = []
        self.pages.free = [page for extent in resident for page in self.pages.book.pages(extent)]

    @invariant()
    def the_book_is_right(self) -> None:
        book, free, live = self.pages.book, self.pages.free, self.pages.live
        book.check(free)
        assert not set(free) & set(live), "a page is handed out and free"
        with_memory = {page for e in book.resident_extents for page in book.pages(e)}
        assert set(free) | set(live) == with_memory, "a page without memory is in use, or lost"
        assert book.live_pages(len(free)) == len(live)
        available = len(free) + book.promised_pages
        assert available + len(live) + book.withheld_pages == book.total_pages
        assert not set(book.idle_extents) & set(self.leaving)


Engine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestEngine = Engine.TestCase
