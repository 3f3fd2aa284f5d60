"""The ledger: one small mapped file per device, in which engines agree on who may use how much.

An engine joins with an ``Account``. It reserves bytes before it commits memory, so that the sum of
what is reserved and committed never exceeds the budget, whatever the interleaving. A lock on the
header serialises grants; a lock on each record shows that its owner is alive. Both vanish with the
process that held them, and with them whatever it had: a record whose lock is free is collected by
whoever looks next.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvcached_vmm.errors import LedgerError
from kvcached_vmm.locks import (
    FileMutex,
    is_locked,
    open_private,
    private_directory,
    try_lock,
    unlock,
)
from kvcached_vmm.units import format_size

_MAGIC = b"KVLEDGER"
_VERSION = 1
_SLOTS = 256
_HEADER = struct.Struct("<8sIIqII")
"""Magic, version, slots, budget in bytes, whether a user set it, records ever used."""
_RECORD = struct.Struct("<qd64sqqdqqqqqqd")
"""See ``_Record``. Process id 0: nobody's."""
_USE = struct.Struct("<qqqqqqd")
_USE_AT = _RECORD.size - _USE.size
_GRANT = struct.Struct("<q72xqq8xqqq128x")
"""A record of ``_SPACE`` bytes as far as granting looks at it, for one pass over all of them."""
_SPACE = 256
"""Bytes of the header and of each record, with room to grow."""
_SIZE = _SPACE * (1 + _SLOTS)
_NO_LIMIT = 1 << 62


class _Record(NamedTuple):
    pid: int
    joined: float
    name: bytes
    minimum: int
    maximum: int
    weight: float
    committed: int
    reserved: int
    fixed: int
    live: int
    cached: int
    wanted: int
    waiting_since: float


@dataclass(frozen=True)
class AccountView:
    """One engine in the ledger; sizes in bytes, times in seconds since the epoch.

    ``waiting_since`` is 0 while ``wanted_bytes`` is."""

    name: str
    pid: int
    joined: float
    minimum_bytes: int
    maximum_bytes: int
    weight: float
    committed_bytes: int
    reserved_bytes: int
    fixed_bytes: int
    live_bytes: int
    cached_bytes: int
    wanted_bytes: int
    waiting_since: float


@dataclass(frozen=True)
class LedgerView:
    """The ledger at one moment."""

    device: str
    budget_bytes: int
    accounts: tuple[AccountView, ...]

    @property
    def used_bytes(self) -> int:
        """What is committed or reserved, by all."""
        return sum(account.committed_bytes + account.reserved_bytes for account in self.accounts)


