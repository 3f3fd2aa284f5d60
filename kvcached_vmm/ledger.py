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
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from kvcached_vmm import records
from kvcached_vmm.bell import Bell
from kvcached_vmm.errors import LedgerBusy, LedgerError
from kvcached_vmm.fairness import SILENCE_SECONDS, Claim, claim_of, fair_shares
from kvcached_vmm.generations import is_replaced, refuse_if_deleted, replaced
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

CALM_SECONDS = 1.0
"""How long the most that an engine needed counts as what it needs: shares do not swing with every
step of it."""

CHECK_SECONDS = 0.2
"""How often an engine looks whether the ledger is still where others find it."""

LEAST_WEIGHT, MOST_WEIGHT = 0.001, 1000.0
"""One engine's weight is a divisor in what all others reckon."""

SUFFIX = ".ledger"
_READ_ATTEMPTS = 64
_PID = struct.Struct("<q")
_EMPTY = bytes(records.RECORD_BYTES)


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
            if not _is_whole(fd):
                if not wait_for_lock(fd, PATIENT_SECONDS):
                    raise busy(path)
                _make_or_check(path, fd)
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
                refuse_if_deleted(self.path, _is_in_use)
                budget = budget_bytes or default_budget_bytes
                self._map[16:28] = struct.pack("<qI", budget, budget_bytes is not None)
            elif budget_bytes is not None and budget_bytes != budget:
                raise LedgerError(
                    f"KVCACHED_BUDGET is {format_size(budget_bytes)}, but engines that run on "
                    f"{self.device} share {format_size(budget)}; use that value or stop them first."
                )
            terms = _terms(0, minimum_bytes, maximum_bytes, weight, cache_bytes, 0)
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
            self._write(slot, records.COUNTERS, _flat(Counters()))
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
        if header[:5] != self._agreed or header[5] < self._most_used:
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
        at = _at(self._own) + records.WHO.at
        if self._map[at : at + len(self._who)] != self._who:
            with contextlib.suppress(LedgerBusy), self._writing:
                self._map[at : at + len(self._who)] = self._who

    def _pid(self, slot: int) -> int:
        return int(_PID.unpack_from(self._map, _at(slot))[0])

    def _record(self, slot: int) -> Record:
        at = _at(slot)
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
        at = _at(slot) + section.at
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
        sizes = terms.minimum, terms.maximum, max(terms.cache, 0)
        if not all(0 <= size <= records.NO_LIMIT for size in sizes):
            raise LedgerError("A limit is not accepted: give 0 or more and less than 4 EiB.")
        if not LEAST_WEIGHT <= terms.weight <= MOST_WEIGHT:
            raise LedgerError(
                f"A weight of {terms.weight:g} is not accepted: give a number from "
                f"{LEAST_WEIGHT:g} to {MOST_WEIGHT:g}."
            )
        if terms.minimum > terms.maximum:
            raise LedgerError(
                f"A minimum of {format_size(terms.minimum)} is more than the maximum of "
                f"{format_size(terms.maximum)}; raise that first."
            )
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
        at = _at(slot)
        self._map[at : at + records.RECORD_BYTES] = _EMPTY

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


class _Others(NamedTuple):
    """Sums over the other accounts, good until somebody else writes."""

    epoch: int
    used: int
    kept: int
    fixed: int
    reserved: int
    waiter_heard: float
    """When one that waits last reported, on the monotonic clock; 0 if nobody waits."""


