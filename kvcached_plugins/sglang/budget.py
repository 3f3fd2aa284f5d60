"""What one SGLang process may use of one device, in whole extents. All dealings with the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvcached_plugins.hub import owed_bytes, plugins
from kvcached_plugins.settings import Settings
from kvcached_vmm.ledger import Account, Ledger
from kvcached_vmm.records import AGES, Counters

EVERYTHING = 1 << 62


class ExtentBudget:
    """An account of the ledger that counts in extents.

    Args:
        account: of this process on this device.
        extent_bytes: the most bytes that an extent needs.
        free_bytes: what the driver says is free, whoever else is on the device.
    """

    def __init__(self, account: Account, extent_bytes: int, free_bytes: Callable[[], int]) -> None:
        self.extent_bytes = extent_bytes
        self.used_bytes = 0
        """Bytes committed or granted."""
        self.counters = Counters()
        self._account = account
        self._free_bytes = free_bytes
        self._trims = account.terms.trims
        self._heard = account.rings
        self._waited_at = 0.0

    @classmethod
    def join(
        cls,
        settings: Settings,
        device: str,
        name: str,
        default_budget_bytes: int,
        extent_bytes: int,
        arena_bytes: int,
        free_bytes: Callable[[], int],
    ) -> ExtentBudget:
        """Take a record in the ledger of ``device``.

        Raises:
            LedgerError: the ledger cannot be used, or the minimum is not to be had.
        """
        plugins()  # so that the first who waits does not wait for other packages to load
        account = Ledger.open(settings.directory, device).join(
            name,
            settings.budget_bytes,
            settings.minimum_bytes,
            settings.maximum_bytes,
            settings.weight,
            default_budget_bytes=default_budget_bytes,
            cache_bytes=settings.cache_bytes,
            engine="sglang",
            arena_bytes=arena_bytes,
        )
        return cls(account, extent_bytes, free_bytes)

    @property
    def limit_bytes(self) -> int:
        """What this process could have if no other engine were there."""
        return self._account.limit_bytes

    def reserve(self, extents: int) -> int:
        """Grant up to ``extents``; returns how many."""
        if extents <= 0:
            return 0
        size = self.extent_bytes
        granted = self._account.reserve(extents * size, size, self._free_bytes()) // size
        self.used_bytes += granted * size
        if granted < extents:
            self.counters.refusals += 1
        return granted

    def commit(self, extents: int, used_bytes: int) -> None:
        """``extents`` granted ones are resident; they took ``used_bytes`` in all."""
        self._account.commit(extents * self.extent_bytes, used_bytes)
        if used_bytes:
            self.counters.commits += extents
        self.used_bytes += used_bytes - extents * self.extent_bytes

    def cancel(self, extents: int) -> None:
        """Give grants back unused."""
        if extents:
            self.commit(extents, 0)

    def release(self, used_bytes: int) -> None:
        """Memory is no longer in use."""
        if used_bytes:
            self._account.release(used_bytes)
            self.counters.releases += -(-used_bytes // self.extent_bytes)
            self.used_bytes -= used_bytes

    def room(self) -> int:
        """How many extents would be granted now. Grants nothing: an estimate, for others reserve
        too."""
        view = self._account.view()
        promised = sum(
            max(0, each.minimum_bytes - each.used_bytes)
            for each in view.accounts
            if each.slot == self._account.slot
        )
        room = min(
            view.free_bytes + promised,
            self.limit_bytes - self.used_bytes,
            self._free_bytes() - sum(each.reserved_bytes for each in view.accounts),
        )
        return max(0, room // self.extent_bytes)

    @property
    def cache_bytes(self) -> int | None:
        """What cached pages may hold; None: no bound."""
        bound = self._account.terms.cache
        return None if bound < 0 else bound

    def rung(self) -> bool:
        """Whether somebody has asked for attention since ``owed_bytes`` was last called."""
        return self._account.rings != self._heard

    def others_need(self) -> bool:
        """Whether another engine could do with more."""
        return self._account.others_wait() or self._account.others_covet()

    def owed_bytes(self) -> int:
        """Bytes to give back: what other engines are due, what we use beyond our own limit, or
        everything if somebody has asked for that."""
        self._heard = self._account.rings
        owed = max(0, self.used_bytes - self.limit_bytes)
        if self.others_need():
            view = self._account.view()
            owed = max(owed, owed_bytes(view, self._account.slot, time.monotonic()))
        trims = self._account.terms.trims
        if trims != self._trims:
            self._trims = trims
            owed = EVERYTHING
        return owed

    def report(
        self,
        live_bytes: int,
        cached_bytes: int,
        wanted_bytes: int,
        idle_bytes: int = 0,
        leaving_bytes: int = 0,
        used_at: float = 0.0,
    ) -> None:
        """Tell the others what our bytes are good for, and how many more we need.

        ``used_at`` is when cached pages were last used, on the monotonic clock.
        """
        now = time.monotonic()
        if self._waited_at:
            self.counters.wait_seconds += now - self._waited_at
        elif wanted_bytes:
            self.counters.waits += 1
        self._waited_at = now if wanted_bytes else 0.0
        self._account.report(
            live_bytes,
            cached_bytes,
            wanted_bytes,
            idle_bytes=idle_bytes,
            leaving_bytes=leaving_bytes,
            evictable_bytes=cached_bytes,
            ages=(used_at,) * AGES,
            counters=self.counters,
        )

    def fix(self, fixed_bytes: int) -> None:
        """Tell the others what weights and activations take, for good."""
        self._account.fix(fixed_bytes)

    def close(self) -> None:
        """Leave the ledger."""
        self._account.close()
