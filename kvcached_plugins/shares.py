"""The budget of an engine whose workers are on one or more devices."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvcached_plugins.hub import owed_bytes
from kvcached_plugins.settings import Settings
from kvcached_vmm.account import Account
from kvcached_vmm.driver import Driver
from kvcached_vmm.errors import DriverError, LedgerBusy, LedgerError
from kvcached_vmm.host_driver import HostDriver
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.policy import Spending
from kvcached_vmm.records import NO_LIMIT, Counters
from kvcached_vmm.units import GIB

logger = logging.getLogger("kvcached")

GPU_SHARE = 0.92
"""Of a GPU's memory, what engines share if nobody says: vLLM's own default. The rest is for
fragmentation and for what no profile sees."""

FRESH_SECONDS = 0.005
"""How old what the driver says is free may be. Asking takes 10 us on a GPU and 100 us on a host,
and milliseconds while another process starts or ends on any GPU of the machine."""

PLENTY_BYTES, PLENTY_FRESH_SECONDS = 4 * GIB, 0.05
"""If so much is free, engines cannot use it up within this time, and the answer may be this old."""

REFUSED_SECONDS = 0.05
"""How long a refusal stands if nobody writes into the ledger: an engine in a full budget would ask
in each step, at 0.2 ms each beside a serving vLLM. A neighbour that gives memory back writes; one
that is killed does not."""


def default_budget(driver: Driver, least_gpu_share: float = 0.0) -> int:
    """What engines share if nobody says: most of the GPU, or half of the host's memory."""
    total = driver.memory().total_bytes
    if driver.device == HostDriver.device:
        return total // 2
    return int(total * max(GPU_SHARE, least_gpu_share))


def join(
    settings: Settings,
    name: str,
    device: str,
    *,
    engine: str,
    default_budget_bytes: int,
    arena_bytes: int,
) -> Account:
    """Take an engine's record in the ledger of ``device``, with the terms that its user set.

    Raises:
        LedgerError: the ledger cannot be used, or the minimum is not to be had.
    """
    return Ledger.open(settings.directory, device).join(
        name,
        settings.budget_bytes,
        settings.minimum_bytes,
        settings.maximum_bytes,
        settings.weight,
        default_budget_bytes=default_budget_bytes,
        cache_bytes=settings.cache_bytes,
        engine=engine,
        arena_bytes=arena_bytes,
    )


def join_beside(
    settings: Settings, name: str, as_what: str, device: str, default_budget_bytes: int
) -> Account:
    """A record beside an engine's own, for memory that is not what it serves with."""
    return Ledger.open(settings.directory, device).join(
        f"{name} ({as_what})",
        settings.budget_bytes,
        default_budget_bytes=default_budget_bytes,
    )


