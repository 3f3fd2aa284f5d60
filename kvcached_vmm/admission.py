"""Which requests may begin, and what memory requests asked for in vain."""

from __future__ import annotations

from kvcached_vmm.extents import ExtentMap


class Admission:
    """Limits of a pool, and the shortage of its last scheduling round.

    Attributes:
        limit_bytes: requests begin as long as what is live stays below.
        share_bytes: likewise while other engines wait, but one request may always begin; None:
            nobody waits.
    """

    def __init__(self, extents: ExtentMap) -> None:
        self.limit_bytes = extents.size_bytes
        self.share_bytes: int | None = None
        self._extents = extents
        self._short_blocks = self._coveted_blocks = 0
        self._shortage = 0, 0

    @property
    def capacity_blocks(self) -> int:
        """How many blocks could be live at most."""
        limit = self.limit_bytes // self._extents.block_bytes
        return max(1, min(limit, self._extents.num_blocks - 1))

    @property
    def is_short(self) -> bool:
        """Whether blocks were not to be had in the scheduling round that is not settled yet."""
        return self._short_blocks > 0

    def admits(self, live_blocks: int, count: int) -> bool:
        """Whether a request that needs ``count`` blocks may begin beside ``live_blocks``, as far as
        limits are concerned. One that has to leave memory to others counts as one that waits."""
        held = (live_blocks + count) * self._extents.block_bytes
        if held > self.limit_bytes:
            return False
        if live_blocks and self.share_bytes is not None and held > self.share_bytes:
            self.refused(count)
            return False
        return True

    def refused(self, blocks: int) -> None:
        """``blocks`` that were asked for are not to be had."""
        self._short_blocks = max(self._short_blocks, blocks)

    def coveted(self, blocks: int) -> None:
        """So many more blocks would be welcome, and were not granted: cached blocks go instead, or
        the reserve is short of them."""
        self._coveted_blocks = max(self._coveted_blocks, blocks)

    def settle(self) -> None:
        """A scheduling round is over."""
        self._shortage = self._short_blocks, self._coveted_blocks
        self._short_blocks = self._coveted_blocks = 0

    def forget(self) -> None:
        """There are no rounds any more, so nobody waits."""
        self._shortage = 0, 0

    def shortage(self) -> tuple[int, int]:
        """Bytes that were asked for in the last round and not granted, in whole extents: those that
        requests wait for, and those that are only coveted."""
        span, unit = self._extents.blocks_per_extent, self._extents.largest_bytes
        wanted, coveted = (-(-blocks // span) * unit for blocks in self._shortage)
        return wanted, max(0, coveted - wanted)
