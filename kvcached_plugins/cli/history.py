"""The latest readings, and what engines do per second."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from kvcached_plugins.control import Reading
from kvcached_vmm.records import AccountView


class Rates(NamedTuple):
    """What an engine does per second: extents committed and released, and bytes that it gains."""

    commits: float
    releases: float
    bytes: float


Key = tuple[str, int, float]
"""Device, slot and moment of joining: an engine's account, for good."""


class History:
    """The latest readings, and what changed between the last two."""

    def __init__(self) -> None:
        self._used: dict[str, deque[int]] = {}
        self._last: Reading | None = None
        self.now: Reading | None = None
        self.period_s = 0.0

    def add(self, reading: Reading) -> None:
        if self.now is not None:
            self.period_s = reading.at - self.now.at
        self._last, self.now = self.now, reading
        for view in reading.ledgers:
            self._used.setdefault(view.device, deque(maxlen=500)).append(view.used_bytes)

    def used(self, device: str) -> list[int]:
        """Bytes used at each reading, oldest first."""
        return list(self._used.get(device, ()))

    def rates(self) -> dict[Key, Rates]:
        """Of the engines that are in both of the last two readings."""
        if self._last is None or self.now is None or self.period_s <= 0:
            return {}
        before = accounts(self._last)
        return {
            key: Rates(
                (now.counters.commits - then.counters.commits) / self.period_s,
                (now.counters.releases - then.counters.releases) / self.period_s,
                (now.committed_bytes - then.committed_bytes) / self.period_s,
            )
            for key, now in accounts(self.now).items()
            if (then := before.get(key)) is not None
        }


def accounts(reading: Reading) -> dict[Key, AccountView]:
    return {
        key_of(view.device, account): account
        for view in reading.ledgers
        for account in view.accounts
    }


def key_of(device: str, account: AccountView) -> Key:
    return device, account.slot, account.joined
