"""A debug mode: memory that comes, and memory that goes, is filled with what spoils results.

Kernels may read what nobody has written if they give it no weight: vLLM's attention on a CPU
multiplies whole tiles, beyond the end of a sequence, with weights of 0. That is harmless with zeros
and old content, and NaN * 0 is NaN. So there are two poisons, and each finds what the other cannot:
``NAN`` spares the blocks that a request has been given, and shows any access to all others;
``LARGE`` is everywhere, and shows what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from kvcached_vmm.arena import Arena
from kvcached_vmm.driver import Driver
from kvcached_vmm.extents import ExtentMap


class Poison(NamedTuple):
    """A byte that memory is filled with.

    Attributes:
        spares_blocks: blocks are zeroed when they are first handed out.
    """

    byte: int
    spares_blocks: bool


NAN = Poison(0xFF, spares_blocks=True)
"""All bits set are a NaN in float32, float16, bfloat16 and fp8 (e5m2, e4m3fn)."""

LARGE = Poison(0x7B, spares_blocks=False)
"""Finite, and near the largest number: 1.3e36 in float32 and bfloat16, 61,280 in float16, 57,344 in
e5m2, 352 in e4m3fn."""

Fill = Callable[[int, int, int], None]
"""Sets ``size`` bytes at an address to a byte; done when it returns."""


class PoisonedArena(Arena):
    """An arena whose extents are filled when they come and before they go.

    Args:
        fill: how memory of the driver's device is filled.
    """

    def __init__(self, driver: Driver, extents: ExtentMap, poison: Poison, fill: Fill) -> None:
        super().__init__(driver, extents)
        self._poison = poison
        self._fill = fill
        self._used: set[int] = set()
        """Blocks handed out since their extent was committed."""

    def commit(self, extents: Iterable[int]) -> int:
        with self._lock:
            fresh = set(extents).difference(self.committed)
            added = super().commit(fresh)
            self._spoil(fresh)
            if 0 in fresh:
                self.hand_out([0])  # the engine pads with it
            return added

    def decommit(self, extents: Iterable[int]) -> int:
        with self._lock:
            leaving = self.committed.intersection(extents)
            self._spoil(leaving)
            return super().decommit(leaving)

    def hand_out(self, blocks: Iterable[int]) -> None:
        """A request is about to use ``blocks``, all of them committed."""
        if not self._poison.spares_blocks:
            return
        with self._lock:
            for block in set(blocks).difference(self._used):
                self._used.add(block)
                for offset, size in self.extents.block_ranges(block):
                    self._fill(self.base + offset, size, 0)

    def _spoil(self, extents: Iterable[int]) -> None:
        for extent in extents:
            blocks = self.extents.blocks(extent)
            self._used.difference_update(blocks)
            for region in self.extents.regions:
                at = self.base + region.offset_bytes + blocks.start * region.stride_bytes
                self._fill(at, len(blocks) * region.stride_bytes, self._poison.byte)
