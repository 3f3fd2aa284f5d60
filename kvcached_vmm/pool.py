"""Which blocks to hand out, and which extents to give back. The policy, in pure Python.

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

import heapq
import itertools
import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from kvcached_vmm.extents import ExtentMap, Footprint
from kvcached_vmm.fence import StepClock
from kvcached_vmm.records import AGES

EMPTY, RESIDENT, IDLE, LEAVING = range(4)

LOOK_SECONDS = 0.1
"""How often ``tick`` looks for extents that have become idle or too old; less if they decay sooner.
A look costs about 0.2 us for each block on the stack."""

RELEASE_BATCH = 4
"""Extents given back beside a step. A driver call takes up to 0.2 ms while kernels run (H200), and
a hundred steps a second still give back 6 GiB a second."""


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

    decay_seconds: float = 0.5
    cache_seconds: float = 60.0
    cache_bytes: int | None = None
    reserve_bytes: int = 0


@dataclass(frozen=True)
class Spending:
    """What a pool's committed bytes are good for; see ``records.AccountView``."""

    live_bytes: int
    cached_bytes: int
    evictable_bytes: int
    idle_bytes: int
    leaving_bytes: int
    ages: tuple[float, ...]


B = TypeVar("B", bound=Block)


Moment = tuple[float, int]
"""Seconds, and the last step launched by then. Moments are told apart by identity, not by value."""

UNUSED: Moment = (0.0, 0)
"""The moment of an extent that has no cached block."""


class _Extent(Generic[B]):
    """``cached`` has the blocks that are kept, and ``used`` says when one of them last came."""

    __slots__ = ("blocks", "cached", "idle_since", "index", "quiet_step", "state", "used")

    def __init__(self, index: int, blocks: list[B]) -> None:
        self.index = index
        self.blocks = blocks
        self.cached: list[B] = []
        self.state = EMPTY
        self.quiet_step = 0
        self.idle_since = 0.0
        self.used = UNUSED


