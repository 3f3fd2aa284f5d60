"""Blocks set aside for requests that grow, so that each keeps to extents of its own.

Without a prefix cache an extent is free when all requests with blocks in it have ended. Where many
grow in one extent, the longest of them holds all of it, and a few long answers hold most of what
many once needed. A *run* is what is left of an extent that was begun for one request: free blocks,
which that request gets first, and others when there is nothing else. That costs half an extent for
each request, so those that need less than an extent share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic

from kvcached_vmm.policy import B


class Runs(Generic[B]):
    """The runs of a pool.

    Args:
        blocks_per_extent: of the pool's extents.
        fresh: the free blocks of another extent, the first to be handed out last; [] if there is
            none without taking one from others.
    """

    def __init__(self, blocks_per_extent: int, fresh: Callable[[], Sequence[B]]) -> None:
        self.num_blocks = 0
        """Free blocks that are set aside."""
        self._span = blocks_per_extent
        self._fresh = fresh
        self._after: dict[int, list[B]] = {}
        self._held: Sequence[B] = ()

    def extents_for(self, held: Sequence[B], count: int) -> int:
        """How many more extents a request wants that holds the blocks ``held`` and is about to get
        ``count`` more; 0 if it is too short for extents of its own, or has a run that is enough."""
        self._held = held
        if len(held) + count < self._span:
            return 0
        run = self._after.get(held[-1].block_id, ()) if held else ()
        return -(-(count - len(run)) // self._span) if count > len(run) else 0

    def take(self, count: int) -> list[B]:
        """Hand out at most ``count`` blocks to the request that ``extents_for`` was last asked for;
        the others it is to share with short requests."""
        held, self._held = self._held, ()
        run = self._after.pop(held[-1].block_id, []) if held else []
        taken = self._next(run, count)
        if len(held) + count >= self._span:
            while len(taken) < count and (found := self._fresh()):
                run = list(found)
                self.num_blocks += len(run)
                taken += self._next(run, count - len(taken))
        if run:
            self._after[(taken or held)[-1].block_id] = run
        return taken

    def end(self, blocks: Iterable[B]) -> list[B]:
        """``blocks`` are no longer in use, nor is what was set aside behind them."""
        ended: list[B] = []
        if self._after:
            for block in blocks:
                ended += self._after.pop(block.block_id, ())
            self.num_blocks -= len(ended)
        return ended

    def dissolve(self) -> list[B]:
        """Nothing is set aside any longer; what was, the first to be handed out last."""
        blocks = [block for run in self._after.values() for block in run]
        self._after.clear()
        self.num_blocks = 0
        return blocks

    def _next(self, run: list[B], count: int) -> list[B]:
        """Take at most ``count`` blocks from the end of ``run``."""
        at = max(0, len(run) - count)
        taken = run[at:][::-1]
        del run[at:]
        self.num_blocks -= len(taken)
        return taken