class FreeBytes:
    """Free bytes of a driver, asked for again when the answer is no longer fresh."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._asked = 0.0
        self._free_bytes = 0

    def __call__(self) -> int:
        now = time.monotonic()
        plenty = self._free_bytes > PLENTY_BYTES
        if now - self._asked > (PLENTY_FRESH_SECONDS if plenty else FRESH_SECONDS):
            self._asked = now
            try:
                self._free_bytes = self._driver.memory().free_bytes
            except DriverError as error:  # nothing is known to be free: requests wait
                if self._free_bytes:
                    logger.warning("kvcached: no memory is granted for now: %s", error)
                self._free_bytes = 0
        return self._free_bytes


class _Refusal(NamedTuple):
    """That not even a unit was to be had, until when that stands, and what was written by then."""

    unit_bytes: int
    until: float
    news: list[int]


class Shares:
    """The budget of an engine whose workers are on one or more devices.

    Every worker commits the same extents, so a grant counts once per worker on each device. Sizes
    are those of each worker.

    Args:
        accounts: one for each device, and how many workers are on it.
        free_bytes: what the driver has free, for workers of this machine.
    """

    def __init__(
        self, accounts: Sequence[tuple[Account, int]], free_bytes: Callable[[], int] | None = None
    ) -> None:
        self._accounts = accounts
        self._free_bytes = free_bytes
        self._complained = self._held_up = False
        self._refusal: _Refusal | None = None
        self._fair_share_bytes: int | None = None
        self.counters = Counters()
        """For each worker; counted here as far as the budget sees it."""

    def reserve(self, wanted_bytes: int, unit_bytes: int) -> int:
        if self._is_still_refused(unit_bytes):
            self.counters.refusals += 1
            return 0
        granted = wanted_bytes
        free = self._driver_has()
        for index, (account, ranks) in enumerate(self._accounts):
            given = self._ask(account, granted * ranks, unit_bytes * ranks, free) // ranks
            for earlier, of in self._accounts[:index]:
                earlier.cancel((granted - given) * of)
            granted = given
        if granted < wanted_bytes:
            self.counters.refusals += 1
        self._refusal = None
        if not granted:
            until = time.monotonic() + REFUSED_SECONDS
            self._refusal = _Refusal(unit_bytes, until, self._news())
        return granted

    def room_bytes(self) -> int:
        """What each worker would be granted now. Grants nothing: an estimate, for others reserve
        too."""
        try:
            return max(0, min(self._room_of(account) // ranks for account, ranks in self._accounts))
        except LedgerError as error:
            self._complain(error)
            return 0

    def commit(self, granted_bytes: int, used_bytes: int, extents: int = 1) -> None:
        if used_bytes < granted_bytes:
            self._refusal = None
        self.counters.commits += extents
        for account, ranks in self._accounts:
            account.commit(granted_bytes * ranks, used_bytes * ranks)

    def cancel(self, granted_bytes: int) -> None:
        self.commit(granted_bytes, 0, 0)

    def release(self, used_bytes: int) -> None:
        self._refusal = None
        for account, ranks in self._accounts:
            account.release(used_bytes * ranks)

    def report(self, spending: Spending, wanted_bytes: int, coveted_bytes: int) -> None:
        """Tell the others what each worker's bytes are good for, and how many more it needs."""
        for account, ranks in self._accounts:
            account.report(
                spending.live_bytes * ranks,
                spending.cached_bytes * ranks,
                wanted_bytes * ranks,
                coveted_bytes=coveted_bytes * ranks,
                idle_bytes=spending.idle_bytes * ranks,
                leaving_bytes=spending.leaving_bytes * ranks,
                evictable_bytes=spending.evictable_bytes * ranks,
                ages=spending.ages,
                counters=self.counters,
            )

    def told_of(self, wanted_bytes: int, coveted_bytes: int) -> bool:
        """Whether the others know that each worker wants and covets so much."""
        for account, ranks in self._accounts:
            wanted, coveted = account.told
            if wanted < wanted_bytes * ranks:
                return False
            if wanted + coveted < (wanted_bytes + coveted_bytes) * ranks:
                return False
        return True

    def fix(self, fixed_bytes: int) -> None:
        """Tell the others what weights and activations of each worker take, for good."""
        for account, ranks in self._accounts:
            account.fix(fixed_bytes * ranks)

    def others_wait(self) -> bool:
        """Whether another engine needs memory that it does not get."""
        return any(account.others_wait() for account, _ in self._accounts)

    def others_covet(self) -> bool:
        """Whether another engine would rather have memory that we can spare than evict its own."""
        return any(account.others_covet() for account, _ in self._accounts)

    def owed_bytes(self) -> int:
        """Bytes of each worker that other engines are due now; 0 if a ledger cannot be read."""
        now = time.monotonic()
        try:
            return max(
                -(-owed_bytes(account.view(), account.slot, now) // ranks)
                for account, ranks in self._accounts
            )
        except LedgerError as error:
            self._complain(error)
            return 0

    def fair_share_bytes(self) -> int:
        """What each worker may have while others wait, if it wants all that it can get; as last
        known if a ledger cannot be read."""
        try:
            self._fair_share_bytes = min(
                account.fair_share_bytes() // ranks for account, ranks in self._accounts
            )
        except LedgerError as error:
            self._complain(error)
            if self._fair_share_bytes is None:
                return self.limit_bytes()
        return self._fair_share_bytes

    def cache_bytes(self) -> int | None:
        """What each worker's cached blocks may hold; None: no bound."""
        bounds = [
            account.terms.cache // ranks
            for account, ranks in self._accounts
            if account.terms.cache >= 0
        ]
        return min(bounds, default=None)

    def trims(self) -> int:
        """How often we were asked to give back all that we can spare."""
        return sum(account.terms.trims for account, _ in self._accounts)

    @property
    def rings(self) -> int:
        """A number that changes when somebody needs us to look."""
        return sum(account.rings for account, _ in self._accounts)

    def wait_for_bell(self, heard: int, timeout_s: float) -> int:
        """Wait until somebody needs us to look, as ``Account.wait_for_bell`` does."""
        return self._accounts[0][0].wait_for_bell(heard, timeout_s)

    def limit_bytes(self) -> int:
        """What each worker could have if no other engine were there."""
        return min(account.limit_bytes // ranks for account, ranks in self._accounts)

    def _is_still_refused(self, unit_bytes: int) -> bool:
        """Whether nothing has changed since not even one unit was to be had."""
        last = self._refusal
        if last is None or unit_bytes < last.unit_bytes or time.monotonic() > last.until:
            return False
        news = self._news()
        return news == last.news and -1 not in news

    def _news(self) -> list[int]:
        return [account.news for account, _ in self._accounts]

    def _driver_has(self) -> int:
        return NO_LIMIT if self._free_bytes is None else self._free_bytes()

    def _room_of(self, account: Account) -> int:
        view = account.view()
        own = [each for each in view.accounts if each.slot == account.slot]
        return min(
            view.free_bytes + sum(max(0, each.minimum_bytes - each.used_bytes) for each in own),
            account.limit_bytes - sum(each.used_bytes for each in own),
            self._driver_has() - sum(each.reserved_bytes for each in view.accounts),
        )

    def _ask(self, account: Account, wanted: int, unit: int, free: int) -> int:
        """A ledger that can no longer be trusted grants nothing: requests wait, nothing crashes."""
        try:
            granted = account.reserve(wanted, unit, free)
        except LedgerError as error:
            self._complain(error)
            return 0
        held_up = account.held_up
        if bool(held_up) != self._held_up:
            self._held_up = bool(held_up)
            logger.warning("kvcached: %s", held_up or "memory can be granted again.")
        return granted

    def _complain(self, error: LedgerError) -> None:
        if not self._complained and not isinstance(error, LedgerBusy):
            self._complained = True
            logger.error("kvcached: no more memory is granted: %s", error)

    def close(self) -> None:
        """Leave the ledgers."""
        for account, _ in self._accounts:
            account.close()
