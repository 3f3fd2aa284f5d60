"""Which bytes belong to which block and extent, checked against plain counting."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_vmm.extents import ExtentMap, Footprint, Piece, Region, blocks_per_extent
from kvcached_vmm.units import KIB, MIB

GRANULE = 4 * KIB


@st.composite
def layouts(draw: st.DrawFn) -> ExtentMap:
    """One region or several, strides that divide a granule or do not, gaps between regions."""
    num_blocks = draw(st.integers(1, 24))
    regions, end = [], 0
    for _ in range(draw(st.integers(1, 4))):
        offset = end + 512 * draw(st.sampled_from([0, 0, 1, 8, 11]))
        stride = 512 * draw(st.integers(1, 28))
        regions.append(Region(offset, stride))
        end = offset + num_blocks * stride
    target = draw(st.sampled_from([1, GRANULE, 5 * GRANULE, 16 * GRANULE]))
    return ExtentMap(num_blocks, regions, GRANULE, blocks_per_extent(regions, GRANULE, target))


def granules_of(extents: ExtentMap, extent: int) -> set[int]:
    """Granules that hold a byte of a block of ``extent``, counted one by one."""
    return {
        granule
        for block in extents.blocks(extent)
        for region in extents.regions
        for granule in range(
            (region.offset_bytes + block * region.stride_bytes) // GRANULE,
            (region.offset_bytes + (block + 1) * region.stride_bytes - 1) // GRANULE + 1,
        )
    }


def granules(pieces: list[Piece]) -> list[int]:
    """The granules that ``pieces`` cover, each as often as it is covered."""
    return [
        granule
        for offset, size in pieces
        for granule in range(offset // GRANULE, (offset + size) // GRANULE)
    ]


@given(layouts())
def test_every_block_is_in_exactly_one_extent(extents: ExtentMap) -> None:
    numbered = [block for e in range(extents.num_extents) for block in extents.blocks(e)]
    assert numbered == list(range(extents.num_blocks))
    for block in numbered:
        assert block in extents.blocks(extents.extent_of(block))


@given(layouts())
def test_blocks_do_not_overlap_and_lie_in_the_arena(extents: ExtentMap) -> None:
    pieces = sorted(p for b in range(extents.num_blocks) for p in extents.block_ranges(b))
    for one, following in pairwise(pieces):
        assert one.offset + one.size <= following.offset
    assert pieces[-1].offset + pieces[-1].size <= extents.size_bytes
    assert extents.size_bytes % GRANULE == 0
    assert sum(p.size for p in extents.block_ranges(0)) == extents.block_bytes


@given(layouts())
def test_an_extent_alone_maps_what_its_blocks_touch_and_nothing_else(extents: ExtentMap) -> None:
    for extent in range(extents.num_extents):
        footprint = Footprint(extents)
        pieces = footprint.add(extent)
        covered = granules(pieces)
        assert len(covered) == len(set(covered))
        assert set(covered) == granules_of(extents, extent)
        assert footprint.bytes == len(covered) * GRANULE <= extents.largest_bytes


@given(layouts(), st.data())
def test_a_footprint_is_the_union_of_its_extents_whatever_the_order(
    extents: ExtentMap, data: st.DataObject
) -> None:
    footprint, truth = Footprint(extents), set[int]()
    mapped: set[int] = set()
    toggles = st.lists(st.integers(0, extents.num_extents - 1), max_size=20)
    for extent in data.draw(toggles, label="extents to add or remove"):
        if extent in footprint:
            gone = granules(footprint.remove(extent))
            assert mapped.issuperset(gone)
            mapped.difference_update(gone)
            truth.remove(extent)
        else:
            new = granules(footprint.add(extent))
            assert mapped.isdisjoint(new), "memory mapped twice"
            mapped.update(new)
            truth.add(extent)
        assert mapped == set[int]().union(*(granules_of(extents, e) for e in truth))
        assert footprint.bytes == len(mapped) * GRANULE
        assert set(footprint) == truth
        assert len(footprint) == len(truth)


@given(layouts())
def test_a_mapping_never_changes_its_borders(extents: ExtentMap) -> None:
    """A mapping can only be unmapped whole, so what one extent maps another must not split."""
    sizes: dict[int, int] = {}
    for extent in range(extents.num_extents):
        own, seams = extents.pieces(extent)
        for offset, size in [*own, *((seam, GRANULE) for seam in seams)]:
            assert sizes.setdefault(offset, size) == size


@given(st.lists(st.integers(1, 64 * KIB), min_size=1, max_size=4), st.integers(1, 64 * MIB))
def test_an_extent_fills_a_granule_in_every_region(strides: list[int], target: int) -> None:
    regions = [Region(0, stride) for stride in strides]
    count = blocks_per_extent(regions, GRANULE, target)
    assert count >= 1
    assert all(count * stride >= GRANULE for stride in strides)


@pytest.mark.parametrize(
    ("strides", "granularity", "target", "blocks"),
    [
        pytest.param([2 * MIB], 2 * MIB, 32 * MIB, 16, id="llama-8b-block-outermost"),
        pytest.param([64 * KIB] * 32, 2 * MIB, 32 * MIB, 32, id="layer-outermost-a-granule-each"),
        pytest.param([3 * MIB], 2 * MIB, 32 * MIB, 10, id="borders-meet-granules-when-cheap"),
        pytest.param([48 * MIB], 2 * MIB, 32 * MIB, 1, id="a-block-larger-than-an-extent"),
        pytest.param([2 * MIB + 4096], 2 * MIB, 32 * MIB, 15, id="borders-that-never-meet"),
    ],
)
def test_extents_are_about_as_large_as_wanted(
    strides: list[int], granularity: int, target: int, blocks: int
) -> None:
    assert blocks_per_extent([Region(0, s) for s in strides], granularity, target) == blocks


def test_a_block_larger_than_an_extent_does_not_make_an_empty_pool() -> None:
    stride = 5 * GRANULE
    regions = [Region(0, stride)]
    extents = ExtentMap(3, regions, GRANULE, blocks_per_extent(regions, GRANULE, GRANULE))
    assert extents.num_extents == 3
    assert Footprint(extents).add(1) == [Piece(stride, stride)]


@pytest.mark.parametrize(
    ("num_blocks", "regions", "per_extent", "complaint"),
    [
        (0, [Region(0, GRANULE)], 1, "at least one block"),
        (1, [], 1, "at least one block"),
        (1, [Region(0, GRANULE)], 0, "at least one block"),
        (2, [Region(0, GRANULE), Region(GRANULE, GRANULE)], 1, "overlap"),
        (9, [Region(0, 512)], 7, "fill a granule"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(
    num_blocks: int, regions: list[Region], per_extent: int, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        ExtentMap(num_blocks, regions, GRANULE, per_extent)
