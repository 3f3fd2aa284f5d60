"""The memory behind SGLang's KV pool: an arena, its budget, and what is about to leave it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

import torch

from kvcached_plugins.backing import PATIENCE_SECONDS, Backing
from kvcached_plugins.refusal import Refusal
from kvcached_plugins.sglang.pages import PageBook
from kvcached_plugins.shares import Shares
from kvcached_vmm.account import Account
from kvcached_vmm.arena import Arena
from kvcached_vmm.fence import Mark, Passed, Quarantine
from kvcached_vmm.policy import Spending
from kvcached_vmm.tensors import StreamMarks

NOTHING = Spending(0, 0, 0, 0, 0, ())
"""What an engine spends that has no memory yet."""


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
        shares: what we may use.
        device: whose memory it is.
        name: how tools call the engine.
        join: takes a record in the ledger for what the driver does not take back.

    Attributes:
        unit_bytes: the most bytes that an extent needs; grants are so large.
    """

    def __init__(
        self,
        arena: Arena,
        shares: Shares,
        device: torch.device,
        name: str,
        join: Callable[[], Account],
    ) -> None:
        self.arena = arena
        self.name = name
        self.book = PageBook(arena.extents)
        self.device = device
        self.shares = shares
        self.unit_bytes = arena.extents.largest_bytes
        self._backing = Backing(arena, join)
        self._owed_at: dict[int, float] = {}
        self._streams: list[Callable[[], Mark]] = []
        self._quarantine = Quarantine(self.mark)
        self.grow(1)

    def watch(self, streams: Sequence[torch.cuda.Stream]) -> None:
        """Work on ``streams`` may touch the pool, besides that on the current stream."""
        if self.device.type == "cuda":
            self._streams = [StreamMarks(self.device, stream) for stream in streams]

    def mark(self) -> Mark:
        """A mark after all work that may touch the pool."""
        if self.device.type != "cuda":
            return Passed()
        current: Mark = StreamMarks(self.device)()
        return AllPassed([current, *(mark() for mark in self._streams)])

    def reserve(self, extents: int) -> int:
        """Ask the budget for up to ``extents``; returns how many it granted."""
        if extents <= 0:
            return 0
        return self.shares.reserve(extents * self.unit_bytes, self.unit_bytes) // self.unit_bytes

    def cancel(self, extents: int) -> None:
        """Give grants back unused."""
        if extents:
            self.shares.cancel(extents * self.unit_bytes)

    def room(self) -> int:
        """How many extents the budget would grant now; an estimate."""
        return self.shares.room_bytes() // self.unit_bytes

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
        used = self._backing.commit(grown)
        self.shares.commit(extents * self.unit_bytes, used, extents)
        self.shares.counters.driver_seconds = self._backing.driver_seconds
        return [self.book.pages(extent) for extent in grown]

    def leave(self, count: int, owed: bool = False) -> int:
        """Release ``count`` idle extents once the work given to the device is done, as ``owed`` to
        others; returns how many pages to cut off the end of the free list."""
        extents = self.book.leave(count)
        if owed:
            self._owed_at.update(dict.fromkeys(extents, time.monotonic()))
        self._quarantine.put(0, extents)
        return sum(len(self.book.pages(extent)) for extent in extents)

    @property
    def leaving(self) -> int:
        """Extents whose release is under way."""
        return len(self._quarantine)

    def collect(self, wait: bool = False) -> None:
        """Release leaving extents that are quiet; with ``wait``, all of them."""
        quiet = self._quarantine.take(0 if wait else -1)
        if quiet:
            self._release(quiet)
            self.book.left(quiet)

    def settle(self) -> None:
        """A scheduling round is over: give unused grants back. They were grantable, so they count
        as room until the budget is asked again."""
        self.cancel(self.book.credit)
        self.book.room += self.book.credit
        self.book.credit = 0

    def sleep(self) -> None:
        """Give everything back, the sink's extent too. No page may be in use."""
        self.mark().synchronize()
        self.collect(wait=True)
        self.settle()
        self._release(self.arena.committed)
        self.book.sleep()

    def close(self) -> None:
        """The engine is gone."""
        self.sleep()
        self.shares.close()

    def _insist(self, extents: int) -> int:
        granted = self.reserve(extents)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while granted < extents:
            short = extents - granted
            self.shares.report(NOTHING, short * self.unit_bytes, 0)
            if time.monotonic() > deadline:
                raise Refusal(
                    f"the budget had no room for {short} extents of the KV cache in "
                    f"{PATIENCE_SECONDS:.0f} s; stop another engine or raise KVCACHED_BUDGET."
                )
            time.sleep(0.01)
            granted += self.reserve(short)
        return granted

    def _release(self, extents: Collection[int]) -> None:
        """The memory of ``extents`` goes; the budget would grant it again."""
        released = self._backing.release(extents)
        self.shares.release(released)
        self.book.room += len(extents)
        counters, now = self.shares.counters, time.monotonic()
        counters.releases += len(extents)
        owed = [self._owed_at.pop(each) for each in extents if each in self._owed_at]
        if owed:
            counters.reclaims += 1
            counters.reclaimed_bytes += released * len(owed) // len(extents)
            counters.reclaim_seconds += now - min(owed)
        counters.driver_seconds = self._backing.driver_seconds
