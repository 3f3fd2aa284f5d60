"""Which pages SGLang may hand out, and which extents are worth giving back. Integers only.

SGLang keeps its free pages in a tensor on the device. Reading it there would stall the device, so
the host keeps what it can know without looking: how long the list is, and which extents lie at its
*end*, whole and free. SGLang takes pages from the front of the list and puts them back at the
front; whatever the list was never shorter than is therefore still as it was.

An extent is *empty* (no memory), *resident*, or *leaving* (its release is under way). A resident
extent all of whose pages are free and at the end of the list is *idle*. Page 0 is SGLang's sink for
padding: it is never on the list, and its extent is never idle.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence

from kvcached_vmm.extents import ExtentMap

EMPTY, RESIDENT, LEAVING = range(3)


class PageBook:
    """The extents of a pool of pages, and what the length of the free list says about them.

    Args:
        extents: where pages lie; block 0 is the sink.
    """

    def __init__(self, extents: ExtentMap) -> None:
        self.extents = extents
        self.total_pages = extents.num_blocks - 1
        self.credit = 0
        """Extents that the budget has granted and that are not resident yet."""
        self.room = 0
        """Extents that the budget would grant beyond those, when last asked."""
        self._span = extents.blocks_per_extent
        self._state = [EMPTY] * extents.num_extents
        self._empty = list(range(extents.num_extents))
        self._leaving_pages = 0
        self._idle: list[int] = []
        self._idle_pages = 0
        self._idle_since: dict[int, float] = {}

    @property
    def empty_extents(self) -> int:
        """Extents without memory."""
        return len(self._empty)

    @property
    def idle_extents(self) -> Sequence[int]:
        """Idle extents; the first lies at the very end of the free list."""
        return self._idle

    @property
    def resident_extents(self) -> list[int]:
        """Extents with memory whose pages may be in use, in the order of their addresses."""
        return [extent for extent, state in enumerate(self._state) if state == RESIDENT]

    @property
    def promised_pages(self) -> int:
        """Pages of extents that have no memory and could have it now."""
        return self._pages_of_lowest(self.credit + self.room)

    @property
    def withheld_pages(self) -> int:
        """Pages that cannot be handed out now though nobody uses them: the rest of the extents
        without memory, and of those that are leaving."""
        empty = self._pages_of_lowest(len(self._empty))
        return empty + self._leaving_pages - self.promised_pages

    def live_pages(self, free_pages: int) -> int:
        """Pages in use when ``free_pages`` are on the list."""
        empty = self._pages_of_lowest(len(self._empty))
        return self.total_pages - empty - self._leaving_pages - free_pages

    def pages(self, extent: int) -> range:
        """The pages of ``extent`` that can be handed out."""
        blocks = self.extents.blocks(extent)
        return range(max(1, blocks.start), blocks.stop)

    def extents_for(self, pages: int) -> int:
        """How many more extents hold ``pages``; all that are left if they do not hold so many."""
        wanted = min(len(self._empty), max(0, -(-pages // self._span)))
        while wanted < len(self._empty) and self._pages_of_lowest(wanted) < pages:
            wanted += 1
        return wanted

    def grow(self, count: int) -> list[int]:
        """Make ``count`` granted extents resident, lowest addresses first.

        The caller commits them and puts their pages at the end of the free list, in this order.
        """
        assert count <= min(self.credit, len(self._empty)), "an extent needs a grant"
        self.credit -= count
        grown = [heapq.heappop(self._empty) for _ in range(count)]
        for extent in grown:
            self._state[extent] = RESIDENT
        self._idle[:0] = [extent for extent in reversed(grown) if extent]
        self._count_idle()
        return grown

    def listed(self, free_pages: int) -> None:
        """Pages were taken: ``free_pages`` are left on the list."""
        while self._idle_pages > free_pages:
            extent = self._idle.pop()
            self._idle_pages -= len(self.pages(extent))
            self._idle_since.pop(extent, None)

    def reordered(self) -> None:
        """The list has another order: nothing is known of its end until ``found``."""
        self._idle = []
        self._idle_pages = 0

    def found(self, free_extents: Collection[int], shortest: int, now: float) -> None:
        """The list was put in an order that ends with ``free_extents``, lowest addresses first.

        Args:
            free_extents: extents all of whose pages were free then.
            shortest: the least pages that were on the list since.
            now: seconds on a clock that does not jump.
        """
        self._idle = sorted(free_extents, reverse=True)
        self._count_idle()
        self._idle_since = {
            extent: self._idle_since.get(extent, now) for extent in self._idle if extent
        }
        self.listed(shortest)

    def due(self, now: float, decay_seconds: float, keep: int) -> int:
        """How many extents at the end of the list have been idle for long enough.

        Args:
            now: seconds on the same clock as for ``found``.
            decay_seconds: how long an extent stays idle before it is given back.
            keep: idle extents to leave in any case.
        """
        count = 0
        for extent in self._idle[: max(0, len(self._idle) - keep)]:
            if self._idle_since.setdefault(extent, now) + decay_seconds > now:
                break
            count += 1
        return count

    def leave(self, count: int) -> list[int]:
        """Take ``count`` idle extents away; the caller cuts as many pages off the end of the list
        (``pages``) and answers with ``left`` when their memory is gone."""
        leaving, self._idle = self._idle[:count], self._idle[count:]
        for extent in leaving:
            self._state[extent] = LEAVING
            self._leaving_pages += len(self.pages(extent))
            self._idle_since.pop(extent, None)
        self._count_idle()
        return leaving

    def left(self, extents: Collection[int]) -> None:
        """The memory of leaving ``extents`` is gone."""
        for extent in extents:
            assert self._state[extent] == LEAVING
            self._state[extent] = EMPTY
            self._leaving_pages -= len(self.pages(extent))
            heapq.heappush(self._empty, extent)

    def cleared(self, now: float) -> list[int]:
        """No page is in use; returns the resident extents, in the order in which their pages go on
        the list."""
        resident = self.resident_extents
        self.found([extent for extent in resident if extent], self.total_pages, now)
        return resident

    def sleep(self) -> None:
        """All memory is gone, that of the sink too. No page may be in use."""
        self._state = [EMPTY] * self.extents.num_extents
        self._empty = list(range(self.extents.num_extents))
        self._leaving_pages = self.credit = 0
        self._idle_since.clear()
        self.reordered()

    def check(self, free_pages: Sequence[int]) -> None:
        """Assert that the book agrees with a list of free pages."""
        assert len(free_pages) == len(set(free_pages)), "a page is on the list twice"
        assert 0 not in free_pages, "the sink is on the list"
        states = {self._state[self.extents.extent_of(page)] for page in free_pages}
        assert states <= {RESIDENT}, "a page without memory is on the list"
        assert sorted(self._empty) == [e for e, s in enumerate(self._state) if s == EMPTY]
        end = [page for extent in reversed(self._idle) for page in self.pages(extent)]
        assert not end or list(free_pages[-len(end) :]) == end, "idle extents are elsewhere"
        assert self.withheld_pages >= 0
        assert self.live_pages(len(free_pages)) >= 0

    def _count_idle(self) -> None:
        self._idle_pages = sum(len(self.pages(extent)) for extent in self._idle)

    def _pages_of_lowest(self, count: int) -> int:
        """Pages of the ``count`` extents that would become resident next."""
        count = min(count, len(self._empty))
        pages = count * self._span
        if count and self._empty[0] == 0:
            pages -= 1
        last = self.extents.num_extents - 1
        if count and count == len(self._empty) and self._state[last] == EMPTY:
            pages -= self._span - len(self.extents.blocks(last))
        return pages
