"""Which blocks to hand out, and which extents to give back. The policy, in pure Python.

An extent is *empty* (no memory), *resident* (has memory, or has been promised it) or *leaving* (its
release is under way). Of a resident extent's blocks some are live, some cached (free, but their
content may be asked for again) and some free; it is *idle* when all are free.

New blocks come from the fullest extent that has a free one, so that the others drain; then from
idle extents; then from an extent that the budget has granted, lowest address first; then from the
cached extent that nobody has used for longest.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from kvcached_vmm.extents import ExtentMap, Footprint
from kvcached_vmm.fence import StepClock

EMPTY, RESIDENT, LEAVING = range(3)

RELEASE_BATCH = 16
"""Extents given back at a time: 16 unmappings hold a step up by about 0.4 ms on an H200."""


class Block(Protocol):
    """What the pool needs to know of an engine's block."""

    @property
    def block_id(self) -> int: ...


class Budget(Protocol):
    """Bytes that this pool may use. ``ledger.Account`` is one."""

    def reserve(self, wanted_bytes: int, unit_bytes: int) -> int:
        """Grant at most ``wanted_bytes``, in whole units; return what was granted."""
        ...

    def commit(self, granted_bytes: int, used_bytes: int) -> None:
        """Turn ``granted_bytes`` of grants into ``used_bytes`` of memory in use."""
        ...

    def cancel(self, granted_bytes: int) -> None:
        """Give grants back unused."""
        ...

    def release(self, used_bytes: int) -> None:
        """Memory is no longer in use."""
        ...


@dataclass(frozen=True)
class Policy:
    """How long memory is kept.

    Attributes:
        decay_seconds: an idle extent is kept this long for reuse.
        cache_seconds: a cached extent that nobody asks for is kept this long.
        cache_bytes: cached blocks may hold this much before new blocks evict them; None: no bound.
        reserve_bytes: idle extents kept ready while any block is live.
    """

    decay_seconds: float = 2.0
    cache_seconds: float = 60.0
    cache_bytes: int | None = None
    reserve_bytes: int = 0


B = TypeVar("B", bound=Block)


class _Extent(Generic[B]):
    __slots__ = ("cached", "free", "idle_since", "index", "quiet_step", "size", "state", "used_at")

    def __init__(self, index: int, free: list[B]) -> None:
        self.index = index
        self.size = len(free)
        self.free = free
        self.cached: dict[int, B] = {}
        self.state = EMPTY
        self.quiet_step = 0
        self.idle_since = 0.0
        self.used_at = 0.0


