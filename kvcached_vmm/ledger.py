"""The ledger: one small mapped file per device, in which engines agree on who may use how much.

An engine joins with an ``Account``. It reserves bytes before it commits memory, so that the sum of
what is reserved and committed never exceeds the budget, whatever the interleaving. A lock on the
header serialises writers; a lock on each record shows that its owner is alive. Both vanish with the
process that held them, and with them whatever it had: a record whose lock is free is collected by
whoever looks next. Readers take no lock.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from kvcached_vmm import records
from kvcached_vmm.account import Account
from kvcached_vmm.bell import Bell
from kvcached_vmm.errors import LedgerBusy, LedgerError
from kvcached_vmm.ledger_file import (
    is_in_use,
    is_replaced,
    is_whole,
    make_or_check,
    refuse_if_deleted,
    replaced,
)
from kvcached_vmm.locks import (
    PATIENT_SECONDS,
    Writing,
    busy,
    is_locked,
    open_private,
    private_directory,
    try_lock,
    unlock,
    wait_for_lock,
)
from kvcached_vmm.records import AccountView, Counters, LedgerView, Record, Terms, Use, Who
from kvcached_vmm.units import format_size

CHECK_SECONDS = 0.2
"""How often an engine looks whether the ledger is still where others find it."""

SUFFIX = ".ledger"
_READ_ATTEMPTS = 64
_PID = struct.Struct("<q")


class Ledger:
    """The ledger of one device. An open ledger serves one account: locks belong to the open file.

    Safe to use from several threads.
    """

    def __init__(self, device: str, path: Path, fd: int) -> None:
        self.device = device
        self.path = path
        self._fd = fd
        self._map = mmap.mmap(fd, records.FILE_BYTES)
        self._threads = threading.Lock()
        self._count = memoryview(self._map)[records.CHANGES_AT : records.CHANGES_AT + 8].cast("Q")
        self._writing = Writing(path, fd, self._count)
        self._own: int | None = None
        self._who = b""
        self._agreed: tuple[Any, ...] = ()
        """The header that stays as it is while we have an account, and, below, what only grows."""
        self._most_used = 0
        self._checked_at = -math.inf
        self._is_replaced = False
        self._read: dict[int, tuple[bytes, Record]] = {}
        self.bell = Bell(self._map, records.BELL_AT)
        _open_ledgers.add(self)

    @classmethod
    def open(cls, directory: str | Path, device: str) -> Ledger:
        """Open the ledger of ``device`` in ``directory``, making both if need be.

        Raises:
            LedgerError: the directory or file is not ours alone, or is not a ledger we understand.
        """
        path = private_directory(directory) / f"{device}{SUFFIX}"
        fd = open_private(path)
        try:
            if not is_whole(fd):
                if not wait_for_lock(fd, PATIENT_SECONDS):
                    raise busy(path)
                make_or_check(path, fd)
                unlock(fd, 0)
            return cls(device, path, fd)
        except OSError as error:
            os.close(fd)
            raise LedgerError(f"The ledger {path} cannot be used: {error.strerror}.") from error
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Close the file; an account that was opened on it ends, and its bytes are free."""
        with self._threads:
            if self._fd >= 0:
                self.bell.ring()
                self._close()

    def snapshot(self) -> LedgerView:
        """Who is there and what they use, all at one moment. The records of the dead are collected.

        Raises:
            LedgerError: a record is damaged, or the ledger is closed.
        """
        with self._threads:
            if self._fd < 0:
                raise LedgerError(f"The ledger {self.path} is closed.")
            for _ in range(_READ_ATTEMPTS):
                before = self._count[0]
                with contextlib.suppress(LedgerError):
                    view = self._view()
                    if before % 2 == 0 and before == self._count[0]:
                        break
            else:
                view = self._view_of_the_held_up()
            alive = tuple(each for each in view.accounts if not self._is_dead(each.slot))
            if len(alive) < len(view.accounts):
                with contextlib.suppress(LedgerBusy), self._writing:
                    self._collect()
                    return self._view()
                return replace(view, accounts=alive)
            return view

    def join(
        self,
        name: str,
        budget_bytes: int | None,
        minimum_bytes: int = 0,
        maximum_bytes: int | None = None,
        weight: float = 1.0,
        default_budget_bytes: int = 0,
        cache_bytes: int | None = None,
        engine: str = "",
        arena_bytes: int = 0,
    ) -> Account:
        """Take a record for this process.

        Args:
            name: how people call the engine, at most 63 bytes.
            budget_bytes: what all engines on the device may use together; None: what is set.
            minimum_bytes: never granted to others.
            maximum_bytes: never granted to us beyond it; None: no limit but the budget.
            weight: share of the budget under pressure, against the others' weights.
            default_budget_bytes: the budget if no user sets one; fixed bytes count against it.
            cache_bytes: what cached blocks may hold; None: no bound. For the engine to honour.
            engine: what it is, for people.
            arena_bytes: addresses that its KV cache has, for people.

        Raises:
            LedgerError: full, another budget in use, the minimum is not to be had, or terms that
                make no sense.
        """
        with self._threads, self._writing.patiently():
            if self._own is not None:
                raise ValueError("an open ledger serves one account")
            self._collect()
            used = list(self._used())
            budget = self._header()[3]
            if not used:
                refuse_if_deleted(self.path, is_in_use)
                budget = budget_bytes or default_budget_bytes
                self._map[16:28] = struct.pack("<qI", budget, budget_bytes is not None)
            elif budget_bytes is not None and budget_bytes != budget:
                raise LedgerError(
                    f"KVCACHED_BUDGET is {format_size(budget_bytes)}, but engines that run on "
                    f"{self.device} share {format_size(budget)}; use that value or stop them first."
                )
            terms = Terms.of(minimum_bytes, maximum_bytes, weight, cache_bytes)
            self._check_terms(None, terms)
            free = (slot for slot in range(records.SLOTS) if not self._pid(slot))
            slot = next((slot for slot in free if try_lock(self._fd, 1 + slot)), None)
            if slot is None:
                raise LedgerError(
                    f"The ledger of {self.device} is full: {records.SLOTS} engines use it."
                )
            who = Who(
                os.getpid(),
                os.stat("/proc/self/ns/pid").st_ino,
                psutil.Process().create_time(),
                time.time(),
                name.encode(errors="replace")[:63],
                engine.encode(errors="replace")[:15],
            )
            account = Account(self, slot, terms, Use(arena=arena_bytes, heartbeat=time.monotonic()))
            self._write(slot, records.TERMS[0], terms)
            self._write(slot, records.TERMS[1], terms)
            self._write(slot, records.COUNTERS, tuple(vars(Counters()).values()))
            account._save()
            self._write(slot, records.WHO, who)
            self._map[28:32] = struct.pack("<I", max(self._header()[5], slot + 1))
            self._own = slot
            self._agreed, self._most_used = self._header()[:5], self._header()[5]
            self._who = records.WHO.pack(who)
            return account

    def set_terms(
        self,
        account: AccountView,
        *,
        minimum_bytes: int | None = None,
        maximum_bytes: int | None = None,
        weight: float | None = None,
        cache_bytes: int | None = None,
        no_maximum: bool = False,
        no_cache_bound: bool = False,
        trim: bool = False,
    ) -> None:
        """Change what an engine may have, from now on. What is None stays as it is.

        Args:
            account: whose terms, from a snapshot.
            no_maximum: the budget is the only limit again.
            no_cache_bound: cached blocks may hold anything again.
            trim: ask it to give back all that it can spare.

        Raises:
            LedgerError: the engine has left, or the guarantees would exceed the budget, or terms
                that make no sense.
        """
        with self._threads, self._writing.patiently():
            self._collect()
            record = self._record(account.slot) if self._pid(account.slot) else None
            if record is None or (record.who.pid, record.who.joined) != (
                account.pid,
                account.joined,
            ):
                raise LedgerError(f"{account.name} has left the ledger of {self.device}.")
            old = record.terms
            new = Terms(
                old.version + 1,
                old.minimum if minimum_bytes is None else minimum_bytes,
                records.NO_LIMIT
                if no_maximum
                else old.maximum
                if maximum_bytes is None
                else maximum_bytes,
                old.weight if weight is None else weight,
                -1 if no_cache_bound else old.cache if cache_bytes is None else cache_bytes,
                old.trims + trim,
            )
            self._check_terms(account.slot, new)
            self._write(account.slot, records.TERMS[new.version % 2], new)
            self._writing.epoch += 1
        self._ring()

    def _header(self) -> tuple[bytes, int, int, int, int, int]:
        return records.HEADER.unpack_from(self._map)

    def _check_header(self) -> int:
        """The budget.

        Raises:
            LedgerError: what nobody writes while we are here has changed, or the file is no longer
                the one that others find.
        """
        header = self._header()
        if header[:5] != self._agreed or not self._most_used <= header[5] <= records.SLOTS:
            raise self._damaged("The header")
        self._most_used = header[5]
        if self._is_replaced:
            raise replaced(self.path)
        return header[3]

    def _check_place(self, now: float) -> None:
        """Now and then: is this still the file that others find, and are we to be seen in it?"""
        if now - self._checked_at < CHECK_SECONDS or self._own is None:
            return
        self._checked_at = now
        self._is_replaced = is_replaced(self.path, self._fd)
        at = records.record_at(self._own) + records.WHO.at
        if self._map[at : at + len(self._who)] != self._who:
            with contextlib.suppress(LedgerBusy), self._writing:
                self._map[at : at + len(self._who)] = self._who

    def _pid(self, slot: int) -> int:
        return int(_PID.unpack_from(self._map, records.record_at(slot))[0])

    def _record(self, slot: int) -> Record:
        at = records.record_at(slot)
        raw = self._map[at : at + records.RECORD_BYTES]
        known = self._read.get(slot)
        if known is not None and known[0] == raw:
            return known[1]
        record = records.parse(raw)
        if record is None:
            raise self._damaged(f"Record {slot}")
        self._read[slot] = raw, record
        return record

    def _damaged(self, what: str) -> LedgerError:
        return LedgerError(
            f"{what} of the ledger {self.path} is damaged; stop the engines on {self.device} and "
            "delete the file, or set KVCACHED_DIR to another folder."
        )

    def _write(self, slot: int, section: records.Section, values: tuple[object, ...]) -> None:
        raw = section.pack(values)
        at = records.record_at(slot) + section.at
        self._map[at : at + len(raw)] = raw

    def _used(self) -> Iterator[int]:
        return (slot for slot in range(min(self._header()[5], records.SLOTS)) if self._pid(slot))

    def _view(self) -> LedgerView:
        accounts = tuple(records.view(slot, self._record(slot)) for slot in self._used())
        _, _, _, budget, set_by_user, _ = self._header()
        return LedgerView(self.device, budget, bool(set_by_user), accounts)

    def _view_of_the_held_up(self) -> LedgerView:
        """What the file holds while somebody writes, all the time, or is stopped in the middle."""
        try:
            with self._writing:
                self._collect()
                return self._view()
        except LedgerBusy:
            try:
                return self._view()
            except LedgerError:
                raise busy(self.path) from None

    def _check_terms(self, slot: int | None, terms: Terms) -> None:
        terms.check()
        budget = self._header()[3]
        others = sum(self._record(each).terms.minimum for each in self._used() if each != slot)
        if others + terms.minimum > budget:
            raise LedgerError(
                f"A minimum of {format_size(terms.minimum)} cannot be guaranteed: "
                f"{format_size(others)} of the budget of {format_size(budget)} on {self.device} "
                "are promised to other engines; lower it (KVCACHED_MIN)."
            )

    def _is_dead(self, slot: int) -> bool:
        return slot != self._own and not is_locked(self._fd, 1 + slot)

    def _collect(self) -> None:
        """Free the records whose owners are gone: nobody holds their lock."""
        for slot in self._used():
            if self._is_dead(slot):
                self._erase(slot)

    def _erase(self, slot: int) -> None:
        self._writing.epoch += 1
        at = records.record_at(slot)
        self._map[at : at + records.RECORD_BYTES] = records.EMPTY

    def _ring(self) -> None:
        with self._threads:
            if self._fd >= 0:
                self.bell.ring()

    def _close(self) -> None:
        if self._fd >= 0:
            self._count.release()
            self._map.close()
            os.close(self._fd)
            self._fd = self._writing.fd = -1


def devices(directory: str | Path) -> list[str]:
    """The devices that have a ledger in ``directory``, which need not exist; it is not changed."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LedgerError(f"The folder {directory} cannot be read: {error.strerror}.") from error
    return [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]


_open_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()


def _close_in_child() -> None:
    """A child that inherits the open file would keep its parent's record alive.

    The lock between threads may be held by one that the child has not got.
    """
    for ledger in list(_open_ledgers):
        ledger._threads = threading.Lock()
        ledger._close()


os.register_at_fork(after_in_child=_close_in_child)
