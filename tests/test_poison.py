"""Poison: memory that comes and goes spoils the result of whoever reads what nobody wrote."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from faults import PAGE, FaultyDriver, content, every, fill

from kvcached_plugins.settings import Settings
from kvcached_vmm.arena import Arena
from kvcached_vmm.errors import DriverError, SettingsError
from kvcached_vmm.extents import ExtentMap, Region
from kvcached_vmm.host_driver import HostDriver
from kvcached_vmm.poison import LARGE, NAN, Poison, PoisonedArena

torch = pytest.importorskip("torch")
tensors = pytest.importorskip("kvcached_vmm.tensors")

CPU = torch.device("cpu")
BLOCK = 512
LAYOUTS = {
    "two layers": ExtentMap(32, [Region(0, BLOCK), Region(32 * BLOCK, BLOCK)], PAGE, 8),
    "two layers with seams": ExtentMap(
        30, [Region(BLOCK, 3 * BLOCK), Region(100 * BLOCK, 3 * BLOCK)], PAGE, 5
    ),
}
FORMATS = [
    *(torch.float32, torch.bfloat16, torch.float16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request: pytest.FixtureRequest) -> ExtentMap:
    made: ExtentMap = request.param
    return made


@pytest.fixture
def faulty(driver: HostDriver) -> FaultyDriver:
    return FaultyDriver(driver)


@contextlib.contextmanager
def poisoned(driver: FaultyDriver, layout: ExtentMap, poison: Poison) -> Iterator[PoisonedArena]:
    arena = PoisonedArena(driver, layout, poison, tensors.filler(CPU))
    arena.commit([0])
    yield arena
    driver.heal()
    arena.close()


def block(arena: Arena, number: int) -> bytes:
    """What is in a block, in all layers."""
    ranges = arena.extents.block_ranges(number)
    return b"".join(content(arena.base + offset, size) for offset, size in ranges)


def write(arena: Arena, number: int, value: int) -> None:
    for offset, size in arena.extents.block_ranges(number):
        fill(arena.base + offset, size, value)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_what_is_spoiled_is_nan_or_large_in_every_format_of_a_cache(dtype: torch.dtype) -> None:
    def as_number(byte: int) -> torch.Tensor:
        return torch.full((8,), byte, dtype=torch.uint8).view(dtype).float()

    assert as_number(NAN.byte).isnan().all()
    large = as_number(LARGE.byte)
    assert large.isfinite().all()
    assert (large >= torch.finfo(dtype).max / 300).all()


@pytest.mark.parametrize("poison", [NAN, LARGE], ids=["nan", "large"])
def test_a_stale_read_is_seen(faulty: FaultyDriver, layout: ExtentMap, poison: Poison) -> None:
    """A block is read that was given back and is there again: nothing else would tell."""
    with poisoned(faulty, layout, poison) as arena:
        stale, other = layout.blocks(2)[:2]
        arena.commit([2])
        arena.hand_out([stale])
        keys = tensors.arena_tensor(arena, layout.size_bytes, CPU).view(torch.float32)
        at = layout.block_ranges(stale)[0].offset // 4
        keys[at : at + 8] = torch.arange(8.0)
        query = torch.ones(8)
        assert query @ keys[at : at + 8] == 28

        arena.decommit([2])
        arena.commit([2])
        arena.hand_out([other])
        read = query @ keys[at : at + 8]

    assert not read.isfinite() if poison is NAN else read > 1e36


@pytest.mark.parametrize("poison", [NAN, LARGE], ids=["nan", "large"])
def test_only_extents_that_come_or_go_are_touched(
    faulty: FaultyDriver, layout: ExtentMap, poison: Poison
) -> None:
    with poisoned(faulty, layout, poison) as arena:
        arena.commit([1, 3])
        kept = [*layout.blocks(1), *layout.blocks(3)]
        arena.hand_out(kept)
        for number in kept:
            write(arena, number, 5)
        arena.commit([1, 2, 3])
        arena.decommit([2])
        arena.commit([2, 0])

        assert all(set(block(arena, number)) == {5} for number in kept)
        assert all(set(block(arena, number)) == {poison.byte} for number in layout.blocks(2))
        arena.check()


def test_a_block_that_is_handed_out_is_zero_once_and_the_others_stay_nan(
    faulty: FaultyDriver, layout: ExtentMap
) -> None:
    with poisoned(faulty, layout, NAN) as arena:
        first, *others = layout.blocks(1)
        arena.commit([1])
        arena.hand_out([first])
        assert set(block(arena, first)) == {0}
        assert all(set(block(arena, number)) == {NAN.byte} for number in others)

        write(arena, first, 9)
        arena.hand_out([first, others[0]])  # a cached prefix is used once more
        assert set(block(arena, first)) == {9}

        arena.decommit([1])
        arena.commit([1])
        assert set(block(arena, first)) == {NAN.byte}


def test_the_block_that_engines_pad_with_is_never_nan(
    faulty: FaultyDriver, layout: ExtentMap
) -> None:
    with poisoned(faulty, layout, NAN) as arena:
        assert set(block(arena, 0)) == {0}
        assert set(block(arena, 1)) == {NAN.byte}


def test_what_cannot_be_unmapped_is_spoiled_all_the_same(
    faulty: FaultyDriver, layout: ExtentMap
) -> None:
    with poisoned(faulty, layout, NAN) as arena:
        number = layout.blocks(1)[2]
        arena.commit([1])
        arena.hand_out([number])
        faulty.fail(every("unmap"))
        arena.decommit([1])
        assert set(block(arena, number)) == {NAN.byte}
        faulty.heal()
        arena.commit([1])
        assert set(block(arena, number)) == {NAN.byte}


@pytest.mark.parametrize("kind", ["create", "map", "allow"])
def test_a_commit_that_fails_touches_nothing(
    faulty: FaultyDriver, layout: ExtentMap, kind: str
) -> None:
    with poisoned(faulty, layout, LARGE) as arena:
        faulty.fail(every(kind))
        with pytest.raises(DriverError):
            arena.commit([1])
        faulty.heal()
        assert arena.committed == {0}
        arena.commit([1])
        assert set(block(arena, layout.blocks(1)[0])) == {LARGE.byte}


def test_the_setting_names_a_poison_and_is_off_if_unset() -> None:
    assert Settings.read({}).poison is None
    assert Settings.read({"KVCACHED_POISON": " NaN "}).poison is NAN
    assert Settings.read({"KVCACHED_POISON": "large"}).poison is LARGE
    with pytest.raises(SettingsError, match=r"^KVCACHED_POISON='1' .* one of nan, large\.$"):
        Settings.read({"KVCACHED_POISON": "1"})
