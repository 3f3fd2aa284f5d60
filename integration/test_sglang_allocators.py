"""Our allocators against SGLang's own: the same answers, with memory behind every page of them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from integration.sglang_engine import needs_sglang, use_shim
from kvcached_vmm.account import Account
from kvcached_vmm.arena import Arena
from kvcached_vmm.extents import ExtentMap, Region
from kvcached_vmm.host_driver import GRANULARITY, HostDriver
from kvcached_vmm.ledger import Ledger

pytestmark = [pytest.mark.engine, needs_sglang]

SPAN = 4
"""Pages in an extent."""


class Held:
    """A mark that the device has not passed until the test says so."""

    passed = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True


class World:
    """A pool of ``pages`` pages over an arena, a budget of ``budget_extents``, and the ledger."""

    def __init__(self, pages: int, page_size: int, budget_extents: int) -> None:
        use_shim()
        import torch

        from kvcached_plugins.sglang import allocators
        from kvcached_plugins.sglang.memory import PoolMemory
        from kvcached_plugins.shares import Shares

        self.torch = torch
        self.folder = tempfile.TemporaryDirectory()
        self.page_size = page_size
        extents = ExtentMap(pages + 1, [Region(0, GRANULARITY)], GRANULARITY, SPAN)
        self.ledger = Ledger.open(Path(self.folder.name) / "ledger", "host")
        account = self.ledger.join("test", budget_extents * extents.largest_bytes)
        shares = Shares([(account, 1)], lambda: 1 << 40)
        world = self
        self.marks: list[Held] = []

        class Memory(PoolMemory):
            def mark(self) -> Held:
                world.marks.append(Held())
                return world.marks[-1]

        self.memory = Memory(
            Arena(HostDriver(), extents),
            shares,
            torch.device("cpu"),
            "test",
            self.join_beside,
        )
        self.memory.book.room = self.memory.room()
        pool = SimpleNamespace(kvcached=self.memory)
        self.stock, self.elastic = (
            self._make(cls, pool)
            for cls in (
                allocators.ElasticTokenAllocator.__mro__[2]
                if page_size == 1
                else allocators.ElasticPagedAllocator.__mro__[2],
                allocators.ElasticTokenAllocator
                if page_size == 1
                else allocators.ElasticPagedAllocator,
            )
        )

    def join_beside(self) -> Account:
        return Ledger.open(self.ledger.path.parent, "host").join("not given back", None)

    def _make(self, cls: Any, pool: Any) -> Any:
        size = (self.memory.book.total_pages) * self.page_size
        pages = {} if self.page_size == 1 else {"page_size": self.page_size}
        return cls(
            size, dtype=self.torch.float32, device="cpu", kvcache=pool, need_sort=False, **pages
        )

    def pages_of(self, indices: Any) -> set[int]:
        return {int(index) // self.page_size for index in indices}

    def find(self, now: float) -> None:
        """The device has done all that it was given."""
        for mark in self.marks:
            mark.passed = True
        self.elastic.find(now)

    def give_back(self, now: float, keep: int = 0) -> None:
        """What the steward does now and then, all of it."""
        self.find(now)
        self.memory.collect()
        self.elastic.cut(self.memory.leave(self.memory.book.due(now, 0.0, keep)))
        if self.elastic.unsorted:
            self.elastic.sort()

    def check(self, live: set[int]) -> None:
        memory = self.memory
        memory.arena.check()
        memory.book.check(self.elastic.free_pages.tolist())
        used = {page // SPAN for page in live | {0}}
        assert used <= memory.arena.committed, "a page that is in use has no memory"
        account = self.ledger.snapshot().accounts[0]
        assert account.committed_bytes == memory.arena.committed_bytes
        assert account.reserved_bytes == memory.book.credit * memory.unit_bytes
        available = self.elastic.available_size() // self.page_size
        assert available + len(live) + memory.book.withheld_pages == memory.book.total_pages

    def close(self) -> None:
        self.elastic.free_pages = self.elastic.free_pages[:0]
        self.memory.close()
        self.folder.cleanup()


@pytest.fixture
def worlds() -> Iterator[Callable[..., World]]:
    with contextlib.ExitStack() as stack:

        def make(pages: int = 30, page_size: int = 1, budget_extents: int = 100) -> World:
            world = World(pages, page_size, budget_extents)
            stack.callback(world.close)
            return world

        yield make


@pytest.mark.parametrize("page_size", [1, 4])
def test_with_room_for_all_the_whole_pool_can_be_had_and_no_more(
    worlds: Callable[..., World], page_size: int
) -> None:
    world = worlds(30, page_size)
    assert world.elastic.available_size() == world.stock.available_size() == 30 * page_size
    assert world.elastic.alloc(31 * page_size) is None
    taken = world.elastic.alloc(30 * page_size)
    assert world.pages_of(taken) == set(range(1, 31))
    assert world.elastic.available_size() == 0
    assert world.elastic.alloc(page_size) is None


def test_a_pool_that_has_served_nothing_holds_one_extent(worlds: Callable[..., World]) -> None:
    world = worlds()
    assert world.memory.arena.committed == {0}


@pytest.mark.parametrize("page_size", [1, 4])
def test_what_was_freed_is_taken_first(worlds: Callable[..., World], page_size: int) -> None:
    """Stock pages of one token are taken in the order in which they were freed, through all memory
    that there is."""
    world = worlds(30, page_size)
    first = world.elastic.alloc(8 * page_size)
    world.elastic.free(first)
    again = world.elastic.alloc(8 * page_size)
    assert world.pages_of(again) == world.pages_of(first)
    world.elastic.free(again)
    for _ in range(40):
        world.elastic.free(world.elastic.alloc(3 * page_size))
    assert len(world.memory.arena.committed) == 3


def test_a_budget_bounds_what_is_available(worlds: Callable[..., World]) -> None:
    world = worlds(budget_extents=2)
    assert world.elastic.available_size() == 7
    assert len(world.elastic.alloc(7)) == 7
    assert world.elastic.alloc(1) is None


def test_pages_of_extents_that_are_leaving_are_not_handed_out(
    worlds: Callable[..., World],
) -> None:
    world = worlds()
    taken = world.elastic.alloc(20)
    world.elastic.free(taken)
    world.elastic.sort()
    world.marks[-1].passed = True
    world.elastic.find(now=0.0)
    world.elastic.cut(world.memory.leave(3))
    assert world.memory.leaving == 3
    world.memory.collect()
    assert world.memory.leaving == 3, "the device has not passed the mark"
    assert len(world.memory.arena.committed) == 6, "and so the memory is still there"
    again = world.elastic.alloc(world.elastic.available_size())
    assert not world.pages_of(again) & set(range(12, 24))
    world.check(world.pages_of(again))


def test_memory_is_found_and_given_back_when_its_pages_are_free(
    worlds: Callable[..., World],
) -> None:
    world = worlds()
    taken = world.elastic.alloc(30)
    world.elastic.free(taken[8:])
    for now in range(3):
        world.give_back(float(now))
    assert world.memory.arena.committed == {0, 1, 2}
    world.elastic.free(taken[:8])
    for now in range(3, 6):
        world.give_back(float(now))
    assert world.memory.arena.committed == {0}
    world.check(set())


def test_an_extent_that_was_taken_from_while_we_looked_is_kept(
    worlds: Callable[..., World],
) -> None:
    world = worlds()
    world.elastic.free(world.elastic.alloc(15))
    world.elastic.sort()
    taken = world.elastic.alloc(5)
    world.find(now=0.0)
    assert list(world.memory.book.idle_extents) == [3, 2]
    world.elastic.cut(world.memory.leave(2))
    world.check(world.pages_of(taken))


def test_pages_of_the_fullest_extents_are_handed_out_first(worlds: Callable[..., World]) -> None:
    world = worlds()
    taken = world.elastic.alloc(15).tolist()
    world.elastic.free(world.torch.tensor([4, 5, 6, 9]))
    world.elastic.sort()
    assert world.elastic.alloc(1).tolist() == [9]
    assert taken


def test_clearing_makes_all_pages_free_and_keeps_none_without_memory(
    worlds: Callable[..., World],
) -> None:
    world = worlds()
    world.elastic.alloc(11)
    world.elastic.clear()
    assert world.elastic.available_size() == 30
    assert sorted(world.elastic.free_pages.tolist()) == list(range(1, 12))
    world.check(set())


def test_after_sleep_there_is_no_memory_and_then_the_sink_has_some_again(
    worlds: Callable[..., World],
) -> None:
    world = worlds()
    world.elastic.alloc(11)
    world.elastic.clear()
    world.elastic.free_pages = world.elastic.free_pages[:0]
    world.memory.sleep()
    assert world.memory.arena.committed_bytes == 0
    assert world.ledger.snapshot().used_bytes == 0
    taken = world.elastic.alloc(9)
    assert world.memory.arena.committed == {0, 1, 2}
    world.check(world.pages_of(taken))


def test_a_pool_without_memory_of_ours_is_stock(worlds: Callable[..., World]) -> None:
    """Such as the pools of a model with sliding windows, before it is refused."""
    from kvcached_plugins.sglang.allocators import ElasticTokenAllocator

    world = worlds()
    plain = ElasticTokenAllocator(30, world.torch.float32, "cpu", SimpleNamespace(), False)
    first = plain.alloc(5)
    plain.free(first)
    assert plain.free_pages.tolist() == [*range(6, 31), *range(1, 6)]
    assert plain.available_size() == 30


@pytest.mark.parametrize("page_size", [1, 4])
def test_nothing_but_taking_up_what_was_found_waits_for_the_device(
    worlds: Callable[..., World], page_size: int
) -> None:
    """Operations whose result has a size or a value that the host needs make a GPU catch up."""
    world = worlds(30, page_size)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Strict(TorchDispatchMode):  # type: ignore[misc]
        names: set[str] = set()  # noqa: RUF012

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Strict() as mode:
        first = world.elastic.alloc(3 * page_size)
        second = world.elastic.alloc(9 * page_size)
        world.elastic.free_page_ids(first[::page_size] // page_size)
        world.elastic.sort()
        world.elastic.cut(world.memory.leave(len(world.memory.book.idle_extents)))
        world.elastic.available_size()
    assert {"cat", "sort", "scatter_add_"} <= mode.names, "the mode saw what was done"
    waiting = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "bincount"}
    assert not mode.names & waiting
    assert len(second) == 9 * page_size


steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 14)),
        st.tuples(st.just("free"), st.integers(0, 10)),
        st.tuples(st.just("free together"), st.integers(1, 4)),
        st.tuples(st.just("give back"), st.integers(0, 3)),
        st.tuples(st.just("sort"), st.just(0)),
        st.tuples(st.just("find"), st.just(0)),
        st.tuples(st.just("clear"), st.just(0)),
    ),
    max_size=40,
)


@pytest.mark.parametrize("page_size", [1, 4])
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=steps)
def test_with_room_for_all_it_answers_as_stock_does(
    page_size: int, steps: list[tuple[str, int]]
) -> None:
    """Which pages are handed out is ours to say; how many there are is not."""
    world = World(30, page_size, 100)
    held: list[tuple[Any, Any]] = []
    live: set[int] = set()
    try:
        for now, (step, count) in enumerate(steps):
            both = (world.stock, world.elastic)
            if step == "take":
                pair = tuple(allocator.alloc(count * page_size) for allocator in both)
                assert (pair[0] is None) == (pair[1] is None)
                if pair[0] is not None:
                    assert len(pair[0]) == len(pair[1]) == count * page_size
                    pages = world.pages_of(pair[1])
                    assert len(pages) == count
                    assert not pages & live, "a page was handed out twice"
                    live |= pages
                    held.append(pair)
            elif step == "free" and held:
                pair = held.pop(count % len(held))
                for allocator, indices in zip(both, pair, strict=True):
                    allocator.free(indices)
                live -= world.pages_of(pair[1])
            elif step == "free together":
                for allocator in both:
                    allocator.free_group_begin()
                for _ in range(min(count, len(held))):
                    pair = held.pop()
                    for allocator, indices in zip(both, pair, strict=True):
                        allocator.free(indices)
                    live -= world.pages_of(pair[1])
                for allocator in both:
                    allocator.free_group_end()
            elif step == "give back":
                world.give_back(float(now), keep=count)
            elif step == "sort":
                world.elastic.sort()
            elif step == "find":
                world.find(float(now))
            elif step == "clear":
                for allocator in both:
                    allocator.clear()
                held.clear()
                live.clear()
            world.memory.collect()
            world.memory.book.room = world.memory.room()
            leaving = sum(
                len(world.memory.book.pages(e))
                for e in range(world.memory.arena.extents.num_extents)
                if world.memory.book._state[e] == 2
            )
            available = world.elastic.available_size() + leaving * page_size
            assert available == world.stock.available_size()
            world.check(live)
    finally:
        world.close()