class Ledger:
    """The ledger of one device. An open ledger serves one account: locks belong to the open file.

    Safe to use from several threads.
    """

    def __init__(self, device: str, fd: int) -> None:
        self.device = device
        self._fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._threads = threading.Lock()
        self._processes = FileMutex(fd)
        self._own: int | None = None
        _open_ledgers.add(self)

    @classmethod
    def open(cls, directory: str | Path, device: str) -> Ledger:
        """Open the ledger of ``device`` in ``directory``, making both if need be.

        Raises:
            LedgerError: the directory or file is not ours alone, or is not a ledger we understand.
        """
        path = private_directory(directory) / f"{device}.ledger"
        fd = open_private(path)
        try:
            with FileMutex(fd):
                _make_or_check(path, fd)
            return cls(device, fd)
        except OSError as error:
            os.close(fd)
            raise LedgerError(f"The ledger {path} cannot be used: {error.strerror}.") from error
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Close the file; an account that was opened on it ends, and its bytes are free."""
        with self._threads:
            self._close()

    def snapshot(self) -> LedgerView:
        """Who is there and what they use. Records of dead processes are collected on the way."""
        with self._threads, self._processes:
            self._collect()
            accounts = tuple(_view(self._record(slot)) for slot in self._used())
            return LedgerView(self.device, self._header()[3], accounts)

    def join(
        self,
        name: str,
        budget_bytes: int | None,
        minimum_bytes: int = 0,
        maximum_bytes: int | None = None,
        weight: float = 1.0,
        default_budget_bytes: int = 0,
    ) -> Account:
        """Take a record for this process.

        Args:
            name: how people call the engine, at most 63 bytes.
            budget_bytes: what all engines on the device may use together; None: what is set.
            minimum_bytes: never granted to others.
            maximum_bytes: never granted to us beyond it; None: no limit but the budget.
            weight: share of the budget under pressure, against the others' weights.
            default_budget_bytes: the budget if no user sets one; fixed bytes count against it.

        Raises:
            LedgerError: full, another budget in use, or the minimum is not to be had.
        """
        with self._threads, self._processes:
            if self._own is not None:
                raise ValueError("an open ledger serves one account")
            self._collect()
            used = list(self._used())
            budget = self._header()[3]
            if not used:
                budget = budget_bytes or default_budget_bytes
                self._map[16:28] = struct.pack("<qI", budget, budget_bytes is not None)
            elif budget_bytes is not None and budget_bytes != budget:
                raise LedgerError(
                    f"KVCACHED_BUDGET is {format_size(budget_bytes)}, but engines that run on "
                    f"{self.device} share {format_size(budget)}; use that value or stop them first."
                )
            promised = sum(self._record(slot).minimum for slot in used)
            if promised + minimum_bytes > budget:
                raise LedgerError(
                    f"KVCACHED_MIN of {format_size(minimum_bytes)} cannot be guaranteed: "
                    f"{format_size(promised)} of the budget of {format_size(budget)} on "
                    f"{self.device} are promised to other engines; lower it."
                )
            free = (slot for slot in range(_SLOTS) if not self._record(slot).pid)
            slot = next((slot for slot in free if try_lock(self._fd, 1 + slot)), None)
            if slot is None:
                raise LedgerError(f"The ledger of {self.device} is full: {_SLOTS} engines use it.")
            maximum = _NO_LIMIT if maximum_bytes is None else maximum_bytes
            label = name.encode(errors="replace")[:63]
            who = (os.getpid(), time.time(), label, minimum_bytes, maximum, weight)
            _RECORD.pack_into(self._map, _SPACE * (1 + slot), *who, 0, 0, 0, 0, 0, 0, 0.0)
            self._map[28:32] = struct.pack("<I", max(self._header()[5], slot + 1))
            self._own = slot
            return Account(self, slot)

    def _header(self) -> tuple[bytes, int, int, int, int, int]:
        return _HEADER.unpack_from(self._map)

    def _record(self, slot: int) -> _Record:
        return _Record._make(_RECORD.unpack_from(self._map, _SPACE * (1 + slot)))

    def _used(self) -> Iterator[int]:
        records = range(min(self._header()[5], _SLOTS))
        return (slot for slot in records if self._record(slot).pid)

    def _collect(self) -> None:
        """Free the records whose owners are gone: nobody holds their lock."""
        for slot in self._used():
            if slot != self._own and not is_locked(self._fd, 1 + slot):
                self._erase(slot)

    def _erase(self, slot: int) -> None:
        at = _SPACE * (1 + slot)
        self._map[at : at + _SPACE] = bytes(_SPACE)

    def _close(self) -> None:
        if self._fd >= 0:
            self._map.close()
            os.close(self._fd)
            self._fd = -1


class Account:
    """One engine's record. Made by ``Ledger.join``; gone when the process is, or by ``close``."""

    def __init__(self, ledger: Ledger, slot: int) -> None:
        self._ledger = ledger
        self._slot = slot
        self._at = _SPACE * (1 + slot) + _USE_AT

    @property
    def budget_bytes(self) -> int:
        """What all engines on the device may use together."""
        return self._ledger._header()[3]

    @property
    def limit_bytes(self) -> int:
        """What this engine may use when it is alone."""
        return min(self._ledger._record(self._slot).maximum, self.budget_bytes)

    def reserve(self, wanted_bytes: int, unit_bytes: int = 1, free_bytes: int = _NO_LIMIT) -> int:
        """Grant up to ``wanted_bytes``, in whole units, from what nobody uses or was promised.

        Args:
            wanted_bytes: how much is wanted.
            unit_bytes: grants are multiples of this.
            free_bytes: what the driver says is free, whoever else may be on the device.

        Returns:
            Bytes granted, maybe 0. They count as used until committed or cancelled.
        """
        ledger = self._ledger
        with ledger._threads, ledger._processes:
            grant = self._grant(wanted_bytes, unit_bytes, free_bytes)
            if grant < wanted_bytes:
                ledger._collect()
                grant = self._grant(wanted_bytes, unit_bytes, free_bytes)
            if grant:
                self._add(reserved=grant)
            return grant

    def commit(self, granted_bytes: int, used_bytes: int) -> None:
        """Turn ``granted_bytes`` of grants into ``used_bytes`` of memory; give the rest back."""
        assert used_bytes <= granted_bytes
        ledger = self._ledger
        with ledger._threads, ledger._processes:
            self._add(committed=used_bytes, reserved=-granted_bytes)

    def cancel(self, granted_bytes: int) -> None:
        """Give grants back unused."""
        self.commit(granted_bytes, 0)

    def release(self, used_bytes: int) -> None:
        """Memory is no longer in use."""
        ledger = self._ledger
        with ledger._threads, ledger._processes:
            self._add(committed=-used_bytes)

    def report(self, live_bytes: int, cached_bytes: int, wanted_bytes: int = 0) -> None:
        """Tell the others what the committed bytes are good for, and how many more we need."""
        ledger = self._ledger
        with ledger._threads, ledger._processes:
            use = list(_USE.unpack_from(ledger._map, self._at))
            use[3:6] = live_bytes, cached_bytes, wanted_bytes
            use[6] = (use[6] or time.time()) if wanted_bytes else 0.0
            _USE.pack_into(ledger._map, self._at, *use)

    def fix(self, fixed_bytes: int) -> None:
        """Tell the others how much of the budget weights and activations take, for good."""
        ledger = self._ledger
        with ledger._threads, ledger._processes:
            use = list(_USE.unpack_from(ledger._map, self._at))
            use[2] = fixed_bytes
            _USE.pack_into(ledger._map, self._at, *use)

    def wanted_by_others(self) -> int:
        """Bytes that other engines need and do not get. Reads without the lock, so that it may be
        asked often."""
        ledger = self._ledger
        return sum(ledger._record(slot).wanted for slot in ledger._used() if slot != self._slot)

    def view(self) -> LedgerView:
        """The whole ledger, now."""
        return self._ledger.snapshot()

    def close(self) -> None:
        """Leave the ledger. May be called again."""
        ledger = self._ledger
        with ledger._threads:
            if ledger._fd >= 0:
                with ledger._processes:
                    ledger._erase(self._slot)
                    unlock(ledger._fd, 1 + self._slot)
                ledger._close()

    def _add(self, committed: int = 0, reserved: int = 0) -> None:
        ledger = self._ledger
        had_committed, had_reserved, *rest = _USE.unpack_from(ledger._map, self._at)
        committed += had_committed
        reserved += had_reserved
        assert committed >= 0
        assert reserved >= 0
        _USE.pack_into(ledger._map, self._at, committed, reserved, *rest)

    def _grant(self, wanted: int, unit: int, free: int) -> int:
        ledger = self._ledger
        _, _, _, budget, set_by_user, records = ledger._header()
        others = own = most = 0
        used = memoryview(ledger._map)[_SPACE : _SPACE * (1 + min(records, _SLOTS))]
        with used:
            for slot, (pid, minimum, maximum, committed, reserved, fixed) in enumerate(
                _GRANT.iter_unpack(used)
            ):
                if not pid:
                    continue
                free -= reserved
                if not set_by_user:
                    others += fixed
                if slot == self._slot:
                    own, most = committed + reserved, maximum
                else:
                    others += max(committed + reserved, minimum)
        room = min(budget - others - own, most - own, wanted, free)
        return max(0, room // unit * unit)


def _make_or_check(path: Path, fd: int) -> None:
    size = os.fstat(fd).st_size
    head = os.pread(fd, _HEADER.size, 0).ljust(_HEADER.size, b"\0")
    if size in (0, _SIZE) and not any(head):
        os.ftruncate(fd, _SIZE)
        os.pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, _SLOTS, 0, 0, 0), 0)
        return
    magic, version, slots, budget, _, records = _HEADER.unpack(head)
    known = (magic, version, slots, size) == (_MAGIC, _VERSION, _SLOTS, _SIZE)
    if not known or records > _SLOTS or budget < 0:
        raise LedgerError(
            f"{path} is not a ledger that this version understands; stop the engines that use it "
            "and delete it, or set KVCACHED_DIR to another folder."
        )


def _view(record: _Record) -> AccountView:
    return AccountView(
        name=record.name.rstrip(b"\0").decode(errors="replace"),
        pid=record.pid,
        joined=record.joined,
        minimum_bytes=record.minimum,
        maximum_bytes=record.maximum,
        weight=record.weight,
        committed_bytes=record.committed,
        reserved_bytes=record.reserved,
        fixed_bytes=record.fixed,
        live_bytes=record.live,
        cached_bytes=record.cached,
        wanted_bytes=record.wanted,
        waiting_since=record.waiting_since,
    )


_open_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()


def _close_in_child() -> None:
    """A child that inherits the open file would keep its parent's record alive."""
    for ledger in list(_open_ledgers):
        ledger._close()


os.register_at_fork(after_in_child=_close_in_child)
