"""What the pool is for, by example: little memory, kept no longer than it is worth."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

import pytest
from faults import PAGE
from test_pool import World

from kvcached_vmm.extents import ExtentMap, Region
from kvcached_vmm.policy import Policy
from kvcached_vmm.pool import RELEASE_BATCH

FOUR = ExtentMap(400, [Region(0, PAGE)], PAGE, 4)
"""Extents of four blocks, a page each."""
UNIT = 4 * PAGE


def serve(world: World, count: int, held: Sequence[int] = ()) -> list[int]:
    """One step of an engine: ask, take what there is of ``count``, settle; all of it is for a
    request that holds the blocks ``held``."""
    world.pool.prepare(count, held=[world.blocks[number] for number in held])
    taken = world.take(min(count, world.pool.num_free_blocks))
    world.settle()
    return taken


def test_a_pool_that_has_served_nothing_holds_one_extent() -> None:
    world = World(FOUR, Policy(reserve_bytes=8 * UNIT))
    assert world.settle() == []
    assert world.budget.committed == UNIT
    assert world.pool.num_free_blocks == 3


def test_growth_takes_the_lowest_addresses_and_only_what_is_needed() -> None:
    world = World(FOUR, Policy())
    assert sorted(serve(world, 6)) == [1, 2, 4, 5, 6, 7], "a whole extent, and two of the first"
    assert world.budget.committed == 2 * UNIT


def test_no_free_blocks_is_an_answer_and_not_a_crash() -> None:
    """Prior art crashed the engine when its pool ran out (kvcached #262, #301, #453)."""
    world = World(FOUR, Policy(), limit_extents=2)
    assert len(serve(world, 100)) == 7
    assert serve(world, 1) == []
    world.budget.limit += UNIT
    assert len(serve(world, 100)) == 4


def test_idle_extents_stay_for_the_decay_time_and_then_leave_in_batches() -> None:
    world = World(FOUR, Policy(decay_seconds=2.0))
    world.put(serve(world, 3 + 4 * 40))
    world.tick(0.1)
    assert world.tick(1.8) == []
    gone = world.tick(0.3)
    assert len(gone) == RELEASE_BATCH
    for _ in range(39 // RELEASE_BATCH):
        gone += world.tick(0.01)
    assert sorted(gone) == list(range(1, 41))
    world.released(gone)
    assert world.budget.committed == UNIT


def test_an_idle_extent_is_used_again_before_the_pool_grows() -> None:
    world = World(FOUR, Policy())
    world.put(serve(world, 7))
    world.tick(0.1)
    serve(world, 7)
    assert world.budget.committed == 2 * UNIT


def test_an_extent_freed_under_a_running_step_waits_for_it_and_for_no_later_one() -> None:
    world = World(FOUR, Policy(decay_seconds=0.0))
    blocks = serve(world, 7)
    world.launch()
    world.put(blocks)
    assert world.tick(1.0) == []
    world.launch()
    world.finish()
    assert world.tick(1.0) == [1]


def test_new_blocks_come_from_the_fullest_extent_so_that_others_drain() -> None:
    world = World(FOUR, Policy(decay_seconds=0.0))
    serve(world, 11)
    world.put([1, 2, 4, 5, 6, 8])
    world.tick(0.1)
    assert serve(world, 1) == [8]
    world.put([7])
    assert world.tick(1.0) == [1]


def test_a_prefix_is_kept_for_its_time_to_live_then_its_extent_leaves() -> None:
    world = World(FOUR, Policy(decay_seconds=2.0, cache_seconds=60.0))
    world.keep(serve(world, 7))
    assert world.tick(59.0) == []
    assert len(world.cached) == 7
    assert world.tick(1.5) == []
    assert world.pool.cached_blocks == 0
    assert world.tick(2.0) == [1]


def test_a_prefix_that_is_used_again_is_kept_longer() -> None:
    world = World(FOUR, Policy(cache_seconds=60.0))
    world.keep(serve(world, 7))
    world.tick(50.0)
    world.hit(5)
    world.keep([5])
    assert world.tick(20.0) == []
    assert world.pool.cached_blocks == 4


@pytest.mark.parametrize(
    ("bound", "committed_extents"),
    [(None, 4), (7 * PAGE, 4), (3 * PAGE, 3), (PAGE - 1, 2), (0, 2)],
)
def test_a_full_cache_is_evicted_before_the_pool_grows(
    bound: int | None, committed_extents: int
) -> None:
    """A bound of less than a block is a bound of nothing, not of anything (kvcached #380)."""
    world = World(FOUR, Policy(cache_bytes=bound))
    world.keep(serve(world, 7))
    serve(world, 7)
    assert world.budget.committed == committed_extents * UNIT


def test_a_pool_that_cannot_grow_evicts_what_was_not_used_for_longest() -> None:
    world = World(FOUR, Policy(), limit_extents=3)
    blocks = serve(world, 11)
    for extent in ([8, 9, 10, 11], [1, 2, 3], [4, 5, 6, 7]):
        world.keep(extent)
        world.time += 1
    assert len(blocks) == 11
    serve(world, 5)
    assert world.pool.cached_blocks == 4


def test_what_is_used_over_and_over_outlives_what_is_not() -> None:
    world = World(FOUR, Policy(cache_seconds=999.0), limit_extents=3)
    world.keep(serve(world, 11))
    for _ in range(5 * FOUR.num_extents):
        for number in (4, 9):
            world.hit(number)
            world.keep([number])
        world.tick(0.1)
        world.check()
    assert sorted(serve(world, 3)) == [1, 2, 3]
    assert sorted(serve(world, 4)) == [4, 5, 6, 7]


def test_the_reserve_is_kept_ready_while_requests_run_and_not_after() -> None:
    world = World(FOUR, Policy(decay_seconds=0.0, reserve_bytes=2 * UNIT))
    world.pool.prepare(5)
    blocks = world.take(5)
    assert world.settle() == [2, 3]
    assert world.settle() == []
    assert world.tick(1.0) == []
    world.put(blocks)
    assert sorted(world.tick(1.0)) == [1, 2, 3]


def test_a_tight_budget_is_asked_for_half_of_the_reserve_at_a_time() -> None:
    world = World(
        ExtentMap(48, [Region(0, PAGE)], PAGE, 4), Policy(decay_seconds=9.0, reserve_bytes=4 * UNIT)
    )

    def ahead_after_taking(count: int) -> list[int]:
        world.pool.prepare(count)
        world.take(count)
        return world.settle()

    world.budget.limit = UNIT
    assert ahead_after_taking(3) == [], "the budget has nothing beyond the first extent"
    world.budget.limit = 99 * UNIT
    assert ahead_after_taking(0) == [1, 2, 3, 4]
    assert ahead_after_taking(4) == [], "three are left of four"
    assert ahead_after_taking(4) == [5, 6]


def test_pressure_takes_idle_extents_first_then_the_oldest_cached_ones() -> None:
    world = World(FOUR, Policy(decay_seconds=99.0))
    serve(world, 3 + 4 * 4)
    world.keep([8, 9, 10, 11])
    world.time += 1
    world.keep([4, 5, 6, 7])
    world.put([12, 13, 14, 15])
    assert world.reclaim(UNIT) == [3]
    assert world.reclaim(1) == [2]
    assert world.pool.cached_blocks == 4
    assert world.reclaim(99 * UNIT) == [1]
    assert world.reclaim(UNIT) == []


def test_sleep_takes_the_pool_to_zero_and_waking_needs_budget() -> None:
    world = World(FOUR, Policy())
    world.keep(serve(world, 9))
    world.pool.sleep()
    assert world.budget.committed == world.pool.committed_bytes == 0
    world.budget.limit = 0
    assert not world.pool.wake()
    assert world.pool.num_free_blocks == 0
    world.budget.limit = 99 * UNIT
    assert world.pool.wake()
    assert world.pool.num_free_blocks == 3


def test_a_short_last_extent_is_counted_as_what_it_is() -> None:
    world = World(ExtentMap(10, [Region(0, PAGE)], PAGE, 4), Policy())
    world.pool.prepare(99)
    assert world.pool.num_free_blocks == 9
    world.check()
    assert sorted(world.take(9)) == list(range(1, 10))


def test_shrink_then_grow_hands_out_no_block_twice() -> None:
    world = World(FOUR, Policy(decay_seconds=0.0))
    kept = serve(world, 5)
    for _ in range(5):
        world.put(serve(world, 90))
        while gone := world.tick(1.0):
            world.released(gone)
        world.check()
    assert not set(serve(world, 300)) & set(kept)


@pytest.mark.parametrize("seed", range(3))
def test_staggered_lengths_pin_little_memory(seed: int) -> None:
    """Requests of very different lengths come, grow block by block, and end when they end. Prior
    art held 4.6 times what was live after such a load."""
    chance = random.Random(seed)
    world = World(ExtentMap(6001, [Region(0, PAGE)], PAGE, 16), Policy(decay_seconds=0.5))
    running: deque[tuple[list[int], int]] = deque()
    held = live = 0
    for step in range(600):
        for _ in range(3):
            running.append((serve(world, chance.randint(1, 12)), chance.randint(5, 60)))
        world.launch()
        for _ in range(len(running)):
            blocks, left = running.popleft()
            if not left:
                world.put(blocks)
                continue
            if chance.random() < 0.25:
                blocks += serve(world, 1)
            running.append((blocks, left - 1))
        if len(world.flying) > 1:
            world.finish()
        if gone := world.tick(0.1):
            world.released(gone)
        if step > 20:
            held += world.budget.committed
            live += len(world.live) * PAGE
    assert held / live <= 1.15


@pytest.mark.parametrize("layout", [FOUR, ExtentMap(4, [Region(0, PAGE)], PAGE, 1)])
def test_a_pool_that_started_without_budget_promises_no_null_block(layout: ExtentMap) -> None:
    world = World(layout, Policy(), limit_extents=0)
    world.memory.clear()
    world.budget.limit = 2 * layout.largest_bytes
    world.budget.generosity = world.budget.limit
    world.pool.prepare(99)
    world.take(world.pool.num_free_blocks)


def test_pressure_is_answered_with_as_many_bytes_as_were_asked_for() -> None:
    """Extents of a page and a half may hold up to three pages, but rarely do."""
    world = World(ExtentMap(60, [Region(0, 1536)], PAGE, 4), Policy(decay_seconds=99.0))
    world.put(serve(world, 40))
    before = world.budget.committed
    wanted = 2 * world.layout.largest_bytes
    world.released(world.reclaim(wanted))
    assert before - world.budget.committed >= wanted


def test_no_idle_extent_outstays_the_decay_time_behind_a_younger_one() -> None:
    world = World(FOUR, Policy(decay_seconds=2.0))
    serve(world, 11)
    world.put([4, 5, 6, 7])
    world.tick(0.1)
    world.time = 1.5
    world.keep([8, 9, 10, 11])
    world.cached.clear()
    world.pool.forget_all()
    world.time = 2.0
    assert world.tick(0.5) == [1]


def test_grants_are_counted_right_when_an_extent_comes_back_before_they_are_used() -> None:
    """The short last extent is all there is to grant, until a lower one comes back empty."""
    world = World(ExtentMap(10, [Region(0, PAGE)], PAGE, 4), Policy(decay_seconds=0.0))
    blocks = serve(world, 7)
    world.put([4, 5, 6, 7])
    gone = world.tick(1.0)
    world.pool.prepare(5)
    world.released(gone)
    assert len(blocks) == 7
    world.check()


def test_a_prefix_that_only_the_engine_still_knows_is_no_memory_besides() -> None:
    """Its blocks lie among the free ones: counted twice, a request would wait for ever."""
    world = World(FOUR, Policy())
    first = serve(world, 3)
    world.keep(first)
    world.pool.forget_all()
    assert world.pool.num_free_blocks == 3
    world.pool.prepare(6, [world.blocks[number] for number in first])
    assert world.pool.num_free_blocks >= 6


def test_what_came_back_just_now_outlives_its_neighbours_in_the_extent() -> None:
    """Uses are entered late: eviction takes what was kept before, and not what is not entered."""
    world = World(FOUR, Policy(), limit_extents=3)
    world.keep(serve(world, 11))
    world.tick(0.2)
    world.hit(4)
    world.keep([4])
    assert len(world.pool._cache._news) == 1
    serve(world, 10)
    assert world.cached == {4}
    assert world.pool.cached_blocks == 1
    world.check()


def test_a_large_cache_is_evicted_a_thousandth_at_a_time_and_still_hit() -> None:
    world = World(ExtentMap(8192, [Region(0, PAGE)], PAGE, 4), Policy())
    world.budget.limit = world.budget.generosity = 8192 * PAGE
    world.keep(serve(world, 8191))
    taken = serve(world, 1)
    ahead = world.cached - {block.block_id for e in world.pool._extents for block in e.cached}
    assert len(taken) + len(ahead) == 8, "whole extents: the first that are 8191 // 1024 or more"
    assert world.pool.cached_blocks == 8191 - 1 - len(ahead)
    world.hit(min(ahead))
    world.tick(0.2)
    world.check()
