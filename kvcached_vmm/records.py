"""What the ledger's file holds: its fixed layout, checksums, and what a reader sees of it.

    header   256 bytes: magic, version, slots, budget, changes, bell
    record   512 bytes, one per slot: who, terms (two copies), use, counters

Each section of a record ends in a checksum. Who, use and counters are written by the record's owner
alone, so a section that is torn belongs to somebody dead. The terms may be written by others: the
copy that is not in force is written, and is in force from the moment that its checksum is right.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple
from zlib import crc32

from kvcached_vmm.errors import LedgerError
from kvcached_vmm.units import format_size

MAGIC = b"KVLEDGER"
VERSION = 2
SLOTS = 256
HEADER = struct.Struct("<8sIIqII")
"""Magic, version, slots, budget in bytes, whether a user set it, records ever used."""
CHANGES_AT = 32
"""A count that is odd while somebody writes; the same even count twice: nothing has changed."""
BELL_AT = 40
"""A word that ``Bell`` waits on."""
HEADER_BYTES = 256
RECORD_BYTES = 512
EMPTY = bytes(RECORD_BYTES)
FILE_BYTES = HEADER_BYTES + SLOTS * RECORD_BYTES
NO_LIMIT = 1 << 62
LEAST_WEIGHT, MOST_WEIGHT = 0.001, 1000.0
"""One engine's weight is a divisor in what all others reckon."""
AGES = 8
"""Parcels of equal size that an engine's evictable bytes are described by, oldest first."""

_CHECKSUM = struct.Struct("<I")


class Section:
    """A part of a record: ``fields`` at ``at``, followed by their checksum."""

    def __init__(self, fields: str, at: int) -> None:
        self._fields = struct.Struct(fields)
        self.at = at
        self.size = self._fields.size + _CHECKSUM.size

    def pack(self, values: tuple[object, ...]) -> bytes:
        raw = self._fields.pack(*values)
        return raw + _CHECKSUM.pack(crc32(raw))

    def unpack(self, record: bytes) -> tuple[object, ...] | None:
        """The values in a record's bytes; None if they are damaged."""
        raw = record[self.at : self.at + self._fields.size]
        if _CHECKSUM.unpack_from(record, self.at + self._fields.size)[0] != crc32(raw):
            return None
        return self._fields.unpack(raw)


class Who(NamedTuple):
    """The owner. ``started`` and ``joined`` are in seconds since the epoch."""

    pid: int
    namespace: int
    started: float
    joined: float
    name: bytes
    engine: bytes


class Terms(NamedTuple):
    """What an engine may have, in bytes. A bound of the cache below 0: none. ``trims`` counts how
    often somebody asked for all that can be spared."""

    version: int
    minimum: int
    maximum: int
    weight: float
    cache: int
    trims: int

    def check(self) -> None:
        """
        Raises:
            LedgerError: no engine can have such terms, whatever the budget.
        """
        sizes = self.minimum, self.maximum, max(self.cache, 0)
        if not all(0 <= size <= NO_LIMIT for size in sizes):
            raise LedgerError("A limit is not accepted: give 0 or more and less than 4 EiB.")
        if not LEAST_WEIGHT <= self.weight <= MOST_WEIGHT:
            raise LedgerError(
                f"A weight of {self.weight:g} is not accepted: give a number from "
                f"{LEAST_WEIGHT:g} to {MOST_WEIGHT:g}."
            )
        if self.minimum > self.maximum:
            raise LedgerError(
                f"A minimum of {format_size(self.minimum)} is more than the maximum of "
                f"{format_size(self.maximum)}; raise that first."
            )

    @classmethod
    def of(cls, minimum: int, maximum: int | None, weight: float, cache: int | None) -> Terms:
        """The first terms of an engine; None: no maximum, no bound."""
        most = NO_LIMIT if maximum is None else maximum
        return cls(0, minimum, most, weight, -1 if cache is None else cache, 0)


class Use(NamedTuple):
    """What an engine has and needs, in bytes.

    ``AccountView`` says what each is. Times are on the monotonic clock, but for ``waiting_since``.
    """

    committed: int = 0
    reserved: int = 0
    fixed: int = 0
    arena: int = 0
    live: int = 0
    cached: int = 0
    evictable: int = 0
    idle: int = 0
    leaving: int = 0
    wanted: int = 0
    coveted: int = 0
    demand: int = 0
    waiting_since: float = 0.0
    heartbeat: float = 0.0
    ages: tuple[float, ...] = (0.0,) * AGES


@dataclass
class Counters:
    """What has happened since an engine joined: counts of extents and of events, and seconds."""

    commits: int = 0
    releases: int = 0
    refusals: int = 0
    waits: int = 0
    reclaims: int = 0
    reclaimed_bytes: int = 0
    driver_seconds: float = 0.0
    wait_seconds: float = 0.0
    reclaim_seconds: float = 0.0


WHO = Section("<qqdd64s16s", 0)
TERMS_AT = 120
TERMS = (Section("<qqqdqq", TERMS_AT), Section("<qqqdqq", TERMS_AT + 56))
USE = Section(f"<12q2d{AGES}d", 232)
COUNTERS = Section("<6q3d", 416)
_PLAIN = len(Use._fields) - 1

_SUMS = struct.Struct("<qq")


