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
        self.asked = False
        """Whether the next blocks are for a request that has a run, or wants one."""
        self.for_others = 0
        """Free blocks that are set aside for other requests than that."""
        self._span = blocks_per_extent
        self._fresh = fresh
        self._after: dict[int, list[B]] = {}
        self._held: Sequence[B] = ()

    def extents_for(self, held: Sequence[B], count: int) -> int:
        """How many more extents a request wants that holds the blocks ``held`` and is about to get
        ``count`` more; 0 if it is too short for extents of its own, or has a run that is enough."""
        self._held = held
        run = self._after.get(held[-1].block_id, ()) if held else ()
        self.for_others = self.num_blocks - len(run)
        is_long = len(held) + count >= self._span
        self.asked = is_long or bool(run)
        return -(-(count - len(run)) // self._span) if is_long and count > len(run) else 0

    def take(self, count: int) -> list[B]:
        """Hand out at most ``count`` blocks to the request that ``extents_for`` was last asked for;
        the others it is to share with short requests."""
        held, self.asked = self._held, False
        run = self._after.pop(held[-1].block_id, None) if held else None
        if run and count == 1:
            taken = [run.pop()]
            self.num_blocks -= 1
        else:
            taken, run = self._begin(run or [], count, len(held))
        if run:
            self._after[(taken or held)[-1].block_id] = run
        return taken

    def end(self, blocks: Iterable[B]) -> list[B]:
        """``blocks`` are no longer in use, nor is what was set aside behind them."""
        ended: list[B] = []
        if after := self._after:
            for last in [block.block_id for block in blocks if block.block_id in after]:
                ended += after.pop(last)
            self.num_blocks -= len(ended)
        return ended

    def dissolve(self) -> list[B]:
        """Nothing is set aside any longer; what was, the first to be handed out last."""
        blocks = [block for run in self._after.values() for block in run]
        self._after.clear()
        self.num_blocks = 0
        return blocks

    def _begin(self, run: list[B], count: int, held: int) -> tuple[list[B], list[B]]:
        """At most ``count`` blocks of ``run`` and, if the request is long, of further extents; and
        the run that is left then."""
        taken: list[B] = []
        self.num_blocks -= len(run)
        while True:
            at = max(0, len(run) - (count - len(taken)))
            taken += reversed(run[at:])
            run = run[:at]
            if len(taken) == count or held + count < self._span:
                break
            if not (run := list(self._fresh())):
                break
        self.num_blocks += len(run)
        return taken, run
