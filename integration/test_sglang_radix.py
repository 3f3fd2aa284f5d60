"""SGLang's own prefix caches on our allocators: the same hits, sizes and evictions as on SGLang's.

SGLang's tests of them are not part of what it publishes. Here the same requests begin, grow, end
and are dropped in two worlds, one of them stock, and what can be seen is compared after each step.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from integration.sglang_engine import needs_sglang, use_shim
from integration.test_sglang_allocators import World

pytestmark = [pytest.mark.engine, needs_sglang]

PAGES = 30

PROMPTS = [
    [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89],
    [1, 1, 2, 3, 5, 8, 14],
    [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597],
    [2, 4, 8, 16],
    [2, 4, 8, 16, 32, 64, 128, 256, 512],
    [7],
]
"""Some begin alike."""


@dataclass
class Request:
    """One that runs: its tokens, their slots, and what it holds in the tree."""

    tokens: list[int]
    slots: Any
    matched: int
    node: Any
    receipt: Any = field(repr=False)


class Side:
    """A prefix cache of SGLang over one allocator, used as SGLang's scheduler uses it."""

    def __init__(self, torch: Any, allocator: Any, page_size: int, unified: bool) -> None:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.radix_cache import RadixCache
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        self.torch, self.allocator, self.page_size = torch, allocator, page_size
        self.unified = unified
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=SimpleNamespace(),
            token_to_kv_pool_allocator=allocator,
            page_size=page_size,
            tree_components=(ComponentType.FULL,),
        )
        self.tree = (UnifiedRadixCache if unified else RadixCache)(params)
        self.running: list[Request] = []

    def key(self, tokens: list[int]) -> Any:
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return RadixKey(array("q", tokens))

    def begin(self, prompt: list[int]) -> int | None:
        """Tokens of ``prompt`` that were cached; None if it does not fit."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.common import evict_from_tree_cache

        match = self.tree.match_prefix(MatchPrefixParams(key=self.key(prompt[:-1])))
        prefix, node = match.device_indices, match.last_device_node
        receipt = self.tree.inc_lock_ref(node)
        wanted = len(prompt) - len(prefix)
        evict_from_tree_cache(self.tree, wanted + self.page_size)
        slots = self._extend(prefix, wanted)
        if slots is None:
            self._unlock(node, receipt)
            return None
        taken = self.torch.cat((prefix, slots))
        self.running.append(Request(list(prompt), taken, len(prefix), node, receipt))
        return len(prefix)

    def grow(self, number: int) -> bool:
        """One token more, if there is room for it."""
        from sglang.srt.mem_cache.common import evict_from_tree_cache

        request = self.running[number]
        evict_from_tree_cache(self.tree, self.page_size)
        if self.page_size == 1:
            slot = self.allocator.alloc(1)
        else:
            length = self.torch.tensor([len(request.tokens) + 1])
            slot = self.allocator.alloc_decode(length, length, request.slots[-1:])
        if slot is None:
            return False
        request.tokens.append(len(request.tokens))
        request.slots = self.torch.cat((request.slots, slot))
        return True

    def end(self, number: int, keep: bool) -> None:
        """A request is done: keep what it has computed as a prefix, or drop it."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams

        request = self.running.pop(number)
        aligned = len(request.tokens) // self.page_size * self.page_size if keep else 0
        first_own = request.matched
        if aligned:
            key = self.key(request.tokens[:aligned])
            values = request.slots[:aligned].clone()
            params = InsertParams(key=key, value=values, prev_prefix_len=request.matched)
            cached = self.tree.insert(params).prefix_len
            if not self.unified and cached > request.matched:
                self.allocator.free(request.slots[request.matched : cached])
            first_own = aligned
        if len(request.slots) > first_own:
            self.allocator.free(request.slots[first_own:])
        self._unlock(request.node, request.receipt)

    def evict(self, tokens: int) -> int:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        return int(self.tree.evict(EvictParams(num_tokens=tokens)).num_tokens_evicted)

    def seen(self) -> tuple[int, ...]:
        """All that SGLang's scheduler goes by."""
        tree = self.tree
        return (
            self.allocator.available_size(),
            tree.evictable_size(),
            tree.protected_size(),
            *(len(request.slots) for request in self.running),
        )

    def pages(self) -> set[int]:
        """Pages that are not free: those of requests, and of cached prefixes."""
        slots = [request.slots for request in self.running]
        tokens = {int(slot) for each in slots for slot in each}
        return {token // self.page_size for token in tokens}

    def _extend(self, prefix: Any, wanted: int) -> Any:
        if self.page_size == 1:
            return self.allocator.alloc(wanted)
        torch = self.torch
        before, after = torch.tensor([len(prefix)]), torch.tensor([len(prefix) + wanted])
        last = prefix[-1:] if len(prefix) else torch.tensor([-1])
        return self.allocator.alloc_extend(before, before, after, after, last, wanted)

    def _unlock(self, node: Any, receipt: Any) -> None:
        self.tree.dec_lock_ref(node, receipt.to_dec_params())


class Worlds:
    """The same requests on SGLang's allocator and on ours, whose memory comes and goes."""

    def __init__(self, page_size: int, unified: bool) -> None:
        use_shim()
        from integration.sglang_cpu_shim import paging

        paging.install()
        self.world = World(PAGES, page_size, 100)
        self.sides = [
            Side(self.world.torch, allocator, page_size, unified)
            for allocator in (self.world.stock, self.world.elastic)
        ]

    def both(self, step: str, *arguments: Any) -> Any:
        stock, ours = (getattr(side, step)(*arguments) for side in self.sides)
        assert ours == stock, step
        return ours

    def give_back(self, now: float) -> int:
        """As the steward does, all of it; returns the extents that left."""
        world, memory = self.world, self.world.memory
        before = len(memory.arena.committed)
        for moment in (now, now + 0.1, now + 0.2):
            world.give_back(moment)
        world.find(now + 0.3)
        memory.collect()
        memory.book.room = memory.room()
        return before - len(memory.arena.committed)

    def check(self) -> None:
        stock, ours = self.sides
        memory = self.world.memory
        memory.settle()
        memory.book.room = memory.room()
        assert ours.seen() == stock.seen()
        assert ours.pages() <= {
            page
            for extent in memory.arena.committed
            for page in memory.arena.extents.blocks(extent)
        }, "a page that a request uses has no memory"
        memory.book.check(self.world.elastic.free_pages.tolist())
        memory.arena.check()

    def close(self) -> None:
        self.world.close()


BOTH_TREES = pytest.mark.parametrize("unified", [True, False], ids=["unified", "radix"])
BOTH_SIZES = pytest.mark.parametrize("page_size", [1, 4])


@pytest.fixture
def worlds(page_size: int, unified: bool) -> Iterator[Worlds]:
    made = Worlds(page_size, unified)
    yield made
    made.close()


@BOTH_TREES
@BOTH_SIZES
def test_a_prefix_is_found_again_though_memory_was_given_back_meanwhile(worlds: Worlds) -> None:
    size = worlds.sides[0].page_size
    long, other = [*range(40)][: 8 * size], [*range(100, 100 + 12 * size)]
    assert worlds.both("begin", long) == 0
    assert worlds.both("begin", other) == 0
    worlds.both("end", 1, False)
    worlds.both("end", 0, True)
    assert worlds.give_back(1.0) > 0
    worlds.check()
    kept = worlds.sides[1].tree.evictable_size()
    assert kept == len(long)
    assert worlds.both("begin", [*long, 7]) == len(long)
    worlds.both("end", 0, True)
    assert worlds.both("evict", PAGES * size) >= len(long)
    worlds.give_back(2.0)
    worlds.check()
    assert worlds.world.memory.arena.committed == {0}


@BOTH_TREES
@BOTH_SIZES
def test_what_is_locked_is_not_evicted_and_what_does_not_fit_is_refused(worlds: Worlds) -> None:
    size = worlds.sides[0].page_size
    whole = [*range(20 * size)]
    assert worlds.both("begin", whole) == 0
    worlds.both("end", 0, True)
    assert worlds.both("begin", [*whole, 1]) == len(whole)
    assert worlds.both("evict", PAGES * size) == 0
    assert worlds.both("begin", [*range(1000, 1000 + 20 * size)]) is None
    worlds.check()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.integers(0, len(PROMPTS) - 1)),
        st.tuples(st.just("grow"), st.integers(0, 8)),
        st.tuples(st.just("keep"), st.integers(0, 8)),
        st.tuples(st.just("drop"), st.integers(0, 8)),
        st.tuples(st.just("evict"), st.integers(1, 40)),
        st.tuples(st.just("give back"), st.just(0)),
    ),
    min_size=5,
    max_size=40,
)


@BOTH_TREES
@BOTH_SIZES
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=steps)
def test_requests_see_the_same_cache_as_on_stock_allocators(
    page_size: int, unified: bool, steps: list[tuple[str, int]]
) -> None:
    worlds = Worlds(page_size, unified)
    try:
        for now, (step, number) in enumerate(steps):
            running = len(worlds.sides[0].running)
            if step == "begin":
                worlds.both("begin", PROMPTS[number])
            elif step == "evict":
                worlds.both("evict", number)
            elif step == "give back":
                worlds.give_back(float(now))
            elif running and step == "grow":
                worlds.both("grow", number % running)
            elif running:
                worlds.both("end", number % running, step == "keep")
            worlds.check()
        while worlds.sides[0].running:
            worlds.both("end", 0, False)
        worlds.both("evict", PAGES * page_size)
        worlds.give_back(float(len(steps)))
        worlds.check()
        assert worlds.world.elastic.available_size() == PAGES * page_size, "a page was lost"
        assert worlds.world.memory.arena.committed == {0}
    finally:
        worlds.close()