class Account:
    """One engine's record. Made by ``Ledger.join``; gone when the process is, or by ``close``.

    Safe to use from several threads.
    """

    def __init__(self, ledger: Ledger, slot: int, terms: Terms, use: Use) -> None:
        self.slot = slot
        self._ledger = ledger
        at = _at(slot) + records.USE.at
        self._place = slice(at, at + records.USE.size)
        self._terms_read = b"", terms
        self._use = use
        self._packed = bytearray()
        self._committed = self._reserved = 0
        self._late = False
        self._peak_at = 0.0
        self._others = _Others(-1, 0, 0, 0, 0, 0.0)

    @property
    def budget_bytes(self) -> int:
        """What all engines on the device may use together."""
        return int(self._ledger._agreed[3])

    @property
    def terms(self) -> Terms:
        """What this engine may have now; others can change it at any time."""
        at = _at(self.slot)
        raw = self._ledger._map[at + records.TERMS_AT : at + records.USE.at]
        if raw != self._terms_read[0]:
            found = records.terms_in_force(self._ledger._map[at : at + records.RECORD_BYTES])
            self._terms_read = raw, found or self._terms_read[1]
        return self._terms_read[1]

    @property
    def is_late(self) -> bool:
        """Whether our record does not yet say what we told it: somebody held the lock then."""
        return self._late

    @property
    def held_up(self) -> str:
        """Why nothing can be granted, in a sentence, if another process holds the ledger for longer
        than we could wait; else empty."""
        ledger = self._ledger
        return str(busy(ledger.path)) if ledger._writing.is_held_up else ""

    @property
    def limit_bytes(self) -> int:
        """What this engine may use when it is alone."""
        return min(self.terms.maximum, self.budget_bytes)

    def reserve(
        self, wanted_bytes: int, unit_bytes: int = 1, free_bytes: int = records.NO_LIMIT
    ) -> int:
        """Grant up to ``wanted_bytes``, in whole units, from what nobody uses or was promised.

        Within its own minimum an engine gets what nobody uses, promised to others or not: two whose
        guarantees cannot be met yet do not lock each other out.

        While another engine waits that has less than its fair share, one that has its own gets
        nothing more. It waits until it reports that nothing is wanted: what it is granted may be
        less than it needs by now. One that has stopped, and reports no more, holds nobody back.

        Args:
            wanted_bytes: how much is wanted.
            unit_bytes: grants are multiples of this.
            free_bytes: what the driver says is free, whoever else may be on the device.

        Returns:
            Bytes granted, maybe 0. They count as used until committed or cancelled. Nothing is
            granted while another process does not let go of the ledger.
        """
        try:
            with self._ledger._threads, self._ledger._writing:
                return self._reserve(wanted_bytes, unit_bytes, free_bytes)
        except LedgerBusy:
            return 0

    def commit(self, granted_bytes: int, used_bytes: int) -> None:
        """Turn ``granted_bytes`` of grants into ``used_bytes`` of memory; give the rest back.

        It is so at once. If another process does not let go of the ledger, the others learn of it
        with our next call that finds it free: until then they believe that we have more.
        """
        assert used_bytes <= granted_bytes <= self._reserved
        with self._ledger._threads:
            self._committed += used_bytes
            self._reserved -= granted_bytes
            self._tell()

    def cancel(self, granted_bytes: int) -> None:
        """Give grants back unused."""
        self.commit(granted_bytes, 0)

    def release(self, used_bytes: int) -> None:
        """Memory is no longer in use; told to the others as by ``commit``."""
        assert used_bytes <= self._committed
        with self._ledger._threads:
            self._committed -= used_bytes
            self._tell()

    def hold(self, held_bytes: int) -> None:
        """Say that ``held_bytes`` are in use, whether granted or not: others get less."""
        with self._ledger._threads:
            self._committed = held_bytes
            self._tell()

    def fix(self, fixed_bytes: int) -> None:
        """Tell the others how much of the budget weights and activations take, for good."""
        with self._ledger._threads:
            self._use = self._use._replace(fixed=fixed_bytes)
            self._late = True
            self._tell()

    def report(
        self,
        live_bytes: int,
        cached_bytes: int,
        wanted_bytes: int = 0,
        *,
        coveted_bytes: int = 0,
        idle_bytes: int = 0,
        leaving_bytes: int = 0,
        evictable_bytes: int = 0,
        ages: Sequence[float] = (),
        counters: Counters | None = None,
    ) -> None:
        """Tell the others what the committed bytes are good for, and how many more we need.

        See ``AccountView`` for what each means. A need that is new rings the bell.
        """
        ledger, now = self._ledger, time.monotonic()
        with ledger._threads:
            use = self._use
            demand = self._committed + self._reserved - idle_bytes - leaving_bytes + wanted_bytes
            if not wanted_bytes:
                demand -= cached_bytes
            if demand >= use.demand or now - self._peak_at > CALM_SECONDS:
                self._peak_at = now
            else:
                demand = use.demand
            self._use = use._replace(
                live=live_bytes,
                cached=cached_bytes,
                evictable=evictable_bytes,
                idle=idle_bytes,
                leaving=leaving_bytes,
                wanted=wanted_bytes,
                coveted=coveted_bytes,
                demand=max(0, demand),
                waiting_since=(use.waiting_since or time.time()) if wanted_bytes else 0.0,
                heartbeat=now,
                ages=tuple(ages) or (0.0,) * records.AGES,
            )
            self._late = True
            self._tell(counters)
            ledger._check_place(now)
        if wanted_bytes + coveted_bytes > use.wanted + use.coveted:
            ledger._ring()

    def others_wait(self) -> bool:
        """Whether another engine, which has reported lately, needs bytes that it does not get.

        Cheap; reads without the lock and may be out of date by an instant.
        """
        return any(use.waiting_since for use in self._others_heard())

    def others_covet(self) -> bool:
        """Whether another engine could do with more, but makes do. As cheap as ``others_wait``."""
        return any(use.coveted for use in self._others_heard())

    def fair_share_bytes(self) -> int:
        """What is due to this engine while others wait, if it wants all that it can get."""
        view = self._ledger.snapshot()
        claims = {each.slot: claim_of(each) for each in view.accounts}
        if self.slot not in claims:
            raise LedgerError(f"The ledger {self._ledger.path} has lost the record of this engine.")
        weight, floor, _ = claims[self.slot]
        claims[self.slot] = Claim(weight, floor, max(floor, view.capacity_bytes))
        shares = fair_shares(view.capacity_bytes, list(claims.values()))
        return shares[list(claims).index(self.slot)]

    def view(self) -> LedgerView:
        """The whole ledger, now."""
        return self._ledger.snapshot()

    @property
    def rings(self) -> int:
        """A number that changes when somebody needs the others to look."""
        return self._ledger.bell.rings

    def wait_for_bell(self, heard: int, timeout_s: float) -> int:
        """Wait as ``Bell.wait`` does; returns what to pass as ``heard`` next. -1 when closed."""
        ledger = self._ledger
        ledger.bell.wait(heard, timeout_s)
        with ledger._threads:
            return ledger.bell.rings if ledger._fd >= 0 else -1

    def close(self) -> None:
        """Leave the ledger. May be called again."""
        ledger = self._ledger
        with ledger._threads:
            if ledger._fd >= 0:
                # Who finds a record whose owner has closed the file collects it.
                with contextlib.suppress(LedgerBusy), ledger._writing:
                    ledger._erase(self.slot)
                    unlock(ledger._fd, 1 + self.slot)
                ledger.bell.ring()
                ledger._close()

    def _reserve(self, wanted_bytes: int, unit_bytes: int, free_bytes: int) -> int:
        ledger = self._ledger
        try:
            grant = self._grant(wanted_bytes, unit_bytes, free_bytes)
        except LedgerError:  # of somebody dead, or it will be raised again
            grant = -1
        if grant < wanted_bytes:
            ledger._collect()
            grant = self._grant(wanted_bytes, unit_bytes, free_bytes)
        if grant:
            self._reserved += grant
            self._save_sums()
            if self._use.wanted:
                self._use = self._use._replace(wanted=max(0, self._use.wanted - grant))
                self._save()
        return grant

    def _tell(self, counters: Counters | None = None) -> None:
        """Write what we know into our record, now or later."""
        ledger = self._ledger
        try:
            with ledger._writing:
                self._save_sums()
                if counters is not None:
                    ledger._write(self.slot, records.COUNTERS, _flat(counters))
        except LedgerBusy:
            self._late = True

    def _others_heard(self) -> Iterator[Use]:
        ledger, now = self._ledger, time.monotonic()
        for slot in ledger._used():
            if slot != self.slot:
                with contextlib.suppress(LedgerError):
                    use = ledger._record(slot).use
                    if now - use.heartbeat < SILENCE_SECONDS:
                        yield use

    def _save(self) -> None:
        *plain, ages = self._use
        plain[:2] = self._committed, self._reserved
        self._packed = bytearray(records.USE.pack((*plain, *ages)))
        self._ledger._map[self._place] = self._packed
        self._late = False

    def _save_sums(self) -> None:
        """The two figures that change all the time; the others as we know them."""
        if self._late:
            self._save()
            return
        records.rewrite_sums(self._packed, self._committed, self._reserved)
        self._ledger._map[self._place] = self._packed

    def _grant(self, wanted: int, unit: int, free: int) -> int:
        ledger = self._ledger
        budget, set_by_user = ledger._check_header(), ledger._agreed[4]
        others = self._others
        if others.epoch != ledger._writing.epoch:
            others = self._others = self._look_at_others()
        own = self._committed + self._reserved
        capacity = budget if set_by_user else budget - others.fixed - self._use.fixed
        terms = self.terms
        room = capacity - others.kept
        if terms.minimum > room:
            room = max(room, min(capacity - others.used, terms.minimum))
        room = min(
            wanted,
            room - own,
            terms.maximum - own,
            free - others.reserved - self._reserved,
        )
        heard = others.waiter_heard
        if heard and room > 0 and time.monotonic() - heard < SILENCE_SECONDS:
            room = min(room, self._fair_share(capacity) - own)
        return max(0, room // unit * unit)

    def _look_at_others(self) -> _Others:
        ledger = self._ledger
        used = kept = fixed = reserved = 0
        waiter_heard = 0.0
        for slot in range(ledger._most_used):
            if not ledger._pid(slot):
                at = _at(slot)
                if ledger._map[at : at + records.RECORD_BYTES] != _EMPTY and not ledger._is_dead(
                    slot
                ):
                    raise ledger._damaged(f"Record {slot}")
            elif slot != self.slot:
                _, terms, use, _ = ledger._record(slot)
                has = use.committed + use.reserved
                used += has
                kept += max(has, terms.minimum)
                fixed += use.fixed
                reserved += use.reserved
                if use.waiting_since:
                    waiter_heard = max(waiter_heard, use.heartbeat)
        return _Others(ledger._writing.epoch, used, kept, fixed, reserved, waiter_heard)

    def _fair_share(self, capacity: int) -> int:
        """What is ours when we want all that we can get."""
        claims: list[Claim] = []
        own = 0
        for slot in self._ledger._used():
            _, terms, use, _ = self._ledger._record(slot)
            most = min(use.demand, terms.maximum)
            if slot == self.slot:
                own, most = len(claims), capacity
            claims.append(Claim(terms.weight, terms.minimum, max(most, terms.minimum)))
        return fair_shares(capacity, claims)[own]


def devices(directory: str | Path) -> list[str]:
    """The devices that have a ledger in ``directory``, which need not exist; it is not changed."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LedgerError(f"The folder {directory} cannot be read: {error.strerror}.") from error
    return [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]


def _at(slot: int) -> int:
    return records.HEADER_BYTES + slot * records.RECORD_BYTES


def _terms(
    version: int,
    minimum: int,
    maximum: int | None,
    weight: float,
    cache: int | None,
    trims: int,
) -> Terms:
    return Terms(
        version,
        minimum,
        records.NO_LIMIT if maximum is None else maximum,
        weight,
        -1 if cache is None else cache,
        trims,
    )


def _flat(counters: Counters) -> tuple[object, ...]:
    return tuple(vars(counters).values())


def _is_in_use(fd: int) -> bool:
    """Whether engines that live are in the ledger that ``fd`` is of."""
    return any(is_locked(fd, 1 + slot) for slot in range(records.SLOTS))


def _is_whole(fd: int) -> bool:
    """Whether a file is a ledger of ours that has all its memory: a write into a page that a full
    disk cannot give would end the process."""
    status = os.fstat(fd)
    if status.st_size != records.FILE_BYTES or status.st_blocks * 512 < records.FILE_BYTES:
        return False
    head = records.HEADER.unpack(os.pread(fd, records.HEADER.size, 0))
    return _is_ours(head, status.st_size)


def _is_ours(head: tuple[Any, ...], size: int) -> bool:
    magic, version, slots, budget, _, used = head
    known = (records.MAGIC, records.VERSION, records.SLOTS, records.FILE_BYTES)
    return (magic, version, slots, size) == known and used <= records.SLOTS and budget >= 0


def _make_or_check(path: Path, fd: int) -> None:
    size = os.fstat(fd).st_size
    head = os.pread(fd, records.HEADER.size, 0).ljust(records.HEADER.size, b"\0")
    if size in (0, records.FILE_BYTES) and not any(head):
        os.posix_fallocate(fd, 0, records.FILE_BYTES)
        first = records.HEADER.pack(records.MAGIC, records.VERSION, records.SLOTS, 0, 0, 0)
        os.pwrite(fd, first, 0)
        return
    if _is_ours(records.HEADER.unpack(head), size):
        os.posix_fallocate(fd, 0, records.FILE_BYTES)
    else:
        raise LedgerError(
            f"{path} is not a ledger that this version understands; stop the engines that use it "
            "and delete it, or set KVCACHED_DIR to another folder."
        )


_open_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()


def _close_in_child() -> None:
    """A child that inherits the open file would keep its parent's record alive.

    The lock between threads may be held by one that the child has not got.
    """
    for ledger in list(_open_ledgers):
        ledger._threads = threading.Lock()
        ledger._close()


os.register_at_fork(after_in_child=_close_in_child)
