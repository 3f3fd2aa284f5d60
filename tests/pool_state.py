"""What is true of an elastic pool's insides between any two calls."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from kvcached_vmm.holding import EMPTY, IDLE, LEAVING, RESIDENT, UNUSED
from kvcached_vmm.pool import ElasticPool


def check_pool(pool: ElasticPool[Any]) -> None:
    """Assert that every block is counted once and every extent is in the right place."""
    cache = pool._cache
    stacked = [block.block_id for block in pool._stack]
    entered = [block.block_id for extent in pool._extents for block in extent.cached]
    news = [block.block_id for _, blocks in cache._news for block in blocks]
    cached = entered + news
    idle = [block.block_id for extent in pool._idle for block in extent.blocks]
    after = pool._runs._after if pool._runs else {}
    runs = [block.block_id for run in after.values() for block in run]
    free = stacked + cached + idle + runs
    assert len(free) == len(set(free))
    assert 0 not in free
    assert pool.num_free_blocks == len(free) + pool._holding.granted_blocks
    assert pool.cached_blocks == len(cached)
    # As by_age, but nothing is entered: looking must not change what is looked at.
    used = [e for moment, log in cache._log for e in reversed(log) if e.used is moment]
    assert len(used) == len(set(used))
    assert set(used) == {pool._owner[block] for block in entered}
    assert all(extent.used is UNUSED for extent in set(pool._extents) - set(used))
    assert all(pool._owner[block].state == RESIDENT for block in stacked + cached + runs)
    assert not pool._runs or pool._runs.num_blocks == len(runs)
    in_state = defaultdict(set)
    for extent in pool._extents:
        in_state[extent.state].add(extent.index)
    assert {extent.index for extent in pool._idle} == in_state[IDLE]
    assert sorted(pool._holding._empty) == sorted(in_state[EMPTY])
    held = in_state[RESIDENT] | in_state[IDLE]
    assert set(pool._holding._footprint) == held | in_state[LEAVING]
    assert pool._resident_blocks == sum(len(pool._extents[index].blocks) for index in held)
