"""The free blocks of resident extents, in the order in which they will be handed out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from kvcached_vmm.holding import Extent
from kvcached_vmm.policy import B


class Stack(list[B]):
    """Free blocks; the last one is handed out first.

    A list, because handing out is a list's own operation.
    """

    is_sorted = True
    """Whether nothing came in since ``order``."""

    def add(self, blocks: Iterable[B]) -> None:
        """Blocks came back: they wait at the bottom until the next ``order``."""
        self[:0] = blocks
        self.is_sorted = False

    def take(self, count: int) -> list[B]:
        """Take out the last ``count`` blocks, of at least as many; the last one first."""
        at = len(self) - count
        taken = self[at:]
        taken.reverse()
        del self[at:]
        return taken

    def order(
        self, owner: Sequence[Extent[B]], step: int
    ) -> tuple[list[Extent[B]], dict[Extent[B], int]]:
        """Put the blocks of the fullest extents on top, and take out those of extents that are free
        as a whole, but for the first extent.

        Args:
            owner: the extent of each block.
            step: the last one launched, which may still use any of them.

        Returns:
            The extents taken out, and how many blocks each of the others has here.
        """
        free: defaultdict[Extent[B], list[B]] = defaultdict(list)
        for block in self:
            free[owner[block.block_id]].append(block)
        self.clear()
        whole, partly = [], []
        for extent, blocks in free.items():
            extent.quiet_step = step
            if len(blocks) == len(extent.blocks) and extent.index:
                whole.append(extent)
            else:
                partly.append((-len(blocks), extent.index, extent))
        for _, _, extent in sorted(partly):
            self += free[extent]
        self.is_sorted = True
        return whole, {extent: -count for count, _, extent in partly}
