"""Damage to a record is noticed, told in a sentence and left alone, or collected with its owner."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcached_vmm import records
from kvcached_vmm.account import Account
from kvcached_vmm.errors import LedgerError
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.records import COUNTERS, TERMS, USE, WHO, AccountView, Counters, Section, Terms
from kvcached_vmm.units import MIB

BUDGET = 100 * MIB
DAMAGED = r"^Record 0 of the ledger .*host\.ledger is damaged; stop the engines on host and .+\.$"
SECTIONS = {"who": WHO, "use": USE, "counters": COUNTERS}


@pytest.fixture
def onlooker(folder: Path) -> Iterator[Ledger]:
    """A ledger that has joined nothing."""
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        yield ledger


@pytest.fixture
def account(folder: Path) -> Iterator[Account]:
    """An engine in record 0, with figures in all its sections."""
    ledger = Ledger.open(folder, "host")
    account = ledger.join("llama", BUDGET, 10 * MIB, 80 * MIB, 1.5, engine="vllm")
    account.commit(account.reserve(30 * MIB), 20 * MIB)
    counters = Counters(commits=5, driver_seconds=0.25)
    account.report(9, 8, 7, evictable_bytes=6, ages=(1.5,) * 8, counters=counters)
    yield account
    ledger.close()


def flip(folder: Path, at: int, bits: int = 0xFF) -> None:
    """Change a byte of record 0 as a broken program or memory would."""
    with (folder / "host.ledger").open("r+b") as file:
        file.seek(records.HEADER_BYTES + at)
        (byte,) = file.read(1)
        file.seek(records.HEADER_BYTES + at)
        file.write(bytes([byte ^ bits]))


def content(folder: Path) -> bytes:
    """All of the file but the count of changes and the bell."""
    raw = (folder / "host.ledger").read_bytes()
    return raw[: records.CHANGES_AT] + raw[records.BELL_AT + 4 :]


def test_a_record_reads_as_it_was_written(account: Account, onlooker: Ledger) -> None:
    (seen,) = onlooker.snapshot().accounts
    assert (seen.name, seen.engine, seen.weight) == ("llama", "vllm", 1.5)
    assert (seen.minimum_bytes, seen.maximum_bytes) == (10 * MIB, 80 * MIB)
    assert (seen.committed_bytes, seen.reserved_bytes) == (20 * MIB, 0)
    assert (seen.live_bytes, seen.cached_bytes, seen.evictable_bytes) == (9, 8, 6)
    assert seen.counters == Counters(commits=5, driver_seconds=0.25)
    assert seen.ages == (1.5,) * 8


def test_sections_lie_side_by_side() -> None:
    ends = 0
    for section in (WHO, *TERMS, USE, COUNTERS):
        assert section.at >= ends
        ends = section.at + section.size
    assert ends <= records.RECORD_BYTES


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("bits", [1, 0x80, 0xFF])
def test_any_byte_that_changes_in_a_living_record_is_noticed_and_left_alone(
    folder: Path, account: Account, onlooker: Ledger, name: str, bits: int
) -> None:
    section, before = SECTIONS[name], onlooker.snapshot()
    offsets = range(section.at, section.at + section.size)
    for at in random.Random(bits).sample(offsets, 12):
        flip(folder, at, bits)
        damaged = content(folder)
        if at >= 8:  # without a process id there is no record
            with pytest.raises(LedgerError, match=DAMAGED):
                onlooker.snapshot()
        assert content(folder) == damaged
        flip(folder, at, bits)
    assert onlooker.snapshot() == before


@pytest.mark.parametrize("section", [WHO, USE, COUNTERS, *TERMS])
def test_no_byte_of_a_section_goes_unchecked(section: Section, account: Account) -> None:
    at = records.HEADER_BYTES
    whole = bytes(account._ledger._map[at : at + records.RECORD_BYTES])
    for offset in range(section.at, section.at + section.size):
        torn = bytearray(whole)
        torn[offset] ^= 1
        assert section.unpack(bytes(torn)) is None


@pytest.mark.parametrize("byte", [USE.at, USE.at + 40, COUNTERS.at, WHO.at + 50])
def test_a_neighbour_of_a_damaged_record_is_granted_nothing_and_told_why(
    folder: Path, account: Account, byte: int
) -> None:
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        neighbour = ledger.join("neighbour", None)
        flip(folder, byte)
        damaged = content(folder)
        with pytest.raises(LedgerError, match=DAMAGED):
            neighbour.reserve(MIB)
        assert content(folder) == damaged
        flip(folder, byte)
        assert neighbour.reserve(MIB) == MIB


HEIRS: dict[str, Callable[[Ledger, Account, AccountView], object]] = {
    "reserves": lambda ledger, heir, own: heir.reserve(BUDGET) == BUDGET,
    "learns its share": lambda ledger, heir, own: heir.fair_share_bytes() == BUDGET,
    "looks": lambda ledger, heir, own: len(ledger.snapshot().accounts) == 1,
    "gets terms": lambda ledger, heir, own: ledger.set_terms(own, minimum_bytes=BUDGET) is None,
}


@pytest.mark.parametrize("does", HEIRS)
@pytest.mark.parametrize("name", SECTIONS)
def test_what_the_dead_left_half_written_is_in_nobodys_way(
    folder: Path, account: Account, does: str, name: str
) -> None:
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        heir = ledger.join("heir", None)
        own = next(each for each in heir.view().accounts if each.name == "heir")
        account._ledger.close()
        flip(folder, SECTIONS[name].at + 8)
        assert HEIRS[does](ledger, heir, own)


def test_terms_that_were_half_written_are_those_from_before(
    folder: Path, account: Account, onlooker: Ledger
) -> None:
    (seen,) = onlooker.snapshot().accounts
    onlooker.set_terms(seen, maximum_bytes=50 * MIB)
    onlooker.set_terms(seen, maximum_bytes=40 * MIB)
    assert account.terms.maximum == 40 * MIB
    flip(folder, TERMS[0].at + 20)  # as if whoever wrote the second died
    assert account.terms.maximum == 50 * MIB
    assert onlooker.snapshot().accounts[0].maximum_bytes == 50 * MIB
    onlooker.set_terms(seen, maximum_bytes=30 * MIB)
    assert account.terms.maximum == 30 * MIB
    assert onlooker.snapshot().accounts[0].maximum_bytes == 30 * MIB


def test_terms_without_a_whole_copy_are_damage_to_others_and_stay_for_their_owner(
    folder: Path, account: Account, onlooker: Ledger
) -> None:
    assert account.terms.maximum == 80 * MIB
    for section in TERMS:
        flip(folder, section.at)
    with pytest.raises(LedgerError, match=DAMAGED):
        onlooker.snapshot()
    assert account.terms.maximum == 80 * MIB


def test_an_owner_writes_what_it_knows_and_not_what_it_finds(
    folder: Path, account: Account, onlooker: Ledger
) -> None:
    account.report(live_bytes=0, cached_bytes=0)
    account.fix(5 * MIB)
    flip(folder, USE.at + 16)  # in the fixed bytes
    account.cancel(account.reserve(MIB))
    (seen,) = onlooker.snapshot().accounts
    assert seen.fixed_bytes == 5 * MIB


@pytest.mark.parametrize("version", [0, 1, 7])
def test_the_newer_copy_of_terms_is_in_force(version: int) -> None:
    raw = bytearray(records.RECORD_BYTES)
    for number in (version, version + 1):
        section = TERMS[number % 2]
        packed = section.pack(Terms(number, number, 9, 1.0, -1, 0))
        raw[section.at : section.at + section.size] = packed
    found = records.terms_in_force(bytes(raw))
    assert found is not None
    assert (found.version, found.minimum) == (version + 1, version + 1)


def test_reading_a_ledger_that_rests_costs_little(account: Account, onlooker: Ledger) -> None:
    onlooker.snapshot()
    start = time.perf_counter()
    for _ in range(200):
        onlooker.snapshot()
    assert time.perf_counter() - start < 0.2