class ElasticPool(Generic[B]):
    """Hands out blocks of an arena and decides which extents have memory.

    The first block is never handed out and its extent is never given back, except by ``sleep``.
    Methods may be called from several threads; ``lock`` is reentrant and may be held around several.

    Args:
        blocks: all blocks, in the order of their ids, which start at 0.
        extents: where they lie.
        budget: what we may use.
        clock: the engine's steps.
        evict: makes the engine forget the content of cached blocks.
        policy: how long to keep what.
        now: seconds on a clock that does not jump.
    """

    def __init__(
        self,
        blocks: Sequence[B],
        extents: ExtentMap,
        budget: Budget,
        clock: StepClock,
        evict: Callable[[list[B]], None],
        policy: Policy | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.extents = extents
        self.policy = policy or Policy()
        self.lock = threading.RLock()
        self._budget = budget
        self._clock = clock
        self._evict = evict
        self._now = now
        self._unit = extents.largest_bytes
        self._footprint = Footprint(extents)
        self._extents = [
            _Extent(index, [blocks[b] for b in reversed(extents.blocks(index)) if b])
            for index in range(extents.num_extents)
        ]
        self._owner = list(
            itertools.chain.from_iterable(
                itertools.repeat(extent, len(extents.blocks(extent.index)))
                for extent in self._extents
            )
        )
        self._empty = list(range(extents.num_extents))
        self._partial: list[tuple[int, int]] = []
        self._idle: OrderedDict[_Extent[B], None] = OrderedDict()
        self._lru: OrderedDict[_Extent[B], None] = OrderedDict()
        self._open: _Extent[B] | None = None
        self._total = 0
        self._free = 0
        self._cached = 0
        self._credit = 0
        self.wake()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now, without asking anybody."""
        return self._free + self._cached + self._granted_blocks()

    @property
    def cached_blocks(self) -> int:
        """Free blocks whose content is kept."""
        return self._cached

    @property
    def live_blocks(self) -> int:
        """Blocks that are handed out."""
        return self._total - self._free - self._cached

    @property
    def committed_bytes(self) -> int:
        """Bytes of extents that are resident or leaving."""
        return self._footprint.bytes

    @property
    def has_spare(self) -> bool:
        """Whether time alone may set an extent free."""
        return bool(self._idle or self._lru)

    def take(self, count: int) -> list[B]:
        """Hand out ``count`` blocks, at most ``num_free_blocks``. Cached ones lose their content."""
        with self.lock:
            taken: list[B] = []
            while count:
                extent = self._open
                if extent is None or not extent.free:
                    extent = self._open = self._next()
                free = extent.free
                if len(free) <= count:
                    free.reverse()
                    taken += free
                    extent.free = []
                    self._free -= len(free)
                    count -= len(free)
                else:
                    taken += free[: -count - 1 : -1]
                    del free[-count:]
                    self._free -= count
                    count = 0
            return taken

    def take_one(self) -> B:
        """Hand out one block."""
        return self.take(1)[0]

    def put(self, blocks: Iterable[B]) -> None:
        """Take blocks back whose content is of no use."""
        with self.lock:
            owner = self._owner
            touched: list[_Extent[B]] = []
            last: _Extent[B] | None = None
            count = 0
            for block in blocks:
                extent = owner[block.block_id]
                extent.free.append(block)
                count += 1
                if extent is not last:
                    last = extent
                    touched.append(extent)
            if count:
                self._free += count
                self._settle(touched)

    def keep(self, blocks: Iterable[B]) -> None:
        """Take blocks back whose content may be asked for again (``reclaim_cached``)."""
        with self.lock:
            owner = self._owner
            touched: dict[_Extent[B], None] = {}
            for block in blocks:
                extent = owner[block.block_id]
                extent.cached[block.block_id] = block
                touched[extent] = None
                self._cached += 1
            if touched:
                now = self._now()
                for extent in touched:
                    extent.used_at = now
                    extent.quiet_step = self._clock.launched
                    self._lru[extent] = None
                    self._lru.move_to_end(extent)

    def reclaim_cached(self, block: B) -> None:
        """The content of a free block is wanted: the block is live again."""
        with self.lock:
            extent = self._owner[block.block_id]
            if extent.cached.pop(block.block_id, None) is not None:
                self._cached -= 1
                if not extent.cached:
                    del self._lru[extent]
                return
            assert extent.state == RESIDENT, "a block without memory cannot be live"
            extent.free.remove(block)
            self._free -= 1
            self._idle.pop(extent, None)
            self._place(extent)

    def prepare(self, count: int, cached_hits: int = 0) -> None:
        """The engine is about to ask whether ``count`` blocks are free, ``cached_hits`` of them
        cached ones that it will use as they are. Asks the budget for what is missing."""
        with self.lock:
            short = count - cached_hits - self._free - self._granted_blocks()
            if short <= 0:
                return
            bound = self.policy.cache_bytes
            if bound is not None:
                over = self._cached - bound // self.extents.block_bytes
                short -= max(0, over - cached_hits)
            if short > 0:
                self._reserve(-(-short // self.extents.blocks_per_extent))

    def settle(self) -> list[int]:
        """A scheduling round is over: give unused grants back.

        Returns:
            Extents that the reserve wants committed ahead of need.
        """
        with self.lock:
            ahead = []
            short = self.policy.reserve_bytes // self._unit - len(self._idle)
            if short > 0 and self.live_blocks:
                self._reserve(short)
                while self._credit and len(ahead) < short:
                    extent = self._grow()
                    self._place(extent)
                    ahead.append(extent.index)
            if self._credit:
                self._budget.cancel(self._credit * self._unit)
                self._credit = 0
            return ahead

    def tick(self) -> list[int]:
        """Drop what has been kept for long enough.

        Returns:
            Extents to release now, at most ``RELEASE_BATCH``; the caller answers for each with
            ``released``, later.
        """
        with self.lock:
            now = self._now()
            while self._lru:
                oldest = next(iter(self._lru))
                if oldest.used_at + self.policy.cache_seconds > now:
                    break
                self._forget(oldest)
            due = now - self.policy.decay_seconds
            spare = len(self._idle)
            if self.live_blocks:
                spare -= self.policy.reserve_bytes // self._unit
            leaving = []
            for extent in list(itertools.islice(self._idle, max(0, spare))):
                if extent.idle_since > due or len(leaving) == RELEASE_BATCH:
                    break
                if self._clock.quiet(extent.quiet_step):
                    leaving.append(self._leave(extent))
            return leaving

    def reclaim(self, wanted_bytes: int) -> list[int]:
        """Give back at least ``wanted_bytes`` if there is that much to spare: idle extents first,
        then cached ones, oldest first. Live blocks stay. Answer as for ``tick``."""
        with self.lock:
            wanted = -(-wanted_bytes // self._unit)
            for extent in list(self._lru):
                if len(self._idle) >= wanted:
                    break
                if len(extent.free) + len(extent.cached) == extent.size:
                    self._forget(extent)
            quiet = [extent for extent in self._idle if self._clock.quiet(extent.quiet_step)]
            return [self._leave(extent) for extent in quiet[:wanted]]

    def released(self, extents: Iterable[int]) -> None:
        """The memory of ``extents`` is gone."""
        with self.lock:
            before = self._footprint.bytes
            for index in extents:
                extent = self._extents[index]
                assert extent.state == LEAVING
                extent.state = EMPTY
                heapq.heappush(self._empty, index)
                self._footprint.remove(index)
            self._budget.release(before - self._footprint.bytes)

    def forget_all(self) -> None:
        """No cached content is of any use."""
        with self.lock:
            for extent in list(self._lru):
                self._forget(extent, tell=False)

    def sleep(self) -> None:
        """All memory is gone, that of the first extent too. No block may be live."""
        with self.lock:
            assert not self.live_blocks, "a pool with live blocks cannot sleep"
            self.settle()
            self.forget_all()
            self._budget.release(self.committed_bytes)
            self._footprint = Footprint(self.extents)
            self._empty = list(range(self.extents.num_extents))
            for extent in self._extents:
                extent.state = EMPTY
            self._partial.clear()
            self._idle.clear()
            self._open = None
            self._total = self._free = 0

    def wake(self) -> bool:
        """Ask for the memory of the first extent; False if the budget has none to grant now."""
        with self.lock:
            first = self._extents[0]
            if first.state == EMPTY:
                self._reserve(1)
                if not self._credit:
                    return False
                self._grow()
                self._place(first)
            return True

    def check(self) -> None:
        """Assert that every block is counted once and every extent is in the right place."""
        with self.lock:
            resident = [extent for extent in self._extents if extent.state == RESIDENT]
            assert self._total == sum(extent.size for extent in resident)
            assert self._free == sum(len(extent.free) for extent in resident)
            assert self._cached == sum(len(extent.cached) for extent in resident)
            assert set(self._lru) == {extent for extent in self._extents if extent.cached}
            assert sorted(self._empty) == [e.index for e in self._extents if e.state == EMPTY]
            assert set(self._footprint) == {e.index for e in self._extents if e.state != EMPTY}
            for extent in self._extents:
                ids = [block.block_id for block in extent.free] + list(extent.cached)
                assert len(ids) == len(set(ids)) <= extent.size
                assert set(ids) <= set(self.extents.blocks(extent.index)) - {0}
                assert extent.state == RESIDENT or len(extent.free) == extent.size
                is_idle = extent.state == RESIDENT and len(extent.free) == extent.size
                assert (extent in self._idle) == (
                    is_idle and extent.index != 0 and extent is not self._open
                )

    def _granted_blocks(self) -> int:
        granted = self._credit * self.extents.blocks_per_extent
        if self._credit and self._credit == len(self._empty):
            granted -= self.extents.blocks_per_extent - self._extents[max(self._empty)].size
        return granted

    def _next(self) -> _Extent[B]:
        while self._partial:
            count, index = heapq.heappop(self._partial)
            extent = self._extents[index]
            if count == len(extent.free) and extent.state == RESIDENT and extent not in self._idle:
                return extent
        if self._idle:
            return self._idle.popitem()[0]
        if self._credit:
            return self._grow()
        assert self._lru, "more blocks were asked for than num_free_blocks"
        oldest = next(iter(self._lru))
        self._forget(oldest)
        self._idle.pop(oldest, None)
        return oldest

    def _grow(self) -> _Extent[B]:
        extent = self._extents[heapq.heappop(self._empty)]
        before = self._footprint.bytes
        self._footprint.add(extent.index)
        self._credit -= 1
        self._budget.commit(self._unit, self._footprint.bytes - before)
        extent.state = RESIDENT
        self._total += extent.size
        self._free += extent.size
        return extent

    def _reserve(self, extents: int) -> None:
        wanted = min(extents, len(self._empty) - self._credit)
        if wanted > 0:
            granted = self._budget.reserve(wanted * self._unit, self._unit)
            self._credit += granted // self._unit

    def _settle(self, touched: Iterable[_Extent[B]]) -> None:
        for extent in touched:
            extent.quiet_step = self._clock.launched
            self._place(extent)

    def _place(self, extent: _Extent[B]) -> None:
        """Put an extent whose free blocks have changed where ``_next`` and ``tick`` look for it."""
        if len(extent.free) == extent.size and extent.index:
            if extent is self._open:
                self._open = None
            extent.idle_since = self._now()
            self._idle[extent] = None
        elif extent.free:
            heapq.heappush(self._partial, (len(extent.free), extent.index))

    def _forget(self, extent: _Extent[B], tell: bool = True) -> None:
        """Make the cached blocks of ``extent`` free; it has been out of use since ``used_at``."""
        blocks = list(extent.cached.values())
        if tell:
            self._evict(blocks)
        extent.cached.clear()
        extent.free += blocks
        self._cached -= len(blocks)
        self._free += len(blocks)
        del self._lru[extent]
        self._place(extent)
        if extent in self._idle:
            extent.idle_since = extent.used_at
            self._idle.move_to_end(extent, last=False)

    def _leave(self, extent: _Extent[B]) -> int:
        del self._idle[extent]
        extent.state = LEAVING
        self._total -= extent.size
        self._free -= extent.size
        return extent.index