class Record(NamedTuple):
    """One slot of the file that is in use."""

    who: Who
    terms: Terms
    use: Use
    counters: Counters


def parse(raw: bytes) -> Record | None:
    """The record in ``raw``, ``RECORD_BYTES`` long; None if a checksum is wrong."""
    who, use, counters = (section.unpack(raw) for section in (WHO, USE, COUNTERS))
    terms = terms_in_force(raw)
    if who is None or use is None or counters is None or terms is None:
        return None
    return Record(
        Who(*who),  # type: ignore[arg-type]
        terms,
        Use(*use[:_PLAIN], use[_PLAIN:]),  # type: ignore[arg-type,call-arg]
        Counters(*counters),  # type: ignore[arg-type]
    )


def record_at(slot: int) -> int:
    """Where the record of ``slot`` begins in the file."""
    return HEADER_BYTES + slot * RECORD_BYTES


def rewrite_sums(use: bytearray, committed: int, reserved: int) -> None:
    """Change the first two figures of a packed use section, and its checksum."""
    _SUMS.pack_into(use, 0, committed, reserved)
    end = len(use) - _CHECKSUM.size
    _CHECKSUM.pack_into(use, end, crc32(use[:end]))


def terms_in_force(raw: bytes) -> Terms | None:
    """The newer of the two copies that are whole."""
    copies = [Terms(*found) for each in TERMS if (found := each.unpack(raw))]  # type: ignore[arg-type]
    return max(copies, default=None)


@dataclass(frozen=True)
class AccountView:
    """One engine in the ledger. Sizes in bytes, times in seconds since the epoch.

    Attributes:
        slot: which record of the file it has.
        name: how people call it.
        engine: what it is: vllm, sglang.
        pid: its process, as seen in the process-id namespace ``namespace``.
        started: when that process started.
        joined: when it joined the ledger.
        minimum_bytes: never granted to others.
        maximum_bytes: the most that it may have; None: the budget is the limit.
        weight: its share under pressure, against the others' weights.
        cache_bytes: cached blocks may hold this much; None: no bound.
        trims: how often it was asked to give back all that it can spare.
        committed_bytes: memory that it has.
        reserved_bytes: granted and not yet committed.
        fixed_bytes: weights, graphs and activations.
        arena_bytes: addresses that its KV cache has.
        live_bytes: in blocks that requests use.
        cached_bytes: in free blocks whose content is kept.
        evictable_bytes: in extents that hold such blocks and no live ones.
        idle_bytes: in extents without content, kept for reuse or as the reserve.
        leaving_bytes: in extents whose release waits for kernels to finish.
        wanted_bytes: what requests need and it does not get.
        coveted_bytes: what it would rather be granted than evict cached blocks of its own, or what
            its reserve lacks while it has none.
        demand_bytes: the most that it needed in the last second, cached blocks not counted.
        waiting_since: since when something is wanted; 0 if nothing was at the last report.
        heartbeat: when it last reported, on the monotonic clock.
        ages: when its evictable bytes were last used, oldest first, on the monotonic clock: each
            stands for an eighth of them.
        counters: what has happened so far.
    """

    slot: int
    name: str
    engine: str
    pid: int
    namespace: int
    started: float
    joined: float
    minimum_bytes: int
    maximum_bytes: int | None
    weight: float
    cache_bytes: int | None
    trims: int
    committed_bytes: int
    reserved_bytes: int
    fixed_bytes: int
    arena_bytes: int
    live_bytes: int
    cached_bytes: int
    evictable_bytes: int
    idle_bytes: int
    leaving_bytes: int
    wanted_bytes: int
    coveted_bytes: int
    demand_bytes: int
    waiting_since: float
    heartbeat: float
    ages: tuple[float, ...]
    counters: Counters

    @property
    def used_bytes(self) -> int:
        """What is committed or reserved."""
        return self.committed_bytes + self.reserved_bytes


@dataclass(frozen=True)
class LedgerView:
    """The ledger at one moment.

    ``capacity_bytes`` is what KV caches may use together: the budget, less the fixed bytes of
    engines where no user set the budget.
    """

    device: str
    budget_bytes: int
    set_by_user: bool
    accounts: tuple[AccountView, ...]

    @property
    def used_bytes(self) -> int:
        """What is committed or reserved, by all."""
        return sum(account.used_bytes for account in self.accounts)

    @property
    def capacity_bytes(self) -> int:
        if self.set_by_user:
            return self.budget_bytes
        return self.budget_bytes - sum(account.fixed_bytes for account in self.accounts)

    @property
    def free_bytes(self) -> int:
        """What nobody uses or was promised; never below 0."""
        kept = sum(max(each.used_bytes, each.minimum_bytes) for each in self.accounts)
        return max(0, self.capacity_bytes - kept)


def view(slot: int, record: Record) -> AccountView:
    """A record as readers see it."""
    who, terms, use, counters = record
    return AccountView(
        slot,
        _text(who.name),
        _text(who.engine),
        *who[:4],
        terms.minimum,
        None if terms.maximum >= NO_LIMIT else terms.maximum,
        terms.weight,
        None if terms.cache < 0 else terms.cache,
        terms.trims,
        *use,  # type: ignore[arg-type]
        counters,
    )


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")
