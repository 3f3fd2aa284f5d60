"""Which blocks to hand out, and which extents to give back.

An extent is *empty* (no memory), *resident* (has memory, or was promised it), *idle* (resident, and
all its blocks are free) or *leaving* (its release is under way). Of a resident extent's blocks
some are live, some cached (free, but their content may be asked for again) and some free.

New blocks come from the fullest extent that has a free one, so that the others drain; then from
idle extents; then from an extent that the budget has granted, lowest address first; then from the
cached extent that nobody has used for longest.

The free blocks of resident extents lie on one stack, in the order in which they will be handed out.
Handing out and taking back are list operations on it, whatever the number of blocks; the order is
made anew a few times a second, and blocks that come back in between wait at the bottom.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Generic

from kvcached_vmm.extents import ExtentMap
from kvcached_vmm.fence import StepClock
from kvcached_vmm.holding import Holding
from kvcached_vmm.policy import B, Budget, Policy, Spending
from kvcached_vmm.recency import EMPTY, IDLE, LEAVING, RESIDENT, UNUSED, Extent, Uses, remove_last
from kvcached_vmm.records import AGES

LOOK_SECONDS = 0.1
"""How often ``tick`` looks for extents that have become idle or too old; less if they decay sooner.
A look costs about 0.2 us for each block on the stack."""

AGES_SECONDS = 1.0
"""How often ``tick`` finds out how old the cache is, for neighbours that may come to need it."""

AGES_SAMPLE = 256
"""How many cached extents are looked at for that, of those that there are: 0.1 ms."""

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
        self._unit = extents.largest_bytes
        self._span = extents.blocks_per_extent
        self._extents = [
            Extent(index, [blocks[b] for b in reversed(extents.blocks(index)) if b])
            for index in range(extents.num_extents)
        ]
        self._owner = [self._extents[extents.extent_of(b)] for b in range(extents.num_blocks)]
        self._stack: list[B] = []
        self._sorted = True
        self._idle: OrderedDict[Extent[B], None] = OrderedDict()
        self._uses: Uses[B] = Uses()
        self._resident_blocks = 0
        self._cached_blocks = 0
        self._granted_blocks = 0
        self._looked = -1.0
        self._leaving = 0
        self._short_blocks = self._coveted_blocks = 0
        self._shortage = 0, 0
        self._ages: list[float] = []
        self._each = 1
        self._aged_at = -AGES_SECONDS
        self.limit_bytes = extents.size_bytes
        """``admits`` as long as what is live stays below."""
        self.share_bytes: int | None = None
        """Likewise while other engines wait, but then one request is always admitted."""
        self.num_free_blocks = 0
        """Blocks that can be handed out now without asking anybody: free, cached, and granted."""
        self.wake()

    @property
    def cached_blocks(self) -> int:
        """Free blocks whose content is kept."""
        return self._cached_blocks

    @property
    def live_blocks(self) -> int:
        """Blocks that are handed out."""
        return self._resident_blocks + self._granted_blocks - self.num_free_blocks

    @property
    def committed_bytes(self) -> int:
        """Bytes of extents that have memory, or whose release is under way."""
        return self._holding.bytes

    @property
    def capacity_blocks(self) -> int:
        """How many blocks could be live at most."""
        limit = self.limit_bytes // self.extents.block_bytes
        return max(1, min(limit, self.extents.num_blocks - 1))

    def spending(self) -> Spending:
        """What the committed bytes are good for; what could be evicted, as of the last
        ``look_at_cache``.

        Ages are the times at which extents without live blocks were last used, oldest first: one
        for each eighth of them.
        """
        with self.lock:
            block, ages = self.extents.block_bytes, self._ages
            return Spending(
                self.live_blocks * block,
                self._cached_blocks * block,
                len(ages) * self._each * self._unit,
                len(self._idle) * self._unit,
                self._leaving * self._unit,
                tuple(ages[len(ages) * part // AGES] for part in range(AGES)) if ages else (),
            )

    def look_at_cache(self) -> None:
        """Find out what could be evicted, unless that was done just now."""
        with self.lock:
            if self._now() - self._aged_at >= LOOK_SECONDS:
                self._note_ages(self._sort())

    def bound_cache(self, cache_bytes: int | None) -> None:
        """Cached blocks may hold this much from now on; None: no bound."""
        if cache_bytes != self.policy.cache_bytes:
            self.policy = replace(self.policy, cache_bytes=cache_bytes)
            self._looked = -1.0

    def admits(self, count: int) -> bool:
        """Whether a request that needs ``count`` blocks may begin, as far as limits are concerned.

        A request that may not is counted as one that waits for memory.
        """
        live = self.live_blocks
        held = (live + count) * self.extents.block_bytes
        if held > self.limit_bytes:
            return False
        if live and self.share_bytes is not None and held > self.share_bytes:
            self._short_blocks = max(self._short_blocks, count)
            return False
        return True

    @property
    def has_spare(self) -> bool:
        """Whether time alone may set an extent free."""
        return bool(self._idle or self._cached_blocks or not self._sorted)

    def take(self, count: int) -> list[B]:
        """Hand out ``count`` blocks, at most ``num_free_blocks``; the caller holds ``lock``.

        A block may still have content that the engine knows: it forgets what it is handed. Who
        takes whole extents' worth of blocks gets idle extents first: blocks that are taken together
        tend to come back together.
        """
        self.num_free_blocks -= count
        stack = self._stack
        if count == 1:
            while not stack:
                self._load(1)
            return [stack.pop()]
        taken: list[B] = []
        while self._idle and count - len(taken) >= self._span:
            taken += reversed(self._leave_idle(next(reversed(self._idle))).blocks)
        missing = count - len(taken)
        while missing > len(stack):
            missing -= len(stack)
            taken += reversed(stack)
            stack.clear()
            self._load(missing)
        if missing:
            taken += stack[: -missing - 1 : -1]
            del stack[-missing:]
        return taken

    def take_one(self) -> B:
        """Hand out one block."""
        return self.take(1)[0]

    def put(self, blocks: Collection[B]) -> None:
        """Take blocks back whose content is of no use."""
        if not blocks:
            return
        with self.lock:
            self._stack[:0] = blocks
            self._sorted = False
            self.num_free_blocks += len(blocks)

    def keep(self, blocks: Collection[B]) -> None:
        """Take blocks back whose content may be asked for again (``reclaim_cached``)."""
        if not blocks:
            return
        with self.lock:
            owner = self._owner
            moment = (self._now(), self._clock.launched)
            used: list[Extent[B]] = []
            for block in blocks:
                extent = owner[block.block_id]
                extent.cached.append(block)
                if extent.used is not moment:
                    extent.used = moment
                    used.append(extent)
            self._uses.add(moment, used)
            self._cached_blocks += len(blocks)
            self.num_free_blocks += len(blocks)

    def reclaim_cached(self, block: B) -> None:
        """The content of a free block is wanted: the block is live again."""
        with self.lock:
            extent = self._owner[block.block_id]
            assert extent.state in (RESIDENT, IDLE), "a block without memory cannot be live"
            self.num_free_blocks -= 1
            if remove_last(extent.cached, block):
                self._cached_blocks -= 1
                if not extent.cached:
                    extent.used = UNUSED
                return
            if extent.state == IDLE:
                self._stack += self._leave_idle(extent).blocks
            found = remove_last(self._stack, block)
            assert found, "a block that is not free cannot be wanted back"

    def prepare(self, count: int, hits: Iterable[B] = ()) -> None:
        """Ask the budget for what is missing: the engine is about to want ``count`` blocks, among
        them ``hits``, free ones whose content it will use. The caller holds ``lock``."""
        short = count - (self.num_free_blocks - self._cached_blocks)
        if short <= 0:
            return
        cached_hits = self._cached_among(hits)
        short -= cached_hits
        bound = self.policy.cache_bytes
        if bound is not None:
            over = self._cached_blocks - bound // self.extents.block_bytes
            short -= max(0, over - cached_hits)
        if short > 0:
            short = min(short, self._holding.spare * self._span)
            short -= self._reserve(-(-short // self._span)) * self._span
            self._coveted_blocks = max(self._coveted_blocks, short)
        if count > self.num_free_blocks:
            # What was granted is not used then, and goes back.
            missing = count - self.num_free_blocks + self._granted_blocks
            self._short_blocks = max(self._short_blocks, missing)

    def shortage(self) -> tuple[int, int]:
        """Bytes that were asked for in the last scheduling round and not granted: those that
        requests wait for, and those that cached blocks made up for."""
        with self.lock:
            short, coveted = self._shortage
            wanted = -(-short // self._span) * self._unit
            return wanted, max(0, -(-coveted // self._span) * self._unit - wanted)

    def forget_shortage(self) -> None:
        """There are no rounds any more, so nobody waits."""
        with self.lock:
            self._shortage = 0, 0

    def settle(self) -> list[int]:
        """A scheduling round is over: give unused grants back.

        Returns:
            Extents that the reserve wants committed ahead of need.
        """
        with self.lock:
            self._shortage = self._short_blocks, self._coveted_blocks
            self._short_blocks = self._coveted_blocks = 0
            ahead: list[int] = []
            short = self.policy.reserve_bytes // self._unit - len(self._idle)
            if short > 0 and self.live_blocks:
                self._reserve(short)
                while self._holding.grants and len(ahead) < short:
                    extent = self._grow()
                    self._become_idle(extent)
                    ahead.append(extent.index)
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
            now = self._now()
            if now - self._looked >= min(LOOK_SECONDS, self.policy.decay_seconds / 4):
                self._looked = now
                past = now - self.policy.cache_seconds
                while (oldest := self._uses.oldest()) and oldest.used[0] <= past:
                    self._forget(oldest)
                if len(self._uses) > 2 * len(self._extents):
                    self._uses.tidy()
                self._heed_bound()
                free_blocks = self._sort()
                if now - self._aged_at >= AGES_SECONDS:
                    self._note_ages(free_blocks)
            due = now - self.policy.decay_seconds
            spare = len(self._idle)
            if self.live_blocks:
                spare -= self.policy.reserve_bytes // self._unit
            leaving: list[int] = []
            for extent in list(itertools.islice(self._idle, max(0, min(spare, limit)))):
                if extent.idle_since > due:
                    break
                if self._clock.quiet(extent.quiet_step):
                    leaving.append(self._leave(extent))
            return leaving

    def reclaim(self, wanted_bytes: int) -> list[int]:
        """Give back at least ``wanted_bytes`` if there is that much to spare: idle extents first,
        then cached ones, oldest first. Live blocks stay. Answer as for ``tick``."""
        with self.lock:
            free_blocks = self._sort()
            own_bytes = self.extents.own_bytes
            spare = sum(own_bytes(extent.index) for extent in self._idle)
            for extent in self._evictable(self._uses.by_age(), free_blocks):
                if spare >= wanted_bytes:
                    break
                self._forget(extent)
                spare += own_bytes(extent.index)
            self._note_ages(self._sort())
            leaving: list[int] = []
            for extent in list(self._idle):
                if wanted_bytes <= 0:
                    break
                if self._clock.quiet(extent.quiet_step):
                    leaving.append(self._leave(extent))
                    wanted_bytes -= own_bytes(extent.index)
            return leaving

    def released(self, extents: Iterable[int]) -> None:
        """The memory of ``extents`` is gone."""
        with self.lock:
            gone = [self._extents[index] for index in extents]
            assert all(extent.state == LEAVING for extent in gone)
            for extent in gone:
                extent.state = EMPTY
            self._leaving -= len(gone)
            self._holding.remove(extent.index for extent in gone)
            self._count_grants()

    def forget_all(self) -> None:
        """No cached content is of any use."""
        with self.lock:
            while extent := self._uses.oldest():
                self._forget(extent)

    def sleep(self) -> None:
        """All memory is gone, that of the first extent too. No block may be live."""
        with self.lock:
            assert not self.live_blocks, "a pool with live blocks cannot sleep"
            self.settle()
            self.forget_all()
            self._evict([block for extent in self._idle for block in extent.blocks] + self._stack)
            self._holding.remove(e.index for e in self._extents if e.state != EMPTY)
            for extent in self._extents:
                extent.state = EMPTY
            self._stack.clear()
            self._idle.clear()
            self._resident_blocks = self.num_free_blocks = self._leaving = 0
            self._ages = []

    def wake(self) -> bool:
        """Ask for the memory of the first extent; False if the budget has none to grant now."""
        with self.lock:
            first = self._extents[0]
            if first.state == EMPTY:
                self._reserve(1)
                if not self._holding.grants:
                    return False
                self._stack += self._grow().blocks
            return True

    def _load(self, wanted: int) -> None:
        """Put more blocks on the stack, which has run out; at best as many as are wanted."""
        if self._idle:
            self._stack += self._leave_idle(next(reversed(self._idle))).blocks
        elif self._holding.grants:
            self._stack += self._grow().blocks
        else:
            stack = self._stack
            while len(stack) < wanted and (extent := self._uses.oldest()):
                stack += extent.drop_cached()
            assert stack, "more blocks were asked for than num_free_blocks"
            stack.reverse()
            self._cached_blocks -= len(stack)
            self._sorted = False

    def _sort(self) -> dict[Extent[B], int]:
        """Take extents that are free as a whole off the stack, and put the blocks of the fullest
        extents on top of it. Returns how many blocks each of the others has on the stack."""
        free: defaultdict[Extent[B], list[B]] = defaultdict(list)
        owner = self._owner
        for block in self._stack:
            free[owner[block.block_id]].append(block)
        self._stack.clear()
        partly = []
        for extent, blocks in free.items():
            extent.quiet_step = self._clock.launched
            if len(blocks) == len(extent.blocks) and extent.index:
                self._become_idle(extent)
            else:
                partly.append((-len(blocks), extent.index, blocks))
        for _, _, blocks in sorted(partly):
            self._stack += blocks
        self._sorted = True
        return {self._extents[index]: -count for count, index, _ in partly}

    def _heed_bound(self) -> None:
        """Forget the oldest cached extents beyond what cached blocks may hold."""
        bound = self.policy.cache_bytes
        if bound is not None:
            most = bound // self.extents.block_bytes
            while self._cached_blocks > most and (oldest := self._uses.oldest()):
                self._forget(oldest)

    def _evictable(
        self, extents: Iterable[Extent[B]], free_blocks: dict[Extent[B], int]
    ) -> Iterator[Extent[B]]:
        """Those of ``extents``, which have cached blocks, that could be given back."""
        for extent in extents:
            free = len(extent.cached) + free_blocks.get(extent, 0)
            if free == len(extent.blocks) and extent.index:
                yield extent

    def _note_ages(self, free_blocks: dict[Extent[B], int]) -> None:
        extents = self._uses.by_age()
        self._each = 1 + len(extents) // AGES_SAMPLE
        evictable = self._evictable(extents[:: self._each], free_blocks)
        self._ages = [extent.used[0] for extent in evictable]
        self._aged_at = self._now()

    def _cached_among(self, blocks: Iterable[B]) -> int:
        """How many of ``blocks`` are cached; those of one extent should follow each other."""
        count, last = 0, None
        cached: set[int] = set()
        for block in blocks:
            extent = self._owner[block.block_id]
            if extent is not last:
                last, cached = extent, {each.block_id for each in extent.cached}
            count += block.block_id in cached
        return count

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
        return granted

    def _count_grants(self) -> None:
        self.num_free_blocks += self._holding.granted_blocks - self._granted_blocks
        self._granted_blocks = self._holding.granted_blocks

    def _become_idle(self, extent: Extent[B]) -> None:
        extent.state = IDLE
        extent.idle_since = self._now()
        self._idle[extent] = None

    def _leave_idle(self, extent: Extent[B]) -> Extent[B]:
        del self._idle[extent]
        extent.state = RESIDENT
        return extent

    def _forget(self, extent: Extent[B]) -> None:
        """Keep the content of ``extent`` no longer; the engine forgets it when it is reused."""
        extent.quiet_step = extent.used[1]
        blocks = extent.drop_cached()
        self._cached_blocks -= len(blocks)
        if len(blocks) == len(extent.blocks) and extent.index:
            self._become_idle(extent)
        else:
            self._stack[:0] = blocks
            self._sorted = False

    def _leave(self, extent: Extent[B]) -> int:
        self._leave_idle(extent)
        self._evict(extent.blocks)
        extent.state = LEAVING
        self._leaving += 1
        self._resident_blocks -= len(extent.blocks)
        self.num_free_blocks -= len(extent.blocks)
        return extent.index
