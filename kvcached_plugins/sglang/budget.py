"""What one SGLang process may use of one device, in whole extents. All dealings with the ledger."""

from __future__ import annotations

import os
from collections.abc import Callable

from kvcached_plugins.settings import Settings
from kvcached_vmm.ledger import Account, Ledger


class ExtentBudget:
    """An account of the ledger that counts in extents.

    Args:
        account: of this process on this device.
        name: what the account is called; with the process id it says which record is ours.
        extent_bytes: the most bytes that an extent needs.
        free_bytes: what the driver says is free, whoever else is on the device.
        fixed_counts: whether weights and activations count against the budget too.
    """

    def __init__(
        self,
        account: Account,
        name: str,
        extent_bytes: int,
        free_bytes: Callable[[], int],
        fixed_counts: bool,
    ) -> None:
        self.extent_bytes = extent_bytes
        self.used_bytes = 0
        """Bytes committed or granted."""
        self._account = account
        self._own = (os.getpid(), name)
        self._free_bytes = free_bytes
        self._fixed_counts = fixed_counts

    @classmethod
    def join(
        cls,
        settings: Settings,
        device: str,
        name: str,
        default_budget_bytes: int,
        extent_bytes: int,
        free_bytes: Callable[[], int],
    ) -> ExtentBudget:
        """Take a record in the ledger of ``device``.

        Raises:
            LedgerError: the ledger cannot be used, or the minimum is not to be had.
        """
        account = Ledger.open(settings.directory, device).join(
            name,
            settings.budget_bytes,
            settings.minimum_bytes,
            settings.maximum_bytes,
            default_budget_bytes=default_budget_bytes,
        )
        return cls(account, name, extent_bytes, free_bytes, settings.budget_bytes is None)

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
        return granted

    def commit(self, extents: int, used_bytes: int) -> None:
        """``extents`` granted ones are resident; they took ``used_bytes`` in all."""
        self._account.commit(extents * self.extent_bytes, used_bytes)
        self.used_bytes += used_bytes - extents * self.extent_bytes

    def cancel(self, extents: int) -> None:
        """Give grants back unused."""
        if extents:
            self.commit(extents, 0)

    def release(self, used_bytes: int) -> None:
        """Memory is no longer in use."""
        if used_bytes:
            self._account.release(used_bytes)
            self.used_bytes -= used_bytes

    def room(self) -> int:
        """How many extents would be granted now. Grants nothing: an estimate, for others reserve
        too."""
        view = self._account.view()
        others = own_fixed = 0
        for other in view.accounts:
            fixed = other.fixed_bytes if self._fixed_counts else 0
            if (other.pid, other.name) == self._own:
                own_fixed = fixed
            else:
                taken = other.committed_bytes + other.reserved_bytes
                others += max(taken, other.minimum_bytes) + fixed
        room = min(
            view.budget_bytes - others - own_fixed - self.used_bytes,
            self.limit_bytes - self.used_bytes,
            self._free_bytes() - sum(each.reserved_bytes for each in view.accounts),
        )
        return max(0, room // self.extent_bytes)

    def pressure_bytes(self) -> int:
        """Bytes that other engines wait for, or that we use beyond our own limit."""
        over = self.used_bytes - self.limit_bytes
        return max(0, over, self._account.wanted_by_others())

    def report(self, live_bytes: int, cached_bytes: int, wanted_bytes: int) -> None:
        """Tell the others what our bytes are good for, and how many more we need."""
        self._account.report(live_bytes, cached_bytes, wanted_bytes)

    def fix(self, fixed_bytes: int) -> None:
        """Tell the others what weights and activations take, for good."""
        self._account.fix(fixed_bytes)

    def close(self) -> None:
        """Leave the ledger."""
        self._account.close()
