"""An engine as a tenant of the budget: what it tells the others, and what it owes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from kvcached_plugins.shares import Shares
from kvcached_vmm.admission import Admission
from kvcached_vmm.policy import Spending

ASK_SECONDS = 0.005
"""How often an engine that takes steps looks what it owes while others wait: an answer takes a step
anyway."""

LOOK_SECONDS = 0.05
"""How often it looks by itself while nobody waits: the ledger's bell tells when that changes, and
when others would rather have more."""

REPORT_SECONDS = 0.05
"""How often the ledger learns what our bytes are good for."""

HOLD_SECONDS = 0.1
"""How long requests that still wait count as waiting for memory after one was refused: the engine
does not try to admit one in each step."""

CALM_SECONDS = 1.0
"""How long an engine keeps to its fair share after others have waited, so that it does not take at
once what they are about to ask for again."""

QUEUE_LOOK = 256
"""How many waiting requests are looked at to tell what is wanted."""

EVERYTHING = 1 << 62


class Spender(Protocol):
    """What a tenant needs to know of an engine's pool. Sizes are in bytes and those of one worker.

    Attributes:
        admission: which requests may begin, and what was asked for in vain.
    """

    admission: Admission

    @property
    def committed_bytes(self) -> int: ...

    def spending(self) -> Spending: ...

    def look_at_cache(self) -> None:
        """Bring up to date what ``spending`` says of the cache."""
        ...

    def reclaim(self, wanted_bytes: int) -> list[int]:
        """Extents to release now, of ``wanted_bytes`` or all that can be spared."""
        ...

    def bound_cache(self, cache_bytes: int | None) -> None:
        """Cached blocks may hold this much from now on; None: no bound."""
        ...


class Tenant:
    """Keeps a pool within what the ledger says, from moment to moment.

    All methods want the pool's lock held.

    Args:
        shares: the engine's part of the budget.
        pool: what it spends it on.
        queued_bytes: what the requests need that wait; asked for only after one was refused.
    """

    def __init__(self, shares: Shares, pool: Spender, queued_bytes: Callable[[], int]) -> None:
        self._queued_bytes = queued_bytes
        self._shares = shares
        self._pool = pool
        self._trims = shares.trims()
        self._cache_bytes = shares.cache_bytes()
        pool.admission.limit_bytes = shares.limit_bytes()
        self._next_look = self._waiting_since = 0.0
        self.reported_at = 0.0
        """When the others were last told how we are, on the monotonic clock."""
        self.heard = -1
        """What ``Shares.rings`` was when ``owed`` last looked."""
        self._calm_at = 0.0
        self._short_at = -HOLD_SECONDS

    def owed(self, urgent: bool = False) -> list[int]:
        """Extents to release for others, or because our own terms have changed.

        Args:
            urgent: look now, however recent the last look is.
        """
        now = time.monotonic()
        shares, pool = self._shares, self._pool
        rings = shares.rings
        if now < self._next_look and rings == self.heard and not urgent:
            return []
        self.heard = rings
        pool.admission.limit_bytes = shares.limit_bytes()
        self._cache_bytes = shares.cache_bytes()
        pool.bound_cache(self._cache_bytes)
        owed = pool.committed_bytes - pool.admission.limit_bytes
        if owed > 0:
            owed -= pool.spending().leaving_bytes
        waits = shares.others_wait()
        self._next_look = now + (ASK_SECONDS if waits else LOOK_SECONDS)
        if waits:
            self._calm_at = now + CALM_SECONDS
            pool.admission.share_bytes = shares.fair_share_bytes()
        elif now > self._calm_at:
            pool.admission.share_bytes = None
        if waits or shares.others_covet():
            pool.look_at_cache()
            self.report(force=True)
            owed = max(owed, shares.owed_bytes())
        trims = shares.trims()
        if trims != self._trims:
            self._trims = trims
            owed = EVERYTHING
        return pool.reclaim(owed) if owed > 0 else []

    def must_answer(self) -> bool:
        """Whether ``owed`` may have something to say. Cheap, and wants no lock."""
        shares, pool = self._shares, self._pool
        return (
            shares.others_wait()
            or shares.others_covet()
            or shares.trims() != self._trims
            or shares.limit_bytes() != pool.admission.limit_bytes
            or shares.cache_bytes() != self._cache_bytes
        )

    def report(self, force: bool = False) -> None:
        """Tell the others how we are: at once if we need more than they know, else now and then."""
        admission, now = self._pool.admission, time.monotonic()
        wanted, coveted = admission.shortage()
        coveted = min(coveted, max(0, admission.limit_bytes - self._pool.committed_bytes))
        if wanted:
            self._short_at = now
        more = bool(wanted or coveted) and not self._shares.told_of(wanted, coveted)
        if not (force or more or now - self.reported_at >= REPORT_SECONDS):
            return
        if more:
            self._pool.look_at_cache()  # what we could evict instead decides what others give us
        self.reported_at = now
        if now - self._short_at < HOLD_SECONDS:
            wanted = max(wanted, self._queued_bytes())
        counters = self._shares.counters
        if self._waiting_since:
            counters.wait_seconds += now - self._waiting_since
        elif wanted:
            counters.waits += 1
        self._waiting_since = now if wanted else 0.0
        rings = self._shares.rings
        self._shares.report(self._pool.spending(), wanted, coveted)
        if rings == self.heard:
            self.heard = self._shares.rings  # if it has rung since, it was us
