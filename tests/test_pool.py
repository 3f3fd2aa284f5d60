"""Which blocks are handed out and which extents leave: a model beside the pool, then examples."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from faults import PAGE
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pool_state import check_pool

from kvcached_vmm.extents import ExtentMap, Footprint, Region
from kvcached_vmm.fence import StepClock
from kvcached_vmm.policy import Policy
from kvcached_vmm.pool import RELEASE_BATCH, ElasticPool

LAYOUTS = [
    ExtentMap(16, [Region(0, PAGE)], PAGE, 4),
    ExtentMap(18, [Region(0, PAGE)], PAGE, 4),
    ExtentMap(15, [Region(0, 1536)], PAGE, 3),
    ExtentMap(20, [Region(n * 20 * 2560, 2560) for n in range(2)], PAGE, 3),
    ExtentMap(6, [Region(0, 5 * PAGE)], PAGE, 1),
]


@dataclass(frozen=True)
class Block:
    block_id: int


class FakeBudget:
    """Grants what its owner lets it, and checks that it is asked properly."""

    def __init__(self, limit: int) -> None:
        self.limit = self.generosity = limit
        self.reserved = self.committed = self.extents = 0

    def reserve(self, wanted_bytes: int, unit_bytes: int) -> int:
        assert wanted_bytes > 0
        assert wanted_bytes % unit_bytes == 0
        room = self.limit - self.reserved - self.committed
        grant = max(0, min(wanted_bytes, room, self.generosity)) // unit_bytes * unit_bytes
        self.reserved += grant
        return grant

    def commit(self, granted_bytes: int, used_bytes: int, extents: int) -> None:
        assert 0 <= used_bytes <= granted_bytes <= self.reserved
        # The other way round it need not be: neighbours may have all pages of an extent already.
        assert extents or not used_bytes
        self.reserved -= granted_bytes
        self.committed += used_bytes
        self.extents += extents

    def release(self, used_bytes: int) -> None:
        assert 0 <= used_bytes <= self.committed
        self.committed -= used_bytes


class World:
    """An engine round a pool: who holds what, which steps are in flight, what has memory."""

    def __init__(self, layout: ExtentMap, policy: Policy, limit_extents: int = 99) -> None:
        self.layout = layout
        self.blocks = [Block(number) for number in range(layout.num_blocks)]
        self.budget = FakeBudget(limit_extents * layout.largest_bytes)
        self.clock = StepClock()
        self.time = 0.0
        self.live: set[int] = set()
        self.cached: set[int] = set()
        """Free blocks whose content the engine knows: it forgets what it is handed or told to."""
        self.flying: deque[tuple[int, frozenset[int]]] = deque()
        self.memory = {0}
        self.extents_gone = 0
        self.leaving: set[int] = set()
        self.pool = ElasticPool(
            self.blocks, layout, self.budget, self.clock, self.evict, policy, lambda: self.time
        )

    def extents(self, blocks: Iterable[int]) -> set[int]:
        return {block // self.layout.blocks_per_extent for block in blocks}

    def evict(self, blocks: list[Block]) -> None:
        ids = {block.block_id for block in blocks}
        assert self.live.isdisjoint(ids), "a live block was evicted"
        self.cached -= ids

    def take(self, count: int) -> list[int]:
        kept = self.pool.cached_blocks
        uncached = self.pool.num_free_blocks - kept
        taken = [block.block_id for block in self.pool.take(count)]
        assert len(set(taken)) == len(taken) == count
        assert 0 not in taken, "the null block was handed out"
        assert self.live.isdisjoint(taken), "a block was handed out twice"
        assert self.leaving.isdisjoint(self.extents(taken)), "a block without memory"
        assert kept == self.pool.cached_blocks or count > uncached, "evicted for no need"
        self.cached.difference_update(taken)
        self.live.update(taken)
        self.memory |= self.extents(taken)
        return taken

    def put(self, ids: Iterable[int]) -> None:
        self.live.difference_update(ids)
        self.pool.put([self.blocks[number] for number in ids])

    def keep(self, ids: Iterable[int]) -> None:
        self.live.difference_update(ids)
        self.cached.update(ids)
        self.pool.keep([self.blocks[number] for number in ids])

    def hit(self, number: int) -> None:
        self.pool.reclaim_cached(self.blocks[number])
        self.cached.remove(number)
        self.live.add(number)

    def tick(self, seconds: float) -> list[int]:
        self.time += seconds
        leaving = self.pool.tick()
        assert len(leaving) <= RELEASE_BATCH
        return self.leave(leaving)

    def reclaim(self, size: int) -> list[int]:
        before = set(self.cached)
        leaving = self.leave(self.pool.reclaim(size))
        assert self.extents(before - self.cached).isdisjoint(self.extents(self.live))
        return leaving

    def leave(self, extents: list[int]) -> list[int]:
        assert len(set(extents)) == len(extents)
        gone = set(extents)
        assert 0 not in gone, "the null block loses its memory"
        assert gone <= self.memory - self.leaving
        assert gone.isdisjoint(self.extents(self.live | self.cached)), "memory is still in use"
        for _, blocks in self.flying:
            assert gone.isdisjoint(self.extents(blocks)), "a step in flight may touch that memory"
        self.leaving |= gone
        return extents

    def released(self, extents: Iterable[int]) -> None:
        gone = set(extents)
        self.leaving -= gone
        self.memory -= gone
        self.extents_gone += len(gone)
        self.pool.released(gone)

    def settle(self) -> list[int]:
        ahead = self.pool.settle()
        assert self.memory.isdisjoint(ahead)
        self.memory.update(ahead)
        assert self.budget.reserved == 0
        return ahead

    def launch(self) -> None:
        self.flying.append((self.clock.launch(), frozenset(self.live)))

    def finish(self) -> None:
        self.clock.finish(self.flying.popleft()[0])

    def check(self) -> None:
        check_pool(self.pool)
        assert not self.pool._runs or self.live.issuperset(self.pool._runs._after)
        footprint = Footprint(self.layout)
        for extent in self.memory:
            footprint.add(extent)
        unit, reserved = self.layout.largest_bytes, self.budget.reserved
        untold = len(self.memory) + self.extents_gone - self.budget.extents
        assert self.pool.committed_bytes == footprint.bytes
        assert self.budget.committed <= footprint.bytes <= self.budget.committed + untold * unit
        assert self.pool.live_blocks == len(self.live)
        assert self.pool.cached_blocks <= len(self.cached)
        assert self.extents(self.live | self.cached) <= self.memory - self.leaving
        credit = reserved // unit - untold
        empty = sorted(set(range(self.layout.num_extents)) - self.memory)
        usable = [*(self.memory - self.leaving), *empty[:credit]]
        blocks = {block for extent in usable for block in self.layout.blocks(extent)} - {0}
        assert self.pool.num_free_blocks == len(blocks - self.live)


class PoolMachine(RuleBasedStateMachine):
    """An engine that does anything it may, with a budget that comes and goes."""

    @initialize(
        layout=st.sampled_from(LAYOUTS),
        limit=st.integers(1, 8),
        policy=st.builds(
            Policy,
            decay_seconds=st.sampled_from([0.0, 2.0]),
            cache_seconds=st.sampled_from([1.0, 60.0]),
            cache_bytes=st.sampled_from([None, 0, 5 * PAGE]),
            reserve_bytes=st.sampled_from([0, 8 * PAGE]),
            own_extents=st.booleans(),
        ),
    )
    def start(self, layout: ExtentMap, limit: int, policy: Policy) -> None:
        self.world = World(layout, policy, limit)
        self.requests: list[list[int]] = [[]]
        self.awake = True

    def some(self, data: st.DataObject, ids: set[int]) -> list[int]:
        return data.draw(st.lists(st.sampled_from(sorted(ids)), unique=True, min_size=1))

    @precondition(lambda self: self.awake)
    @rule(count=st.sampled_from([0, 1, 3, 6, 12, 24]), hits=st.integers(0, 3))
    def prepare(self, count: int, hits: int) -> None:
        world = self.world
        known = [world.blocks[number] for number in sorted(world.cached)[: min(count, hits)]]
        world.pool.prepare(count, known)
        room = world.budget.limit - world.budget.reserved - world.budget.committed
        if room >= world.layout.largest_bytes and world.budget.generosity >= world.budget.limit:
            most = world.layout.num_blocks - 1 - len(world.live) - len(self.unavailable())
            assert world.pool.num_free_blocks >= min(count, most), "more could have been had"

    @precondition(lambda self: self.awake)
    @rule(count=st.sampled_from([1, 1, 1, 3, 6]), number=st.integers(0, 3))
    def grow(self, count: int, number: int) -> None:
        """A request gets more blocks, or a new one its first."""
        world = self.world
        self.requests = [[], *filter(None, self.requests)]
        request = self.requests[number % len(self.requests)]
        world.pool.prepare(count, held=[world.blocks[block] for block in request])
        if world.pool.num_free_blocks >= count:
            request += world.take(count)

    def unavailable(self) -> set[int]:
        """Blocks of extents that are on their way out."""
        span = self.world.layout.blocks_per_extent
        return {
            number
            for number in range(1, self.world.layout.num_blocks)
            if number // span in self.world.leaving
        }

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        most = self.world.pool.num_free_blocks
        self.world.take(data.draw(st.one_of(st.just(most), st.integers(0, most))))

    @precondition(lambda self: self.world.live)
    @rule(data=st.data(), cached=st.booleans())
    def give_back(self, data: st.DataObject, cached: bool) -> None:
        ids = self.some(data, self.world.live)
        self.world.time += 0.01
        self.requests = [[b for b in blocks if b not in ids] for blocks in self.requests]
        (self.world.keep if cached else self.world.put)(ids)

    @precondition(lambda self: self.world.live)
    @rule(cached=st.booleans())
    def give_all_back(self, cached: bool) -> None:
        self.requests = [[]]
        (self.world.keep if cached else self.world.put)(sorted(self.world.live))

    @precondition(lambda self: self.world.cached)
    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        self.world.hit(data.draw(st.sampled_from(sorted(self.world.cached))))

    @rule()
    def forget(self) -> None:
        self.world.cached.clear()
        self.world.pool.forget_all()

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.5, 61.0]))
    def tick(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule(size=st.integers(1, 40 * PAGE))
    def reclaim(self, size: int) -> None:
        self.world.reclaim(size)

    # Also between prepare and settle: an engine settles after it has launched, and may have let go
    # of the pool's lock meanwhile.
    @precondition(lambda self: self.world.leaving)
    @rule(data=st.data())
    def released(self, data: st.DataObject) -> None:
        self.world.released(self.some(data, self.world.leaving))

    @rule()
    def settle_and_launch(self) -> None:
        self.world.settle()
        self.world.launch()

    @precondition(lambda self: self.world.flying)
    @rule()
    def finish(self) -> None:
        self.world.finish()

    @rule(extents=st.integers(0, 8), generosity=st.integers(0, 8))
    def budget_changes(self, extents: int, generosity: int) -> None:
        self.world.budget.limit = extents * self.world.layout.largest_bytes
        self.world.budget.generosity = generosity * self.world.layout.largest_bytes

    @precondition(lambda self: self.awake and not self.world.live)
    @rule()
    def sleep(self) -> None:
        world = self.world
        world.clock.rest()
        world.flying.clear()
        world.pool.sleep()
        world.extents_gone += len(world.memory)
        world.memory, world.leaving, world.cached = set(), set(), set()
        assert world.budget.committed == world.budget.reserved == 0
        self.awake = False

    @precondition(lambda self: not self.awake)
    @rule()
    def wake(self) -> None:
        self.awake = self.world.pool.wake()
        assert (
            self.awake
            or self.world.budget.limit < self.world.layout.largest_bytes
            or (self.world.budget.generosity < self.world.layout.largest_bytes)
        )
        self.world.memory = {0} if self.awake else set()

    @invariant()
    def model_and_pool_agree(self) -> None:
        if hasattr(self, "world"):
            self.world.check()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=250, stateful_step_count=50)
