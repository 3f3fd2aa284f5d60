"""An arena over a driver that fails: what is committed works, and nothing leaks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from faults import PAGE, AccessProbe, Fault, FaultyDriver, at_random, content, every, fill, nth_call
from faults import open_files as count_open_files
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvcached_vmm.arena import Arena
from kvcached_vmm.errors import DriverError, OutOfMemory
from kvcached_vmm.extents import ExtentMap, Region, blocks_per_extent
from kvcached_vmm.host_driver import HostDriver
from kvcached_vmm.units import MIB

LAYOUTS = {
    "block-outermost": ExtentMap(12, [Region(0, PAGE)], PAGE, 3),
    "layer-outermost": ExtentMap(12, [Region(n * 6 * PAGE, PAGE // 2) for n in range(3)], PAGE, 4),
    "stride-that-does-not-divide": ExtentMap(12, [Region(0, 1536)], PAGE, 3),
    "layers-that-share-seams": ExtentMap(
        9, [Region(512 + n * 9 * 2560, 2560) for n in range(3)], PAGE, 2
    ),
    "block-larger-than-an-extent": ExtentMap(
        4, [Region(0, 5 * PAGE)], PAGE, blocks_per_extent([Region(0, 5 * PAGE)], PAGE, PAGE)
    ),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@pytest.fixture
def faulty(driver: HostDriver) -> FaultyDriver:
    return FaultyDriver(driver)


def spare_release(fault: Fault) -> Fault:
    """``fault``, but handles can be released: that they cannot has a test of its own below."""
    return lambda kind, at: kind != "release" and fault(kind, at)


@st.composite
def random_layouts(draw: st.DrawFn) -> ExtentMap:
    num_blocks = draw(st.integers(2, 14))
    stride = st.sampled_from([512, 1536, 2560, PAGE, PAGE + 512, 3 * PAGE, 5 * PAGE])
    same = draw(st.one_of(st.none(), stride))
    regions, end = [], 0
    for _ in range(draw(st.integers(1, 3))):
        offset = end + draw(st.sampled_from([0, 512, PAGE]))
        regions.append(Region(offset, same or draw(stride)))
        end = offset + num_blocks * regions[-1].stride_bytes
    target = draw(st.sampled_from([1, 4 * PAGE, 12 * PAGE]))
    return ExtentMap(num_blocks, regions, PAGE, blocks_per_extent(regions, PAGE, target))


def pages_of(layout: ExtentMap, extent: int) -> set[int]:
    """The pages that hold a byte of ``extent``, as offsets, counted block by block."""
    return {
        page * PAGE
        for block in layout.blocks(extent)
        for offset, size in layout.block_ranges(block)
        for page in range(offset // PAGE, (offset + size - 1) // PAGE + 1)
    }


class ArenaMachine(RuleBasedStateMachine):
    """Commits and releases at random over a driver that fails at random."""

    @initialize(layout=random_layouts(), spare_pages=st.integers(-12, 4))
    def start(self, layout: ExtentMap, spare_pages: int) -> None:
        self.files = count_open_files()
        self.layout = layout
        capacity = max(PAGE, layout.size_bytes + spare_pages * PAGE)
        self.host = HostDriver(capacity, granularity=PAGE)
        self.driver = FaultyDriver(self.host)
        self.arena = Arena(self.driver, layout)
        self.probe = AccessProbe()
        self.committed: set[int] = set()
        self.contents: dict[int, int] = {}
        self.strays = False
        """Whether a mapping that nobody needs may be left."""

    def pages(self, extents: set[int] | frozenset[int]) -> set[int]:
        return set[int]().union(*(pages_of(self.layout, extent) for extent in extents))

    def choose(self, data: st.DataObject) -> set[int]:
        number = st.integers(0, self.layout.num_extents - 1)
        return data.draw(st.sets(number, min_size=1, max_size=4), label="extents")

    @contextlib.contextmanager
    def faults(self, data: st.DataObject) -> contextlib.AbstractContextManager[None]:
        seed = st.integers(0, 1 << 16)
        some = st.sets(st.sampled_from(["create", "map", "allow", "unmap"]), min_size=1)
        fault: Fault | None = data.draw(
            st.one_of(
                st.none(),
                st.builds(nth_call, st.integers(1, 20), st.integers(1, 3)),
                st.sampled_from(["create", "map", "allow", "unmap"]).map(every),
                st.builds(at_random, seed, st.sampled_from([0.2, 0.7]), some),
            ),
            label="fault",
        )
        self.driver.fail(*([spare_release(fault)] if fault else []))
        yield
        self.strays |= "unmap" in self.driver.failed
        self.driver.heal()

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        wanted = self.choose(data)
        before, mapped = (
            self.host.allocated_bytes,
            self.probe.pages(self.arena.base, self.layout.size_bytes, PAGE),
        )
        fresh = self.pages(wanted) - mapped
        with self.faults(data):
            try:
                added = self.arena.commit(wanted)
            except DriverError:
                pass
            else:
                self.committed |= wanted
                assert self.strays or self.host.allocated_bytes == before + added
                assert all(content(self.arena.base + page, PAGE) == bytes(PAGE) for page in fresh)

    @rule(data=st.data())
    def decommit(self, data: st.DataObject) -> None:
        unwanted = self.choose(data)
        before = self.host.allocated_bytes
        with self.faults(data):
            given_back = self.arena.decommit(unwanted)
        assert self.host.allocated_bytes == before - given_back
        self.committed -= unwanted
        for extent in unwanted:
            for block in self.layout.blocks(extent):
                self.contents.pop(block, None)

    @precondition(lambda self: self.committed)
    @rule(data=st.data(), value=st.integers(1, 255))
    def write(self, data: st.DataObject, value: int) -> None:
        extent = data.draw(st.sampled_from(sorted(self.committed)), label="extent")
        block = data.draw(st.sampled_from(list(self.layout.blocks(extent))), label="block")
        for offset, size in self.layout.block_ranges(block):
            fill(self.arena.base + offset, size, value)
        self.contents[block] = value

    @rule()
    def recover(self) -> None:
        self.arena.decommit([])
        self.strays = False

    @invariant()
    def the_count_is_what_the_driver_holds(self) -> None:
        self.arena.check()
        assert self.host.allocated_bytes == self.arena.committed_bytes
        assert self.host.allocated_bytes == sum(self.driver.mapped.values())
        assert not self.driver.handles, "a handle is kept"
        assert self.arena.committed == self.committed

    @invariant()
    def memory_works_exactly_where_it_is_committed(self) -> None:
        needed = self.pages(self.committed)
        usable = self.probe.pages(self.arena.base, self.layout.size_bytes, PAGE)
        assert usable >= needed
        assert self.strays or usable == needed
        blocks = range(self.layout.num_blocks)
        missing = {self.layout.extent_of(block) for block in blocks} - self.committed
        assert self.arena.missing(blocks) == missing

    @invariant()
    def contents_stay(self) -> None:
        for block, value in self.contents.items():
            for offset, size in self.layout.block_ranges(block):
                assert content(self.arena.base + offset, size) == bytes([value]) * size

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.driver.heal()
            self.arena.close()
            self.probe.close()
            assert self.host.allocated_bytes == 0
            assert not self.driver.mapped
            assert not self.driver.reserved
            assert count_open_files() == self.files


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=50, stateful_step_count=25)


def life(arena: Arena, expect: Callable[[], None]) -> None:
    """A scripted life; ``expect`` is called after each step that worked."""
    last = arena.extents.num_extents - 1
    for step in (
        lambda: arena.commit([0]),
        lambda: arena.commit([1, last]),
        lambda: arena.decommit([1]),
        lambda: arena.commit(range(last + 1)),
        lambda: arena.decommit([0, last]),
        lambda: arena.commit([last]),
        lambda: arena.decommit(arena.committed),
    ):
        step()
        expect()


@layouts
@pytest.mark.parametrize("times", [1, 3], ids=["once", "three-times"])
def test_any_driver_call_may_fail_and_the_same_script_then_works(
    driver: HostDriver, layout: ExtentMap, times: int
) -> None:
    faulty = FaultyDriver(driver)
    arena = Arena(faulty, layout)

    def counts_are_true() -> None:
        arena.check()
        assert driver.allocated_bytes == arena.committed_bytes == sum(faulty.mapped.values())

    faulty.heal()
    life(arena, counts_are_true)
    calls = list(faulty.calls)
    assert {"create", "map", "allow", "unmap", "release"} <= set(calls)
    for number, kind in enumerate(calls, start=1):
        if kind == "release":
            continue
        faulty.fail(spare_release(nth_call(number, times)))
        with contextlib.suppress(DriverError):
            life(arena, counts_are_true)
        counts_are_true()
        assert faulty.failed, f"call {number}, {kind}, was not reached"
        faulty.heal()
        arena.decommit(arena.committed)
        assert driver.allocated_bytes == arena.committed_bytes == 0
        life(arena, counts_are_true)
    arena.close()
    assert not faulty.mapped
    assert not faulty.reserved


@layouts
@pytest.mark.parametrize("kind", ["create", "map", "allow"])
def test_a_commit_that_fails_leaves_nothing_behind_and_can_be_repeated(
    faulty: FaultyDriver, layout: ExtentMap, kind: str
) -> None:
    arena = Arena(faulty, layout)
    arena.commit([0])
    mapped, size = dict(faulty.mapped), arena.committed_bytes
    faulty.fail(every(kind))
    expected = OutOfMemory if kind == "create" else DriverError
    with pytest.raises(expected, match=f"^{kind} failed: a fault made on purpose.$"):
        arena.commit([0, 1, 2])
    assert arena.committed == {0}
    assert faulty.mapped == mapped
    assert arena.committed_bytes == size
    faulty.heal()
    arena.commit([0, 1, 2])
    assert arena.committed == {0, 1, 2}
    arena.close()


def test_memory_that_runs_out_half_way_is_all_given_back() -> None:
    driver = HostDriver(capacity_bytes=5 * PAGE, granularity=PAGE)
    arena = Arena(driver, LAYOUTS["block-outermost"])
    arena.commit([0])
    with pytest.raises(OutOfMemory):
        arena.commit([1, 2])
    assert driver.allocated_bytes == 3 * PAGE
    arena.close()
    assert driver.allocated_bytes == 0


@layouts
def test_an_unmap_that_fails_is_counted_and_tried_again(
    faulty: FaultyDriver, layout: ExtentMap
) -> None:
    arena = Arena(faulty, layout)
    size = arena.commit([1])
    faulty.fail(every("unmap"))
    assert arena.decommit([1]) == 0
    assert 1 not in arena
    assert arena.committed_bytes == size
    with pytest.raises(DriverError, match="cannot be unmapped"):
        arena.close()
    faulty.heal()
    assert arena.decommit([]) == size
    assert not faulty.mapped
    arena.close()


def test_a_piece_that_could_not_be_unmapped_is_used_again(faulty: FaultyDriver) -> None:
    arena = Arena(faulty, LAYOUTS["block-outermost"])
    arena.commit([1])
    faulty.fail(every("unmap"))
    arena.decommit([1])
    assert arena.commit([1, 2]) == 6 * PAGE
    assert faulty.calls.count("create") == 1
    assert arena.committed_bytes == 6 * PAGE
    faulty.heal()
    arena.close()


def test_adjacent_extents_are_made_accessible_by_one_call(faulty: FaultyDriver) -> None:
    arena = Arena(faulty, LAYOUTS["block-outermost"])
    faulty.heal()
    arena.commit([0, 1, 3])
    assert faulty.calls.count("allow") == 2
    arena.close()


def test_a_reservation_that_fails_is_the_callers_to_hear(faulty: FaultyDriver) -> None:
    faulty.fail(every("reserve"))
    with pytest.raises(DriverError, match="reserve failed"):
        Arena(faulty, LAYOUTS["block-outermost"])


@pytest.mark.parametrize("also", ["nothing", "map"])
def test_a_handle_that_could_not_be_released_is_counted_and_tried_again(also: str) -> None:
    host = HostDriver(capacity_bytes=MIB, granularity=PAGE)
    driver = FaultyDriver(host)
    arena = Arena(driver, LAYOUTS["block-outermost"])
    driver.fail(every("release", also))
    with contextlib.suppress(DriverError):
        arena.commit([1])
    driver.heal()
    arena.decommit([1])
    assert host.allocated_bytes == arena.committed_bytes


def test_an_extent_named_twice_is_committed_once(faulty: FaultyDriver) -> None:
    arena = Arena(faulty, LAYOUTS["block-outermost"])
    arena.commit([1, 1])
    arena.close()