class ElasticPool(Generic[B]):
    """Hands out blocks of an arena and decides which extents have memory.

    The first block is never handed out and its extent is never given back, except by ``sleep``.
    ``lock`` is reentrant. ``take`` and ``prepare`` want it held, as in a scheduling round, and the
    other methods take it themselves: they may be called from any thread.

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
        self._budget = budget
        self._clock = clock
        self._evict = evict
        self._now = now
        self._unit = extents.largest_bytes
        self._span = extents.blocks_per_extent
        self._footprint = Footprint(extents)
        self._extents = [
            _Extent(index, [blocks[b] for b in reversed(extents.blocks(index)) if b])
            for index in range(extents.num_extents)
        ]
        self._owner = [self._extents[extents.extent_of(b)] for b in range(extents.num_blocks)]
        self._empty = list(range(extents.num_extents))
        self._stack: list[B] = []
        self._sorted = True
        self._idle: OrderedDict[_Extent[B], None] = OrderedDict()
        self._uses: deque[tuple[Moment, list[_Extent[B]]]] = deque()
        """When blocks were kept and in which extents, oldest first. An extent stands wherever one
        of its blocks was kept; what counts is the last time, ``_Extent.used``."""
        self._resident_blocks = 0
        self._cached_blocks = 0
        self._credit = 0
        self._credit_blocks = 0
        self._looked = -1.0
        self._leaving = 0
        self._short_blocks = self._coveted_blocks = 0
        self._shortage = 0, 0
        self._ages: list[float] = []
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
        return self._resident_blocks + self._credit_blocks - self.num_free_blocks

    @property
    def committed_bytes(self) -> int:
        """Bytes of extents that have memory, or whose release is under way."""
        return self._footprint.bytes

    @property
    def capacity_blocks(self) -> int:
        """How many blocks could be live at most."""
        limit = self.limit_bytes // self.extents.block_bytes
        return max(1, min(limit, self.extents.num_blocks - 1))

    def spending(self) -> Spending:
        """What the committed bytes are good for; how old cached extents are, as of the last look.

        Ages are the times at which extents without live blocks were last used, oldest first: one
        for each eighth of them.
        """
        with self.lock:
            block, ages = self.extents.block_bytes, self._ages
            return Spending(
                self.live_blocks * block,
                self._cached_blocks * block,
                len(ages) * self._unit,
                len(self._idle) * self._unit,
                self._leaving * self._unit,
                tuple(ages[len(ages) * part // AGES] for part in range(AGES)) if ages else (),
            )

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
            used: list[_Extent[B]] = []
            for block in blocks:
                extent = owner[block.block_id]
                extent.cached.append(block)
                if extent.used is not moment:
                    extent.used = moment
                    used.append(extent)
            used.reverse()
            self._uses.append((moment, used))
            self._cached_blocks += len(blocks)
            self.num_free_blocks += len(blocks)

    def reclaim_cached(self, block: B) -> None:
        """The content of a free block is wanted: the block is live again."""
        with self.lock:
            extent = self._owner[block.block_id]
            assert extent.state in (RESIDENT, IDLE), "a block without memory cannot be live"
            self.num_free_blocks -= 1
            blocks = extent.cached
            at = _last(blocks, block)
            if at >= 0:
                self._cached_blocks -= 1
                if len(blocks) == 1:
                    extent.used = UNUSED
            else:
                if extent.state == IDLE:
                    self._stack += self._leave_idle(extent).blocks
                blocks = self._stack
                at = _last(blocks, block)
            del blocks[at]

    def prepare(self, count: int, hits: Iterable[B] = ()) -> None:
        """The engine is about to ask whether ``count`` blocks are free, among them ``hits``, free
        ones whose content it will use. Asks the budget for what is missing; the caller holds
        ``lock``."""
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
            short = min(short, (len(self._empty) - self._credit) * self._span)
            short -= self._reserve(-(-short // self._span)) * self._span
            self._coveted_blocks = max(self._coveted_blocks, short)
        if count > self.num_free_blocks:
            # What was granted is not used then, and goes back.
            missing = count - self.num_free_blocks + self._credit_blocks
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
                while self._credit and len(ahead) < short:
                    extent = self._grow()
                    self._become_idle(extent, self._now())
                    ahead.append(extent.index)
            if self._credit:
                self._budget.cancel(self._credit * self._unit)
                self._grant(-self._credit)
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
                while (oldest := self._oldest()) is not None:
                    if oldest.used[0] + self.policy.cache_seconds > now:
                        break
                    self._forget(oldest)
                if len(self._uses) > 2 * len(self._extents):
                    self._uses = deque((e.used, [e]) for e in self._by_age())
                self._heed_bound()
                self._ages = [extent.used[0] for extent in self._evictable(self._sort())]
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
            spare = sum(self._own_bytes(extent) for extent in self._idle)
            for extent in self._evictable(free_blocks):
                if spare >= wanted_bytes:
                    break
                self._forget(extent)
                spare += self._own_bytes(extent)
            self._ages = [extent.used[0] for extent in self._evictable(self._sort())]
            leaving: list[int] = []
            for extent in list(self._idle):
                if wanted_bytes <= 0:
                    break
                if self._clock.quiet(extent.quiet_step):
                    leaving.append(self._leave(extent))
                    wanted_bytes -= self._own_bytes(extent)
            return leaving

    def released(self, extents: Iterable[int]) -> None:
        """The memory of ``extents`` is gone."""
        with self.lock:
            before = self._footprint.bytes
            for index in extents:
                extent = self._extents[index]
                assert extent.state == LEAVING
                extent.state = EMPTY
                self._leaving -= 1
                heapq.heappush(self._empty, index)
                self._footprint.remove(index)
            self._budget.release(before - self._footprint.bytes)
            self._grant(0)

    def forget_all(self) -> None:
        """No cached content is of any use."""
        with self.lock:
            while (extent := self._oldest()) is not None:
                self._forget(extent)

    def sleep(self) -> None:
        """All memory is gone, that of the first extent too. No block may be live."""
        with self.lock:
            assert not self.live_blocks, "a pool with live blocks cannot sleep"
            self.settle()
            self.forget_all()
            self._evict([block for extent in self._idle for block in extent.blocks] + self._stack)
            self._budget.release(self.committed_bytes)
            self._footprint = Footprint(self.extents)
            self._empty = list(range(self.extents.num_extents))
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
                if not self._credit:
                    return False
                self._stack += self._grow().blocks
            return True

    def check(self) -> None:
        """Assert that every block is counted once and every extent is in the right place."""
        with self.lock:
            stacked = [block.block_id for block in self._stack]
            cached = [block.block_id for extent in self._extents for block in extent.cached]
            idle = [block.block_id for extent in self._idle for block in extent.blocks]
            free = stacked + cached + idle
            assert len(free) == len(set(free))
            assert 0 not in free
            assert self.num_free_blocks == len(free) + self._credit_blocks
            assert self._cached_blocks == len(cached)
            used = self._by_age()
            assert len(used) == len(set(used))
            assert set(used) == {self._owner[block] for block in cached}
            assert all(extent.used is UNUSED for extent in set(self._extents) - set(used))
            assert all(self._owner[block].state == RESIDENT for block in stacked + cached)
            in_state = defaultdict(set)
            for extent in self._extents:
                in_state[extent.state].add(extent.index)
            assert {extent.index for extent in self._idle} == in_state[IDLE]
            assert sorted(self._empty) == sorted(in_state[EMPTY])
            assert set(self._footprint) == in_state[RESIDENT] | in_state[IDLE] | in_state[LEAVING]
            assert self._resident_blocks == sum(
                len(self._extents[index].blocks) for index in in_state[RESIDENT] | in_state[IDLE]
            )

    def _load(self, wanted: int) -> None:
        """Put more blocks on the stack, which has run out; at best as many as are wanted."""
        if self._idle:
            self._stack += self._leave_idle(next(reversed(self._idle))).blocks
        elif self._credit:
            self._stack += self._grow().blocks
        else:
            stack = self._stack
            while len(stack) < wanted and (extent := self._oldest()) is not None:
                stack += extent.cached
                extent.cached = []
                extent.used = UNUSED
            assert stack, "more blocks were asked for than num_free_blocks"
            stack.reverse()
            self._cached_blocks -= len(stack)
            self._sorted = False

    def _oldest(self) -> _Extent[B] | None:
        """The cached extent that nobody has used for longest."""
        uses = self._uses
        while uses:
            moment, extents = uses[0]
            while extents:
                if extents[-1].used is moment:
                    return extents[-1]
                extents.pop()
            uses.popleft()
        return None

    def _by_age(self) -> list[_Extent[B]]:
        """The cached extents, least recently used first."""
        return [e for moment, used in self._uses for e in reversed(used) if e.used is moment]

    def _sort(self) -> dict[_Extent[B], int]:
        """Take extents that are free as a whole off the stack, and put the blocks of the fullest
        extents on top of it. Returns how many blocks each of the others has on the stack."""
        free: defaultdict[_Extent[B], list[B]] = defaultdict(list)
        owner = self._owner
        for block in self._stack:
            free[owner[block.block_id]].append(block)
        self._stack.clear()
        partly = []
        for extent, blocks in free.items():
            extent.quiet_step = self._clock.launched
            if len(blocks) == len(extent.blocks) and extent.index:
                self._become_idle(extent, self._now())
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
            while self._cached_blocks > most:
                oldest = self._oldest()
                assert oldest is not None
                self._forget(oldest)

    def _evictable(self, free_blocks: dict[_Extent[B], int]) -> Iterator[_Extent[B]]:
        """The cached extents that could be given back, least recently used first."""
        for extent in self._by_age():
            free = len(extent.cached) + free_blocks.get(extent, 0)
            if free == len(extent.blocks) and extent.index:
                yield extent

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

    def _own_bytes(self, extent: _Extent[B]) -> int:
        """Bytes that the driver gets back with ``extent``, whatever its neighbours do."""
        return sum(piece.size for piece in self.extents.pieces(extent.index)[0])

    def _grow(self) -> _Extent[B]:
        extent = self._extents[heapq.heappop(self._empty)]
        before = self._footprint.bytes
        self._footprint.add(extent.index)
        self._grant(-1)
        self._budget.commit(self._unit, self._footprint.bytes - before)
        extent.state = RESIDENT
        self._resident_blocks += len(extent.blocks)
        self.num_free_blocks += len(extent.blocks)
        return extent

    def _reserve(self, extents: int) -> int:
        """Ask the budget for ``extents`` more; returns how many it granted."""
        wanted = min(extents, len(self._empty) - self._credit)
        if wanted <= 0:
            return 0
        granted = self._budget.reserve(wanted * self._unit, self._unit) // self._unit
        self._grant(granted)
        return granted

    def _grant(self, extents: int) -> None:
        """Count granted extents in or out. The lowest go first, so only the last can be short."""
        self._credit += extents
        blocks = self._credit * self._span
        if self._credit and self._credit == len(self._empty):
            blocks -= self._span - len(self._extents[max(self._empty)].blocks)
        if self._credit and self._empty[0] == 0:
            blocks -= 1
        self.num_free_blocks += blocks - self._credit_blocks
        self._credit_blocks = blocks

    def _become_idle(self, extent: _Extent[B], since: float) -> None:
        extent.state = IDLE
        extent.idle_since = since
        self._idle[extent] = None

    def _leave_idle(self, extent: _Extent[B]) -> _Extent[B]:
        del self._idle[extent]
        extent.state = RESIDENT
        return extent

    def _forget(self, extent: _Extent[B]) -> None:
        """Keep the content of ``extent`` no longer; the engine forgets it when it is reused."""
        extent.quiet_step = extent.used[1]
        extent.used = UNUSED
        blocks, extent.cached = extent.cached, []
        self._cached_blocks -= len(blocks)
        if len(blocks) == len(extent.blocks) and extent.index:
            self._become_idle(extent, self._now())
        else:
            self._stack[:0] = blocks
            self._sorted = False

    def _leave(self, extent: _Extent[B]) -> int:
        self._leave_idle(extent)
        self._evict(extent.blocks)
        extent.state = LEAVING
        self._leaving += 1
        self._resident_blocks -= len(extent.blocks)
        self.num_free_blocks -= len(extent.blocks)
        return extent.index


def _last(blocks: list[B], block: B) -> int:
    """Where ``block`` itself lies among ``blocks``, looked for from the end; or -1."""
    at = len(blocks) - 1
    while at >= 0 and blocks[at] is not block:
        at -= 1
    return at
