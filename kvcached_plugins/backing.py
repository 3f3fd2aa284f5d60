"""The memory behind an engine's KV cache, over a driver whose calls may fail."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator

from kvcached_plugins.leftovers import Leftovers
from kvcached_plugins.refusal import Refusal
from kvcached_vmm.account import Account
from kvcached_vmm.arena import Arena
from kvcached_vmm.errors import DriverError

logger = logging.getLogger("kvcached")

PATIENCE_SECONDS = 60.0
"""How long an engine waits for memory that the ledger granted and the driver does not have."""


class Backing:
    """Commits and releases the extents of ``arena``. Safe to use from several threads; a ``with``
    keeps the others out, and at its end the ledger knows what is left over.

    What the driver does not take back stays in the ledger, in an account of its own, and is tried
    again until it does: whoever released it need not know.

    Args:
        arena: whose.
        join: takes a record in the ledger for what could not be given back.
    """

    def __init__(self, arena: Arena, join: Callable[[], Account]) -> None:
        self.arena = arena
        self.driver_seconds = 0.0
        """How long driver calls have taken so far."""
        self._lock = threading.RLock()
        self._leftovers = Leftovers(arena, self._lock, join)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        try:
            self._leftovers.look()
        finally:
            self._lock.release()

    def commit(self, extents: Collection[int], afford: Callable[[], None] = lambda: None) -> int:
        """Back ``extents`` with memory, waiting for what others hold; the process ends if none
        comes. All at once, or else one after the other: what has been had is kept.

        Args:
            extents: which.
            afford: called first, and again while it raises ``DriverError``.

        Returns:
            Bytes that they needed.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        pause, complained, afforded = 0.001, False, False
        parts = [extents]
        before = self.arena.needed_bytes
        while True:
            try:
                with self:
                    if not afforded:
                        afford()
                        afforded = True
                    with self._timed():
                        for part in parts:
                            self.arena.commit(part)
                return self.arena.needed_bytes - before
            except DriverError as error:
                parts = [{extent} for extent in sorted(extents)]
                if time.monotonic() > deadline:
                    # An engine may only log an exception here, and others then wait for it for
                    # ever: end the process.
                    raise Refusal(
                        f"no memory for the KV cache came in {PATIENCE_SECONDS:.0f} s ({error}) "
                        "Stop another program on this device, or lower its share."
                    ) from error
                if not complained:
                    logger.warning("kvcached: waiting for memory for the KV cache: %s", error)
                    complained = True
            time.sleep(pause)
            pause = min(pause * 2, 0.1)

    def commit_if_possible(self, extents: Collection[int]) -> None:
        """Back ``extents`` with memory; if the driver refuses, whoever needs them asks again."""
        with contextlib.suppress(DriverError), self, self._timed():
            self.arena.commit(extents)

    def release(self, extents: Collection[int]) -> int:
        """Take the memory of ``extents`` away; nobody uses it any more.

        Returns:
            Bytes that they needed, whether the driver has taken them back or not.
        """
        if not extents:
            return 0
        with self:
            before = self.arena.needed_bytes
            with self._timed():
                self.arena.decommit(extents)
            return before - self.arena.needed_bytes

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.driver_seconds += time.perf_counter() - began
