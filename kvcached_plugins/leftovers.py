"""Memory that a driver does not take back: the ledger knows of it, and it is tried again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from kvcached_vmm.account import Account
from kvcached_vmm.arena import Arena
from kvcached_vmm.errors import LedgerError
from kvcached_vmm.units import format_size

logger = logging.getLogger("kvcached")

RETRY_SECONDS = 0.2


class Leftovers:
    """What ``arena`` could not give back so far, in an account of its own.

    An engine counts an extent as released when it has ordered that: what the driver then does not
    take back would be granted to somebody else and be missing there.

    Args:
        arena: whose.
        lock: what its other users hold while they use it.
        join: takes a record in the ledger.
    """

    def __init__(self, arena: Arena, lock: threading.RLock, join: Callable[[], Account]) -> None:
        self._arena = arena
        self._lock = lock
        self._join = join
        self._account: Account | None = None
        self._told_bytes = 0
        self._retrying = False

    def look(self) -> None:
        """Tell the ledger what is left over now; called with the lock held. Cheap if nothing is."""
        kept = self._arena.kept_bytes
        if kept == self._told_bytes:
            return
        if not self._retrying:
            self._retrying = True
            threading.Thread(target=self._retry, name="kvcached-leftovers", daemon=True).start()
        self._told_bytes = kept
        self._tell()

    def _tell(self) -> None:
        kept = self._told_bytes
        try:
            if kept:
                self._account = self._account or self._join()
                self._account.hold(kept)
            elif self._account is not None:
                self._account.close()
                self._account = None
        except LedgerError as error:
            logger.warning(
                "kvcached: the ledger does not know that the driver keeps %s: %s",
                format_size(kept),
                error,
            )

    def _retry(self) -> None:
        """Runs until the driver has taken everything back."""
        while True:
            time.sleep(RETRY_SECONDS)
            with self._lock:
                self._arena.retry()
                self.look()
                if not self._told_bytes:
                    self._retrying = False
                    return
                if self._account is None or self._account.is_late:
                    self._tell()
