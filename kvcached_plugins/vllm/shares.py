"""The budget of an engine whose workers are on one or more devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcached_vmm.ledger import Account
from kvcached_vmm.units import LARGEST


class Shares:
    """The budget of an engine whose workers are on one or more devices.

    Every worker commits the same extents, so a grant counts once per worker on each device.
    """

    def __init__(
        self, accounts: Sequence[tuple[Account, int]], free_bytes: Callable[[], int] | None = None
    ) -> None:
        self._accounts = accounts
        self._free_bytes = free_bytes

    def reserve(self, wanted_bytes: int, unit_bytes: int) -> int:
        granted = wanted_bytes
        free = LARGEST if self._free_bytes is None else self._free_bytes()
        for index, (account, ranks) in enumerate(self._accounts):
            given = account.reserve(granted * ranks, unit_bytes * ranks, free) // ranks
            for earlier, of in self._accounts[:index]:
                earlier.cancel((granted - given) * of)
            granted = given
        return granted

    def commit(self, granted_bytes: int, used_bytes: int) -> None:
        for account, ranks in self._accounts:
            account.commit(granted_bytes * ranks, used_bytes * ranks)

    def cancel(self, granted_bytes: int) -> None:
        self.commit(granted_bytes, 0)

    def release(self, used_bytes: int) -> None:
        for account, ranks in self._accounts:
            account.release(used_bytes * ranks)

    def report(self, live_bytes: int, cached_bytes: int, wanted_bytes: int) -> None:
        for account, ranks in self._accounts:
            account.report(live_bytes * ranks, cached_bytes * ranks, wanted_bytes * ranks)

    def wanted_by_others(self) -> int:
        """Bytes of each worker that would help other engines out."""
        return max(-(-account.wanted_by_others() // ranks) for account, ranks in self._accounts)

    def limit_bytes(self) -> int:
        """What each worker could have if no other engine were there."""
        return min(account.limit_bytes // ranks for account, ranks in self._accounts)

    def close(self) -> None:
        for account, _ in self._accounts:
            account.close()
