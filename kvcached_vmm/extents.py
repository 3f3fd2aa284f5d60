"""Which bytes belong to which block, and which extent a block is in. Arithmetic only.

A *region* is a run of equally large blocks: one for a block-outermost layout, one per layer for a
layer-outermost one. An *extent* is the same run of whole blocks in every region. Where a region's
stride does not divide the granularity, two extents meet inside one granule; that granule is a
*seam*, committed with either of them and given back with the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvcached_vmm.units import MIB, ceil_to, floor_to

EXTENT_BYTES = 32 * MIB
"""The driver charges per handle (37 to 52 us to create and map, H200 and H100): growing by 1 GiB
takes 1.6 to 1.9 ms. Extents half as large take twice as long, and pin 2 to 3 % less memory in a
churn of requests."""


OWN_EXTENT_BYTES = 16 * MIB
"""Where requests get extents of their own (``Runs``): what that costs is half as much then, 15 % of
what requests need under load and 10 % after it (``tail.py``). With 32 MiB it is 27 and 15."""


class Piece(NamedTuple):
    """Bytes of an arena that one mapping covers."""

    offset: int
    size: int


@dataclass(frozen=True)
class Region:
    """Block ``b`` occupies ``[offset_bytes + b * stride_bytes, ... + stride_bytes)``."""

    offset_bytes: int
    stride_bytes: int


def blocks_per_extent(regions: Iterable[Region], granularity: int, target_bytes: int) -> int:
    """How many blocks make an extent of about ``target_bytes``, at least one granule per region.

    Prefers a count that puts extent borders on granules, if that is at most twice the target.
    """
    strides = [region.stride_bytes for region in regions]
    block_bytes = sum(strides)
    aligned = math.lcm(*(granularity // math.gcd(stride, granularity) for stride in strides))
    if aligned * block_bytes <= 2 * target_bytes:
        return aligned * max(1, target_bytes // (aligned * block_bytes))
    smallest = max(-(-granularity // stride) for stride in strides)
    return max(smallest, target_bytes // block_bytes)


class ExtentMap:
    """The extents of an arena.

    Args:
        num_blocks: blocks in every region.
        regions: where blocks lie; they must not overlap.
        granularity: bytes of the driver's smallest mapping.
        blocks_per_extent: blocks in each extent; the last may have fewer.
    """

    def __init__(
        self, num_blocks: int, regions: Sequence[Region], granularity: int, blocks_per_extent: int
    ) -> None:
        if num_blocks < 1 or blocks_per_extent < 1 or not regions:
            raise ValueError("an arena needs at least one block, one region, one block per extent")
        self.num_blocks = num_blocks
        self.regions = tuple(sorted(regions, key=lambda region: region.offset_bytes))
        self.granularity = granularity
        self.blocks_per_extent = blocks_per_extent
        end = 0
        for region in self.regions:
            if region.offset_bytes < end:
                raise ValueError("regions overlap")
            if blocks_per_extent * region.stride_bytes < granularity:
                raise ValueError("an extent must fill a granule in every region")
            end = region.offset_bytes + num_blocks * region.stride_bytes
        self.size_bytes = ceil_to(end, granularity)
        self.num_extents = -(-num_blocks // blocks_per_extent)
        self.block_bytes = sum(region.stride_bytes for region in self.regions)
        """Bytes of one block in all regions."""
        self._aligned = all(
            offset % granularity == 0
            for region in self.regions
            for offset in (
                region.offset_bytes,
                blocks_per_extent * region.stride_bytes,
                num_blocks * region.stride_bytes,
            )
        )
        self.largest_bytes = sum(self._largest(region) for region in self.regions)
        """No extent needs more bytes than this, seams included."""

    def extent_of(self, block: int) -> int:
        """The extent that holds ``block``."""
        return block // self.blocks_per_extent

    def blocks(self, extent: int) -> range:
        """The blocks of ``extent``."""
        first = extent * self.blocks_per_extent
        return range(first, min(first + self.blocks_per_extent, self.num_blocks))

    def block_ranges(self, block: int) -> list[Piece]:
        """The bytes of ``block``, one piece per region."""
        return [
            Piece(region.offset_bytes + block * region.stride_bytes, region.stride_bytes)
            for region in self.regions
        ]

    def pieces(self, extent: int) -> tuple[list[Piece], set[int]]:
        """The mappings that ``extent`` alone needs, and the offsets of its seams."""
        if self._aligned:
            spans = (self._span(region, extent) for region in self.regions)
            return [Piece(start, end - start) for start, end in spans], set()
        return self._own(extent), self._seams(extent)

    def own_bytes(self, extent: int) -> int:
        """Bytes that the driver gets back with ``extent``, whatever its neighbours do."""
        return sum(piece.size for piece in self.pieces(extent)[0])

    def _largest(self, region: Region) -> int:
        span = self.blocks_per_extent * region.stride_bytes
        if span % self.granularity or region.offset_bytes % self.granularity:
            return ceil_to(span, self.granularity) + self.granularity
        return span

    def _span(self, region: Region, extent: int) -> tuple[int, int]:
        blocks = self.blocks(extent)
        return (
            region.offset_bytes + blocks.start * region.stride_bytes,
            region.offset_bytes + blocks.stop * region.stride_bytes,
        )

    def _own(self, extent: int) -> list[Piece]:
        own = []
        for region in self.regions:
            start, end = self._span(region, extent)
            start, end = ceil_to(start, self.granularity), floor_to(end, self.granularity)
            if start < end:
                own.append(Piece(start, end - start))
        return own

    def _seams(self, extent: int) -> set[int]:
        borders = (edge for region in self.regions for edge in self._span(region, extent))
        return {floor_to(edge, self.granularity) for edge in borders if edge % self.granularity}


class Footprint:
    """Which pieces a set of extents needs. The truth that an arena and a ledger both count by."""

    def __init__(self, extents: ExtentMap) -> None:
        self.extents = extents
        self.bytes = 0
        self._present: set[int] = set()
        self._seam_users: dict[int, int] = {}

    def __contains__(self, extent: int) -> bool:
        return extent in self._present

    def __len__(self) -> int:
        return len(self._present)

    def __iter__(self) -> Iterator[int]:
        return iter(self._present)

    def lacks(self, extents: set[int]) -> set[int]:
        """Those of ``extents`` that are not counted in."""
        return extents - self._present

    def add(self, extent: int) -> list[Piece]:
        """Count ``extent`` in; return the pieces that it needs and nobody had."""
        own, seams = self.extents.pieces(extent)
        for seam in seams:
            users = self._seam_users.get(seam, 0)
            self._seam_users[seam] = users + 1
            if not users:
                own.append(Piece(seam, self.extents.granularity))
        self._present.add(extent)
        self.bytes += sum(piece.size for piece in own)
        return own

    def remove(self, extent: int) -> list[Piece]:
        """Count ``extent`` out; return the pieces that nobody needs any more."""
        own, seams = self.extents.pieces(extent)
        for seam in seams:
            users = self._seam_users[seam] - 1
            if users:
                self._seam_users[seam] = users
            else:
                del self._seam_users[seam]
                own.append(Piece(seam, self.extents.granularity))
        self._present.remove(extent)
        self.bytes -= sum(piece.size for piece in own)
        return own
