"""Free blocks whose content may be asked for again, and which of them nobody has used for longest.

A use is noted at once, and entered when extents are looked at or somebody has to know it. Eviction
need not: what is not entered is younger than all that is, and stays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Generic

from kvcached_vmm.holding import UNUSED, Extent, Moment
from kvcached_vmm.policy import B
from kvcached_vmm.records import AGES

AGES_SECONDS = 1.0
"""How often a pool finds out how old its cache is, for neighbours that may come to need it."""

AGES_SAMPLE = 256
"""About how many cached extents are looked at for that, of those that there are."""

AHEAD = 1024
"""Who evicts anything evicts this part of the cache, if that is more: to turn to the cache costs
as much as to evict two extents. The engine knows the content until the block is handed out."""


class Cache(Generic[B]):
    """The cached blocks of a pool's extents.

    An extent stands in a log once for each time that blocks of it were kept, which is cheaper than
    to move it. What counts is the last time, ``Extent.used``; the others are dropped on the way.

    Args:
        extents: all extents, in the order of their indexes.
        owner: the extent of each block.
        unit_bytes: what giving an extent back is good for.
    """

    def __init__(
        self, extents: Sequence[Extent[B]], owner: Sequence[Extent[B]], unit_bytes: int
    ) -> None:
        self.num_blocks = 0
        """Blocks that are kept."""
        self.noted_at = -AGES_SECONDS
        """When ``note_ages`` last looked, in seconds on the pool's clock."""
        self._extents = extents
        self._owner = owner
        self._unit = unit_bytes
        self._news: list[tuple[Moment, Collection[B]]] = []
        self._log: deque[tuple[Moment, list[Extent[B]]]] = deque()
        self._each = 1
        self._noted_blocks = 0
        self._used_at: list[float] = []

    def keep(self, blocks: Collection[B], moment: Moment) -> None:
        """Keep ``blocks``, which must not change any more; the first is to be evicted first."""
        self._news.append((moment, blocks))
        self.num_blocks += len(blocks)

    def enter(self) -> None:
        """Enter the uses that were noted."""
        owner = self._owner
        for moment, blocks in self._news:
            used: list[Extent[B]] = []
            for block in blocks:
                extent = owner[block.block_id]
                extent.cached.append(block)
                if extent.used is not moment:
                    extent.used = moment
                    used.append(extent)
            used.reverse()
            self._log.append((moment, used))
        self._news.clear()

    def remove(self, block: B) -> bool:
        """Keep ``block`` no longer; False if it was not kept."""
        self.enter()
        extent = self._owner[block.block_id]
        if not remove_last(extent.cached, block):
            return False
        self.num_blocks -= 1
        if not extent.cached:
            extent.used = UNUSED
        return True

    def drop(self, extent: Extent[B]) -> list[B]:
        """Keep no block of ``extent`` any longer that is entered; return those that were."""
        blocks, extent.cached, extent.used = extent.cached, [], UNUSED
        self.num_blocks -= len(blocks)
        return blocks

    def evict(self, wanted: int) -> list[B]:
        """Keep no longer what nobody has used for longest: whole extents, until they have at least
        ``wanted`` blocks or nothing is left. The first is to be handed out first."""
        wanted = max(wanted, self.num_blocks // AHEAD)
        found: list[B] = []
        while len(found) < wanted and (extent := self.oldest()):
            found += self.drop(extent)
        return found

    def oldest(self) -> Extent[B] | None:
        """The extent that nobody has used for longest, by what is entered."""
        log = self._log
        while log or self._news:
            if not log:
                self.enter()
            moment, extents = log[0]
            while extents:
                if extents[-1].used is moment:
                    return extents[-1]
                extents.pop()
            log.popleft()
        return None

    def by_age(self) -> list[Extent[B]]:
        """All extents with cached blocks, that which nobody has used for longest first."""
        self.enter()
        return [e for moment, used in self._log for e in reversed(used) if e.used is moment]

    def tidy(self) -> None:
        """Drop from the log what does not count any more, if that is most of it."""
        if len(self._log) > 2 * len(self._extents):
            self._log = deque((extent.used, [extent]) for extent in self.by_age())

    def among(self, blocks: Iterable[B]) -> int:
        """How many of ``blocks`` are kept; those of one extent should follow each other."""
        self.enter()
        count, last = 0, None
        cached: set[int] = set()
        for block in blocks:
            extent = self._owner[block.block_id]
            if extent is not last:
                last, cached = extent, {each.block_id for each in extent.cached}
            count += block.block_id in cached
        return count

    def note_ages(self, free_blocks: Mapping[Extent[B], int], now: float) -> None:
        """Look at a sample of the cached extents: what could be given back, and how old is it?"""
        self.enter()
        span = -(-len(self._owner) // len(self._extents))
        self._each = 1 + self.num_blocks // (AGES_SAMPLE * span)
        sample = [extent for extent in self._extents[:: self._each] if extent.cached]
        self._used_at = sorted(e.used[0] for e in evictable(sample, free_blocks))
        self.noted_at, self._noted_blocks = now, self.num_blocks

    @property
    def evictable_bytes(self) -> int:
        """What could be given back, by the last ``note_ages`` and what has been evicted since: an
        estimate."""
        extents = len(self._used_at) * self._each
        if self.num_blocks < self._noted_blocks:
            extents = extents * self.num_blocks // self._noted_blocks
        return extents * self._unit

    def ages(self) -> tuple[float, ...]:
        """When that was last used, oldest first: one time for each ``AGES``-th part; () if nothing
        could be given back."""
        ages = self._used_at
        return tuple(ages[len(ages) * part // AGES] for part in range(AGES)) if ages else ()


def evictable(
    extents: Iterable[Extent[B]], free_blocks: Mapping[Extent[B], int]
) -> Iterator[Extent[B]]:
    """Those of ``extents``, which have cached blocks, that could be given back: the others of their
    blocks are free. ``free_blocks`` says how many of them are."""
    for extent in extents:
        free = len(extent.cached) + free_blocks.get(extent, 0)
        if free == len(extent.blocks) and extent.index:
            yield extent


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
