"""An engine's side of the ledger: one record, which it alone writes.

An account and its ledger are two sides of one open file and know each other's insides.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvcached_vmm import records
from kvcached_vmm.errors import LedgerBusy, LedgerError
from kvcached_vmm.fairness import SILENCE_SECONDS, Claim, claim_of, fair_shares
from kvcached_vmm.locks import busy, unlock
from kvcached_vmm.records import Counters, LedgerView, Terms, Use

if TYPE_CHECKING:
    from kvcached_vmm.ledger import Ledger

CALM_SECONDS = 1.0
"""How long the most that an engine needed counts as what it needs: shares do not swing with every
step of it."""


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
        at = records.record_at(slot) + records.USE.at
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
        at = records.record_at(self.slot)
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
    def told(self) -> tuple[int, int]:
        """Bytes wanted and coveted that the others know of: as reported, less what was granted."""
        return self._use.wanted, self._use.coveted

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
        grows = wanted_bytes + coveted_bytes > use.wanted + use.coveted
        if grows or wanted_bytes > use.wanted:
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

    @property
    def news(self) -> int:
        """As long as it stays the same, no other process has written into the ledger; -1 if one has
        since our last call. Cheap."""
        return self._ledger._writing.news

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
            wanted, coveted = self.told
            if wanted or coveted:
                more = max(0, coveted - max(0, grant - wanted))
                self._use = self._use._replace(wanted=max(0, wanted - grant), coveted=more)
                self._late = True
            self._save_sums()
        return grant

    def _tell(self, counters: Counters | None = None) -> None:
        """Write what we know into our record, now or later."""
        ledger = self._ledger
        try:
            with ledger._writing:
                self._save_sums()
                if counters is not None:
                    ledger._write(self.slot, records.COUNTERS, tuple(vars(counters).values()))
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
                at = records.record_at(slot)
                empty = ledger._map[at : at + records.RECORD_BYTES] == records.EMPTY
                if not empty and not ledger._is_dead(slot):
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
