"""What a pool holds: extents that have memory, grants for more, and the extents that have none."""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterable
from typing import Generic

from kvcached_vmm.extents import ExtentMap, Footprint
from kvcached_vmm.policy import B, Budget

EMPTY, RESIDENT, IDLE, LEAVING = range(4)

Moment = tuple[float, int]
"""Seconds, and the last step launched by then. Moments are told apart by identity, not by value."""

UNUSED: Moment = (0.0, 0)
"""The moment of an extent that has no cached block."""


class Extent(Generic[B]):
    """What a pool knows of an extent.

    Attributes:
        blocks: those that can be handed out, the last one first.
        cached: those that are free and kept, in the order in which they came.
        used: when the last of them came.
        quiet_step: steps after this one do not touch the extent, if all its blocks are free.
    """

    __slots__ = ("blocks", "cached", "idle_since", "index", "quiet_step", "state", "used")

    def __init__(self, index: int, blocks: list[B]) -> None:
        self.index = index
        self.blocks = blocks
        self.cached: list[B] = []
        self.state = EMPTY
        self.quiet_step = 0
        self.idle_since = 0.0
        self.used = UNUSED


class Idle(OrderedDict[Extent[B], None]):
    """Idle extents, in the order in which they became so."""

    def add(self, extent: Extent[B], now: float) -> None:
        """All blocks of ``extent`` are free."""
        extent.state = IDLE
        extent.idle_since = now
        self[extent] = None

    def take(self, extent: Extent[B]) -> Extent[B]:
        """``extent`` is to be used, or to leave."""
        del self[extent]
        extent.state = RESIDENT
        return extent

    def since(self, moment: float, most: int) -> list[Extent[B]]:
        """Of the first ``most``, those that have been idle since ``moment`` or longer."""
        oldest = itertools.islice(self, max(0, most))
        return [extent for extent in oldest if extent.idle_since <= moment]


class Holding:
    """Keeps the budget's account of an arena's extents.

    A grant is for an extent, but for none in particular: the lowest empty one uses the next grant,
    so that memory gathers at low addresses.
    """

    def __init__(self, extents: ExtentMap, budget: Budget) -> None:
        self._extents = extents
        self._budget = budget
        self._unit = extents.largest_bytes
        self._footprint = Footprint(extents)
        self._empty = list(range(extents.num_extents))
        self.grants = 0
        """Extents that the budget has granted and that have no memory yet."""
        self.granted_blocks = 0
        """Blocks in the extents that would use these grants, the null block left out."""
        self._grown = self._grown_bytes = 0

    @property
    def bytes(self) -> int:
        """Bytes of the extents that have memory."""
        return self._footprint.bytes

    @property
    def spare(self) -> int:
        """Empty extents that no grant is for."""
        return len(self._empty) - self.grants

    def reserve(self, extents: int) -> int:
        """Ask for grants for so many more extents; returns how many there are."""
        wanted = min(extents, self.spare)
        if wanted <= 0:
            return 0
        granted = self._budget.reserve(wanted * self._unit, self._unit) // self._unit
        self._grant(granted)
        return granted

    def grow(self) -> int:
        """Use a grant, which ``note`` or ``cancel`` tells the budget; return the extent that has
        memory now, or will as soon as it is touched."""
        extent = heapq.heappop(self._empty)
        before = self.bytes
        self._footprint.add(extent)
        self._grown += 1
        self._grown_bytes += self.bytes - before
        self._grant(-1)
        return extent

    def note(self) -> None:
        """Tell the budget what its grants were used for."""
        self._tell(0)

    def cancel(self) -> None:
        """Tell the budget what its grants were used for, and give the others back."""
        self._tell(self.grants)
        self._grant(-self.grants)

    def remove(self, extents: Iterable[int]) -> None:
        """The memory of ``extents`` is gone."""
        self.note()
        before = self.bytes
        for extent in extents:
            heapq.heappush(self._empty, extent)
            self._footprint.remove(extent)
        self._budget.release(before - self.bytes)
        self._grant(0)

    def _tell(self, unused: int) -> None:
        if self._grown or unused:
            granted = (self._grown + unused) * self._unit
            self._budget.commit(granted, self._grown_bytes, self._grown)
            self._grown = self._grown_bytes = 0

    def _grant(self, extents: int) -> None:
        """Count grants in or out. The lowest extents use them, so only the last can be short."""
        self.grants += extents
        span = self._extents.blocks_per_extent
        self.granted_blocks = self.grants * span
        if self.grants and self.grants == len(self._empty):
            self.granted_blocks -= span - len(self._extents.blocks(max(self._empty)))
        if self.grants and self._empty[0] == 0:
            self.granted_blocks -= 1
