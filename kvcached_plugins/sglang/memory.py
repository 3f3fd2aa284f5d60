"""The memory behind SGLang's KV pool: an arena, its budget, and what is about to leave it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from kvcached_plugins.refusal import Refusal
from kvcached_plugins.sglang.budget import ExtentBudget
from kvcached_plugins.sglang.pages import PageBook
from kvcached_vmm.arena import Arena
from kvcached_vmm.errors import DriverError
from kvcached_vmm.fence import Mark, Passed, Quarantine
from kvcached_vmm.tensors import StreamMarks

logger = logging.getLogger("sglang.kvcached")

PATIENCE_SECONDS = 60.0
"""How long we wait for memory that we cannot do without before the process ends."""


class AllPassed:
    """The mark of several streams: passed when each of theirs is."""

    def __init__(self, marks: Sequence[Mark]) -> None:
        self._marks = marks

    def query(self) -> bool:
        return all(mark.query() for mark in self._marks)

    def synchronize(self) -> None:
        for mark in self._marks:
            mark.synchronize()


class PoolMemory:
    """Extents come and go here. Used by the thread that runs SGLang's scheduler only.

    Args:
        arena: the address range of the pool's buffers.
        budget: what we may use.
        device: whose memory it is.
    """

    def __init__(self, arena: Arena, budget: ExtentBudget, device: torch.device) -> None:
        self.arena = arena
        self.book = PageBook(arena.extents)
        self.device = device
        self.budget = budget
        self._streams: list[Callable[[], Mark]] = []
        self._quarantine = Quarantine(self.mark)
        self.grow(1)

    def watch(self, streams: Sequence[torch.cuda.Stream]) -> None:
        """Work on ``streams`` may touch the pool, besides that on the current stream."""
        if self.device.type == "cuda":
            self._streams = [_marks_on(stream) for stream in streams]

    def mark(self) -> Mark:
        """A mark after all work that may touch the pool."""
        if self.device.type != "cuda":
            return Passed()
        current: Mark = StreamMarks(self.device)()
        return AllPassed([current, *(mark() for mark in self._streams)])

    def grow(self, extents: int) -> list[range]:
        """Commit ``extents`` more, from grants where there are some.

        Waits for memory that others hold: whoever calls has been promised it.

        Returns:
            The pages gained, in the order in which they go on the free list.
        """
        missing = extents - self.book.credit
        if missing > 0:
            self.book.credit += self._insist(missing)
            self.book.room = max(0, self.book.room - missing)
        grown = self.book.grow(extents)
        self.budget.commit(extents, self._commit(grown))
        return [self.book.pages(extent) for extent in grown]

    def leave(self, count: int) -> int:
        """Release ``count`` idle extents once the work given to the device is done; returns how
        many pages to cut off the end of the free list."""
        extents = self.book.leave(count)
        self._quarantine.put(0, extents)
        return sum(len(self.book.pages(extent)) for extent in extents)

    @property
    def leaving(self) -> int:
        """Extents whose release is under way."""
        return len(self._quarantine)

    def collect(self, wait: bool = False) -> None:
        """Release leaving extents that are quiet; with ``wait``, all of them. The budget would
        grant them again."""
        quiet = self._quarantine.take(0 if wait else -1)
        if quiet:
            self.budget.release(self.arena.decommit(quiet))
            self.book.left(quiet)
            self.book.room += len(quiet)

    def settle(self) -> None:
        """A scheduling round is over: give unused grants back. They were grantable, so they count
        as room until the budget is asked again."""
        self.budget.cancel(self.book.credit)
        self.book.room += self.book.credit
        self.book.credit = 0

    def sleep(self) -> None:
        """Give everything back, the sink's extent too. No page may be in use."""
        self.mark().synchronize()
        self.collect(wait=True)
        self.settle()
        committed = self.arena.committed
        self.budget.release(self.arena.decommit(committed))
        self.book.sleep()
        self.book.room += len(committed)

    def close(self) -> None:
        """The engine is gone."""
        self.sleep()
        self.budget.close()

    def _insist(self, extents: int) -> int:
        granted = self.budget.reserve(extents)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while granted < extents:
            short = extents - granted
            self.budget.report(0, 0, short * self.budget.extent_bytes)
            if time.monotonic() > deadline:
                raise Refusal(
                    f"the budget had no room for {short} extents of the KV cache in "
                    f"{PATIENCE_SECONDS:.0f} s; stop another engine or raise KVCACHED_BUDGET."
                )
            time.sleep(0.01)
            granted += self.budget.reserve(short)
        return granted

    def _commit(self, extents: Sequence[int]) -> int:
        """Commit, waiting for memory that the ledger granted and the driver does not have yet."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        complained = False
        while True:
            try:
                return self.arena.commit(extents)
            except DriverError as error:
                if time.monotonic() > deadline:
                    raise Refusal(
                        f"no memory for the KV cache came in {PATIENCE_SECONDS:.0f} s ({error}) "
                        "Stop another program on this device, or lower its share."
                    ) from error
                if not complained:
                    logger.warning("kvcached: waiting for memory for the KV cache: %s", error)
                    complained = True
            time.sleep(0.01)


def _marks_on(stream: torch.cuda.Stream) -> Callable[[], Mark]:
    def mark() -> Mark:
        event: Mark = stream.record_event()
        return event

    return mark
