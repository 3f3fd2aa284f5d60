"""Requests that grow in extents of their own, and those that share."""

from __future__ import annotations

from collections.abc import Sequence

from test_pool import World
from test_pool_policy import FOUR, UNIT, serve

from kvcached_vmm.policy import Policy


def grow_together(world: World, requests: Sequence[list[int]], blocks: int) -> None:
    """Each request gets so many blocks more, one at a time and in turns."""
    for _ in range(blocks):
        for request in requests:
            request += serve(world, 1, request)


def test_long_requests_that_grow_beside_each_other_end_without_each_other() -> None:
    world = World(FOUR, Policy(decay_seconds=0.0, own_extents=True))
    requests = [serve(world, 4) for _ in range(6)]
    grow_together(world, requests, 10)
    world.put(requests[1][::-1])
    assert world.extents(requests[1]).isdisjoint(world.extents(world.live))
    assert set(world.tick(1.0)) == world.extents(requests[1])
    world.check()


def test_where_requests_share_extents_the_longest_holds_them_all() -> None:
    """What the test above is for: an engine that keeps a cache does not tell requests apart."""
    world = World(FOUR, Policy(decay_seconds=0.0))
    requests = [serve(world, 4) for _ in range(6)]
    grow_together(world, requests, 10)
    world.put(requests[1][::-1])
    assert len(world.tick(1.0)) <= 1, "that of its prompt"


def test_a_request_that_has_a_run_asks_the_budget_for_nothing() -> None:
    world = World(FOUR, Policy(own_extents=True), limit_extents=3)
    serve(world, 3)
    request = serve(world, 5)
    world.budget.limit = 0
    world.pool.prepare(1, held=[world.blocks[number] for number in request])
    assert world.pool.settle() == []
    assert world.pool.admission.shortage() == (0, 0), "others are asked for what it has"
    assert len(serve(world, 3, request)) == 3


def test_short_requests_share_an_extent() -> None:
    world = World(FOUR, Policy(own_extents=True))
    for _ in range(7):
        serve(world, 1)
    assert world.budget.committed == 2 * UNIT


def test_what_is_set_aside_for_one_request_serves_another_when_memory_is_short() -> None:
    world = World(FOUR, Policy(own_extents=True), limit_extents=3)
    request = serve(world, 4)
    request += serve(world, 1, request)
    assert world.budget.committed == 3 * UNIT
    assert len(serve(world, 99)) == 3 + 3, "the rest of the first extent and of the request's own"
    world.check()
    assert serve(world, 1, request) == []


def test_no_extent_is_begun_for_one_request_while_the_budget_is_tight() -> None:
    world = World(FOUR, Policy(own_extents=True), limit_extents=3)
    requests = [serve(world, 4), serve(world, 4)]
    world.put(serve(world, 99))
    assert world.pool.num_free_blocks == 3, "the budget was asked for more than it had"
    world.budget.limit += 2 * UNIT
    for request in requests:
        request += serve(world, 1, request)
    assert world.budget.committed == 3 * UNIT
    world.time += 10.0
    requests[0] += serve(world, 1, requests[0])
    assert world.budget.committed == 4 * UNIT
