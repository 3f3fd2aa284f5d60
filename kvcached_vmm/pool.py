"""Which blocks to hand out, and which extents to give back.

An extent is *empty* (no memory), *resident* (has memory, or was promised it), *idle* (resident, and
all its blocks are free) or *leaving* (its release is under way). Of a resident extent's blocks
some are live, some cached (free, but their content may be asked for again) and some free.

A new block comes from the fullest extent that has a free one, so that the others drain; then from
idle extents; then from an extent that the budget has granted, lowest address first; then from the
cached extent that nobody has used for longest. Whoever takes whole extents' worth of blocks gets
idle and granted extents first, while there are few free blocks in others: blocks that are taken
together tend to come back together.

The free blocks of resident extents lie on one ``Stack``: handing out and taking back are list
operations, and the order is made anew a few times a second. ``Runs`` hold some of them back.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Generic

from kvcached_vmm.admission import Admission
from kvcached_vmm.cache import AGES_SECONDS, Cache, evictable, remove_last
from kvcached_vmm.extents import ExtentMap
from kvcached_vmm.fence import StepClock
from kvcached_vmm.holding import EMPTY, IDLE, LEAVING, RESIDENT, Extent, Holding, Idle
from kvcached_vmm.policy import HOLES, LOOK_SECONDS, Appetite, B, Budget, Policy, Spending
from kvcached_vmm.runs import Runs
from kvcached_vmm.stack import Stack

RELEASE_BATCH = 4
"""Extents given back beside a step. A driver call takes up to 0.2 ms while kernels run (H200), and
a hundred steps a second still give back 6 GiB a second."""


class ElasticPool(Generic[B]):
    """Hands out blocks of an arena and decides which extents have memory.

    The first block is never handed out and its extent is never given back, except by ``sleep``.
    ``lock`` is reentrant. ``take`` and ``prepare`` want it held, as in a scheduling round; the
    other methods take it themselves, on any thread.

    Args:
        blocks: all blocks, in the order of their ids, which start at 0.
        extents: where they lie.
        budget: what we may use.
        clock: the engine's steps.
        evict: makes the engine forget what free blocks hold, before their memory goes.
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
        self._holding = Holding(extents, budget)
        self._clock = clock
        self._evict = evict
        self._now = now
        self._unit, self._span = extents.largest_bytes, extents.blocks_per_extent
        self._extents = [
            Extent(index, [blocks[b] for b in reversed(extents.blocks(index)) if b])
            for index in range(extents.num_extents)
        ]
        self._owner = [self._extents[extents.extent_of(b)] for b in range(extents.num_blocks)]
        self._stack: Stack[B] = Stack()
        self._idle: Idle[B] = Idle()
        self._cache = Cache(self._extents, self._owner, self._unit)
        self._runs = Runs(self._span, self._begin_run) if self.policy.own_extents else None
        self._resident_blocks = self._granted_blocks = self._leaving = 0
        self._looked = -1.0
        self._appetite = Appetite()
        self.admission = Admission(extents)
        self.num_free_blocks = 0
        """Blocks that can be handed out now without asking anybody: free, cached, and granted."""
        self.wake()

    @property
    def cached_blocks(self) -> int:
        """Free blocks whose content is kept."""
        return self._cache.num_blocks

    @property
    def live_blocks(self) -> int:
        """Blocks that are handed out."""
        return self._resident_blocks + self._granted_blocks - self.num_free_blocks

    @property
    def committed_bytes(self) -> int:
        """Bytes of extents that have memory, or whose release is under way."""
        return self._holding.bytes

    def spending(self) -> Spending:
        """What the committed bytes are good for; what could be evicted, as of the last
        ``look_at_cache``."""
        with self.lock:
            cache, block = self._cache, self.extents.block_bytes
            live, cached = self.live_blocks * block, cache.num_blocks * block
            idle, leaving = len(self._idle) * self._unit, self._leaving * self._unit
            return Spending(live, cached, cache.evictable_bytes, idle, leaving, cache.ages())

    def look_at_cache(self) -> None:
        """Find out what could be evicted, unless that was done just now."""
        with self.lock:
            now = self._now()
            if now - self._cache.noted_at >= LOOK_SECONDS:
                self._cache.note_ages(self._sort(), now)

    def bound_cache(self, cache_bytes: int | None) -> None:
        """Cached blocks may hold this much from now on; None: no bound."""
        if cache_bytes != self.policy.cache_bytes:
            self.policy = replace(self.policy, cache_bytes=cache_bytes)
            self._looked = -1.0

    @property
    def has_spare(self) -> bool:
        """Whether time alone may set an extent free."""
        return bool(self._idle or self.cached_blocks or not self._stack.is_sorted)

    def take(self, count: int) -> list[B]:
        """Hand out ``count`` blocks, at most ``num_free_blocks``; the caller holds ``lock``. What
        content the engine still knows them to have it forgets."""
        self.num_free_blocks -= count
        self._appetite.taken += count
        stack = self._stack
        taken: list[B] = []
        if self._runs and self._runs.asked:
            taken = self._runs.take(count)
        elif count == 1:
            while not stack:
                self._load(1)
            return [stack.pop()]
        missing = count - len(taken)
        if missing >= self._span and len(stack) <= self.live_blocks // HOLES + missing:
            while missing >= self._span and (self._idle or self._holding.grants):
                blocks = self._next_extent().blocks
                taken += reversed(blocks)
                missing -= len(blocks)
        while missing > len(stack):
            missing -= len(stack)
            taken += reversed(stack)
            stack.clear()
            self._load(missing)
        taken += stack.take(missing)
        return taken

    def put(self, blocks: Collection[B]) -> None:
        """Take blocks back whose content is of no use."""
        if not blocks:
            return
        with self.lock:
            if self._runs:
                self._stack.add(self._runs.end(blocks))
            self._stack.add(blocks)
            self.num_free_blocks += len(blocks)

    def keep(self, blocks: Collection[B]) -> None:
        """Take blocks back whose content may be asked for again (``reclaim_cached``). The pool
        holds on to ``blocks``, which must not change any more."""
        if not blocks:
            return
        with self.lock:
            if self._runs:
                self._stack.add(self._runs.end(blocks))
            self._cache.keep(blocks, (self._now(), self._clock.launched))
            self.num_free_blocks += len(blocks)

    def reclaim_cached(self, block: B) -> None:
        """The content of a free block is wanted: the block is live again."""
        with self.lock:
            extent = self._owner[block.block_id]
            assert extent.state in (RESIDENT, IDLE), "a block without memory cannot be live"
            self.num_free_blocks -= 1
            if self._cache.remove(block):
                return
            if extent.state == IDLE:
                self._stack += self._idle.take(extent).blocks
            found = remove_last(self._stack, block)
            assert found, "a block that is not free cannot be wanted back"

    def prepare(self, count: int, hits: Iterable[B] = (), held: Sequence[B] = ()) -> None:
        """Ask the budget for what is missing: the engine is about to want ``count`` blocks, among
        them ``hits``, free ones whose content it will use, for a request that holds ``held``. The
        caller holds ``lock``."""
        short, own = count - (self.num_free_blocks - self.cached_blocks), 0
        if self._runs:
            own = self._runs.extents_for(held, count)
            short += self._runs.for_others
        if short <= 0 and count < self._span and not own:
            return
        cached_hits = self._cache.among(hits) if hits else 0
        short -= cached_hits
        over = max(0, self.cached_blocks - self.policy.most_cached(self.extents) - cached_hits)
        short -= over
        if short > 0:
            short = min(short, self._holding.spare * self._span)
            short -= self._reserve(-(-short // self._span)) * self._span
            self.admission.coveted(short)
        if short <= 0 and not over:
            whole = max(own, (count - cached_hits) // self._span) - len(self._idle)
            self._reserve(whole - self._holding.grants)
        if count > self.num_free_blocks:
            # What was granted is not used then, and goes back.
            self.admission.refused(count - self.num_free_blocks + self._granted_blocks)

    def settle(self) -> list[int]:
        """A scheduling round is over: give unused grants back.

        Returns:
            Extents that the reserve wants committed ahead of need.
        """
        with self.lock:
            ahead: list[int] = []
            self._appetite.settle(now := self._now())
            ready = self._ready(now)
            short = ready - len(self._idle)
            if len(self._idle) < self._appetite.low(ready, now):
                self._reserve(short)
                while self._holding.grants and len(ahead) < short:
                    extent = self._grow()
                    self._idle.add(extent, self._now())
                    ahead.append(extent.index)
                self.admission.coveted(ready * self._span - self.num_free_blocks)
            self.admission.settle()
            self._holding.cancel()
            self._count_grants()
            return ahead

    def tick(self, limit: int = RELEASE_BATCH) -> list[int]:
        """Drop what has been kept for long enough.

        Returns:
            Extents to release now, at most ``limit``; the caller answers for each with
            ``released``, later.
        """
        with self.lock:
            now, decay = self._now(), self.policy.decay_seconds
            if now - self._looked >= min(LOOK_SECONDS, decay / 4):
                self._looked = now
                self._cache.enter()
                past, bound = now - self.policy.cache_seconds, self.policy.most_cached(self.extents)
                self._forget_while(lambda e: e.used[0] <= past or self.cached_blocks > bound)
                self._cache.tidy()
                free_blocks = self._sort()
                if now - self._cache.noted_at >= AGES_SECONDS:
                    self._cache.note_ages(free_blocks, now)
            most = min(limit, len(self._idle) - self._ready(now))
            return self._leave(self._idle.since(now - decay, most)) if most > 0 else []

    def reclaim(self, wanted_bytes: int) -> list[int]:
        """Give back at least ``wanted_bytes`` if there is that much to spare: idle extents first,
        then cached ones, oldest first. Live blocks stay. Answer as for ``tick``."""
        with self.lock:
            free_blocks = self._sort()
            spare = sum(self.extents.own_bytes(extent.index) for extent in self._idle)
            for extent in evictable(self._cache.by_age(), free_blocks):
                if spare >= wanted_bytes:
                    break
                self._forget(extent)
                spare += self.extents.own_bytes(extent.index)
            self._cache.note_ages(self._sort(), self._now())
            return self._leave(list(self._idle), wanted_bytes)

    def released(self, extents: Iterable[int]) -> None:
        """The memory of ``extents`` is gone."""
        with self.lock:
            gone = [self._extents[index] for index in extents]
            assert all(extent.state == LEAVING for extent in gone)
            self._leaving -= len(gone)
            self._lose(gone)

    def forget_all(self) -> None:
        """No cached content is of any use."""
        with self.lock:
            self._forget_while(lambda _: True)

    def sleep(self) -> None:
        """All memory is gone, that of the first extent too. No block may be live."""
        with self.lock:
            assert not self.live_blocks, "a pool with live blocks cannot sleep"
            self.settle()
            self.forget_all()
            self._evict([block for extent in self._idle for block in extent.blocks] + self._stack)
            self._lose([extent for extent in self._extents if extent.state != EMPTY])
            self._stack.clear()
            self._idle.clear()
            self._resident_blocks = self.num_free_blocks = self._leaving = 0
            self._cache.note_ages({}, self._now())

    def wake(self) -> bool:
        """Ask for the memory of the first extent; False if the budget has none to grant now."""
        with self.lock:
            if self._extents[0].state == EMPTY and self._reserve(1):
                self._stack += self._grow().blocks
                self._holding.note()
            return self._extents[0].state != EMPTY

    def _load(self, wanted: int) -> None:
        """Put more blocks on the stack, which has run out; at best as many as are wanted."""
        if self._idle or self._holding.grants:
            self._stack += self._next_extent().blocks
        elif self._runs and self._runs.num_blocks:
            self._stack += self._runs.dissolve()
        else:
            blocks = self._cache.evict(wanted)
            assert blocks, "more blocks were asked for than num_free_blocks"
            self._stack += reversed(blocks)
            self._stack.is_sorted = False

    def _begin_run(self) -> list[B]:
        """The blocks of another extent, which the engine forgets; none while memory is short."""
        if not (self._idle or self._holding.grants) or self._appetite.is_tight(self._now()):
            return []
        blocks = self._next_extent().blocks
        self._evict(blocks)
        return blocks

    def _sort(self) -> dict[Extent[B], int]:
        """``Stack.order``; what it takes out is idle. Returns what each of the others has there."""
        whole, free_blocks = self._stack.order(self._owner, self._clock.launched)
        for extent in whole:
            self._idle.add(extent, self._now())
        return free_blocks

    def _forget_while(self, holds: Callable[[Extent[B]], bool]) -> None:
        """Forget extents while ``holds`` says so, first the one that was not used for longest."""
        while (extent := self._cache.oldest()) and holds(extent):
            self._forget(extent)

    def _ready(self, now: float) -> int:
        """How many idle extents to keep ready for what the next rounds may take."""
        most = self.policy.reserve_bytes // self._unit if self.live_blocks else 0
        return self._appetite.extents(most, self._span, now)

    def _next_extent(self) -> Extent[B]:
        return self._idle.take(next(reversed(self._idle))) if self._idle else self._grow()

    def _grow(self) -> Extent[B]:
        extent = self._extents[self._holding.grow()]
        self._count_grants()
        extent.state = RESIDENT
        self._resident_blocks += len(extent.blocks)
        self.num_free_blocks += len(extent.blocks)
        return extent

    def _reserve(self, extents: int) -> int:
        """Ask the budget for ``extents`` more; returns how many it granted."""
        granted = self._holding.reserve(extents)
        self._count_grants()
        if granted < extents:
            self._appetite.refused(self._now())
        return granted

    def _count_grants(self) -> None:
        self.num_free_blocks += self._holding.granted_blocks - self._granted_blocks
        self._granted_blocks = self._holding.granted_blocks

    def _lose(self, extents: Sequence[Extent[B]]) -> None:
        for extent in extents:
            extent.state = EMPTY
        self._holding.remove(extent.index for extent in extents)
        self._count_grants()

    def _forget(self, extent: Extent[B]) -> None:
        """Keep the content of ``extent`` no longer."""
        extent.quiet_step = extent.used[1]
        blocks = self._cache.drop(extent)
        if len(blocks) == len(extent.blocks) and extent.index:
            self._idle.add(extent, self._now())
        else:
            self._stack.add(blocks)

    def _leave(self, extents: Iterable[Extent[B]], wanted_bytes: float = math.inf) -> list[int]:
        """Give back those of these idle ``extents`` that are quiet, until that is enough."""
        leaving: list[int] = []
        for extent in extents:
            if wanted_bytes > 0 and self._clock.quiet(extent.quiet_step):
                self._idle.take(extent)
                self._evict(extent.blocks)
                extent.state = LEAVING
                self._leaving += 1
                self._resident_blocks -= len(extent.blocks)
                self.num_free_blocks -= len(extent.blocks)
                leaving.append(extent.index)
                wanted_bytes -= self.extents.own_bytes(extent.index)
        return leaving
