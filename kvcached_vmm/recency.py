"""Extents as a pool sees them, and which of those with cached blocks was not used for longest."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic

from kvcached_vmm.policy import B
from kvcached_vmm.records import AGES

EMPTY, RESIDENT, IDLE, LEAVING = range(4)

AGES_SECONDS = 1.0
"""How often a pool finds out how old its cache is, for neighbours that may come to need it."""

AGES_SAMPLE = 256
"""How many cached extents are looked at for that, of those that there are: 0.1 ms."""

Moment = tuple[float, int]
"""Seconds, and the last step launched by then. Moments are told apart by identity, not by value."""

UNUSED: Moment = (0.0, 0)
"""The moment of an extent that has no cached block."""


class Extent(Generic[B]):
    """What is known of an extent.

    Attributes:
        blocks: those that can be handed out, the last one first.
        cached: those that are free and kept, in the order in which they came.
        used: when the last of them came.
        quiet_step: steps after this one do not touch the extent, if all its blocks are free.
    """

    __slots__ = ("blocks", "cached", "idle_since", "index", "quiet_step", "state", "used")

    def __init__(self, index: int, blocks: list[B]) -> None:
        self.index = index
        self.blocks = blocks
        self.cached: list[B] = []
        self.state = EMPTY
        self.quiet_step = 0
        self.idle_since = 0.0
        self.used = UNUSED

    def drop_cached(self) -> list[B]:
        """Keep no block any longer; return those that were."""
        blocks, self.cached, self.used = self.cached, [], UNUSED
        return blocks


class Uses(Generic[B]):
    """When blocks were kept and in which extents, oldest first.

    An extent stands here once for each time that one of its blocks was kept, which is cheaper than
    to move it. What counts is the last time, ``Extent.used``; the others are dropped on the way.
    """

    def __init__(self) -> None:
        self._uses: deque[tuple[Moment, list[Extent[B]]]] = deque()

    def __len__(self) -> int:
        return len(self._uses)

    def add(self, moment: Moment, extents: list[Extent[B]]) -> None:
        """``extents`` are used now, which they say already; the first is to be evicted first."""
        extents.reverse()
        self._uses.append((moment, extents))

    def oldest(self) -> Extent[B] | None:
        """The extent that nobody has used for longest."""
        uses = self._uses
        while uses:
            moment, extents = uses[0]
            while extents:
                if extents[-1].used is moment:
                    return extents[-1]
                extents.pop()
            uses.popleft()
        return None

    def by_age(self) -> list[Extent[B]]:
        """All extents with cached blocks, that which nobody has used for longest first."""
        return [e for moment, used in self._uses for e in reversed(used) if e.used is moment]

    def tidy(self) -> None:
        """Drop what does not count any more."""
        self._uses = deque((extent.used, [extent]) for extent in self.by_age())


def evictable(
    extents: Iterable[Extent[B]], free_blocks: Mapping[Extent[B], int]
) -> Iterator[Extent[B]]:
    """Those of ``extents``, which have cached blocks, that could be given back: the others of their
    blocks are free. ``free_blocks`` says how many of them are."""
    for extent in extents:
        free = len(extent.cached) + free_blocks.get(extent, 0)
        if free == len(extent.blocks) and extent.index:
            yield extent


class CacheAges(Generic[B]):
    """How much of the cache could be given back, and when that was last used: an estimate."""

    def __init__(self, unit_bytes: int) -> None:
        self.noted_at = -AGES_SECONDS
        """When that was looked at, in seconds on the pool's clock."""
        self._unit = unit_bytes
        self._each = 1
        self._used_at: list[float] = []

    @property
    def size_bytes(self) -> int:
        """What could be given back."""
        return len(self._used_at) * self._each * self._unit

    def note(
        self, extents: Sequence[Extent[B]], free_blocks: Mapping[Extent[B], int], now: float
    ) -> None:
        """Look at a sample of the cached ``extents``, least recently used first."""
        self._each = 1 + len(extents) // AGES_SAMPLE
        sample = evictable(extents[:: self._each], free_blocks)
        self._used_at = [extent.used[0] for extent in sample]
        self.noted_at = now

    def parcels(self) -> tuple[float, ...]:
        """When it was last used, oldest first: one time for each ``AGES``-th part; () if nothing
        could be given back."""
        ages = self._used_at
        return tuple(ages[len(ages) * part // AGES] for part in range(AGES)) if ages else ()


def remove_last(blocks: list[B], block: B) -> bool:
    """Remove ``block`` itself, not one that equals it; False if it is not there. Looks from the
    end: a prefix is asked for from its head on, which is what comes back last."""
    at = len(blocks) - 1
    while at >= 0 and blocks[at] is not block:
        at -= 1
    if at < 0:
        return False
    del blocks[at]
    return True
