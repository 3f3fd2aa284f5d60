"""An engine's workers share one decision about memory, on one device or on several."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_plugins.shares import REFUSED_SECONDS, Shares
from kvcached_vmm import records
from kvcached_vmm.account import Account
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.policy import Spending
from kvcached_vmm.units import MIB

fork = multiprocessing.get_context("fork")


@pytest.fixture
def accounts(tmp_path: Path) -> Iterator[dict[str, Account]]:
    """Two GPUs, one with 100 MiB of budget and one with 60."""
    folder = tmp_path / "ledgers"
    made = {
        device: Ledger.open(folder, device).join("engine", budget * MIB)
        for device, budget in (("GPU-a", 100), ("GPU-b", 60))
    }
    yield made
    for account in made.values():
        account.close()


def reserved(account: Account) -> int:
    return account.view().accounts[0].reserved_bytes


def test_workers_on_one_device_count_once_each(accounts: dict[str, Account]) -> None:
    shares = Shares([(accounts["GPU-a"], 2)])
    assert shares.reserve(10 * MIB, MIB) == 10 * MIB
    assert reserved(accounts["GPU-a"]) == 20 * MIB
    assert shares.limit_bytes() == 50 * MIB


def test_the_poorest_device_decides_and_the_others_take_nothing_for_it(
    accounts: dict[str, Account],
) -> None:
    shares = Shares([(accounts["GPU-a"], 1), (accounts["GPU-b"], 1)])
    assert shares.reserve(80 * MIB, 8 * MIB) == 56 * MIB
    assert reserved(accounts["GPU-a"]) == reserved(accounts["GPU-b"]) == 56 * MIB


def test_a_device_that_is_full_leaves_no_grant_anywhere(accounts: dict[str, Account]) -> None:
    accounts["GPU-b"].reserve(60 * MIB)
    shares = Shares([(accounts["GPU-a"], 1), (accounts["GPU-b"], 1)])
    assert shares.reserve(8 * MIB, 8 * MIB) == 0
    assert reserved(accounts["GPU-a"]) == 0


def test_what_the_driver_has_free_bounds_a_grant(accounts: dict[str, Account]) -> None:
    shares = Shares([(accounts["GPU-a"], 1)], free_bytes=lambda: 20 * MIB)
    assert shares.reserve(64 * MIB, 8 * MIB) == 16 * MIB


class FullHouse:
    """An engine that was refused, its neighbour that has it all, and how often the driver was asked
    what it has free."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvcached_plugins.shares.REFUSED_SECONDS", 3600.0)
        self.asked = 0
        self.account = Ledger.open(folder, "GPU-a").join("engine", 100 * MIB)
        self.neighbour = Ledger.open(folder, "GPU-a").join("neighbour", None)
        self.shares = Shares([(self.account, 1)], self._free_bytes)
        self.shares.commit(self.shares.reserve(40 * MIB, MIB), 40 * MIB)
        self.neighbour.commit(self.neighbour.reserve(60 * MIB), 60 * MIB)
        self.shares.report(Spending(0, 0, 0, 0, 0, ()), wanted_bytes=0, coveted_bytes=MIB)
        assert self.shares.reserve(4 * MIB, MIB) == 0

    def _free_bytes(self) -> int:
        self.asked += 1
        return 1000 * MIB


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FullHouse]:
    house = FullHouse(tmp_path / "ledgers", monkeypatch)
    yield house
    house.neighbour.close()
    house.account.close()


def test_nobody_is_asked_again_while_a_refusal_stands(full: FullHouse) -> None:
    """Each step of an engine in a full budget asks, and a driver takes milliseconds at times."""
    asked = full.asked
    refusals = full.shares.counters.refusals
    full.shares.report(Spending(0, 0, 0, 0, 0, ()), wanted_bytes=0, coveted_bytes=2 * MIB)
    assert [full.shares.reserve(count * MIB, MIB) for count in (1, 4, 9)] == [0, 0, 0]
    assert full.asked == asked
    assert full.shares.counters.refusals == refusals + 3


@pytest.mark.parametrize("what", ["less", "nothing"])
def test_a_refusal_ends_when_a_neighbour_needs(full: FullHouse, what: str) -> None:
    if what == "less":
        full.neighbour.release(4 * MIB)
    else:
        full.neighbour.close()
    assert full.shares.reserve(4 * MIB, MIB) == 4 * MIB


def test_a_refusal_ends_when_we_may_have_more(full: FullHouse, tmp_path: Path) -> None:
    full.neighbour.release(60 * MIB)
    with contextlib.closing(Ledger.open(tmp_path / "ledgers", "GPU-a")) as other:
        (own, _) = sorted(other.snapshot().accounts, key=lambda each: each.slot)
        other.set_terms(own, maximum_bytes=40 * MIB)
        assert full.shares.reserve(4 * MIB, MIB) == 0
        other.set_terms(own, maximum_bytes=44 * MIB)
    assert full.shares.reserve(8 * MIB, MIB) == 4 * MIB


def test_a_refusal_ends_when_we_give_back_ourselves(full: FullHouse) -> None:
    full.shares.release(2 * MIB)
    assert full.shares.reserve(2 * MIB, MIB) == 2 * MIB
    assert full.shares.reserve(2 * MIB, MIB) == 0
    full.shares.cancel(2 * MIB)
    assert full.shares.reserve(2 * MIB, MIB) == 2 * MIB


def test_less_than_was_refused_may_be_there(full: FullHouse) -> None:
    full.shares.release(MIB)
    assert full.shares.reserve(8 * MIB, 2 * MIB) == 0
    assert full.shares.reserve(MIB, MIB) == MIB


def test_a_refusal_does_not_outlast_a_neighbour_that_was_killed(tmp_path: Path) -> None:
    """It writes nothing when it dies: only time tells."""
    folder = tmp_path / "ledgers"
    account = Ledger.open(folder, "GPU-a").join("engine", 100 * MIB)
    ours, theirs = fork.Pipe()

    def hoard() -> None:
        theirs.send(Ledger.open(folder, "GPU-a").join("neighbour", None).reserve(100 * MIB))
        signal.pause()

    process = fork.Process(target=hoard, daemon=True)
    process.start()
    assert ours.recv() == 100 * MIB
    shares = Shares([(account, 1)])
    assert shares.reserve(4 * MIB, MIB) == 0
    process.kill()
    process.join()
    ended = time.monotonic()
    while not shares.reserve(4 * MIB, MIB):
        assert time.monotonic() < ended + REFUSED_SECONDS + 1.0
        time.sleep(0.001)
    account.close()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("free_mib", [10, 500])
@pytest.mark.parametrize("taken_mib", [0, 30, 95])
def test_room_is_what_would_be_granted_and_takes_nothing(
    tmp_path: Path, ranks: int, free_mib: int, taken_mib: int
) -> None:
    """Beside a neighbour, with a guarantee and a maximum, and with memory that is there already."""
    folder = tmp_path / "ledgers"
    account = Ledger.open(folder, "GPU-a").join(
        "engine", 100 * MIB, minimum_bytes=20 * MIB, maximum_bytes=60 * MIB
    )
    neighbour = Ledger.open(folder, "GPU-a").join("neighbour", None)
    neighbour.reserve(taken_mib * MIB, MIB)
    shares = Shares([(account, ranks)], free_bytes=lambda: (taken_mib + free_mib) * MIB)
    shares.commit(shares.reserve(4 * MIB, MIB), 4 * MIB)
    before = account.view().used_bytes

    room = shares.room_bytes() // MIB * MIB

    assert account.view().used_bytes == before
    assert shares.reserve(1000 * MIB, MIB) == room > 0
    assert shares.room_bytes() // MIB == 0
    neighbour.close()
    account.close()


def test_commit_and_release_reach_every_device(accounts: dict[str, Account]) -> None:
    shares = Shares([(accounts["GPU-a"], 2), (accounts["GPU-b"], 1)])
    shares.reserve(16 * MIB, 8 * MIB)
    shares.commit(16 * MIB, 12 * MIB)
    assert [a.view().accounts[0].committed_bytes for a in accounts.values()] == [
        24 * MIB,
        12 * MIB,
    ]
    shares.release(12 * MIB)
    assert all(account.view().used_bytes == 0 for account in accounts.values())


def test_what_neighbours_are_owed_counts_for_each_worker(
    accounts: dict[str, Account], tmp_path: Path
) -> None:
    shares = Shares([(accounts["GPU-a"], 2)])
    shares.commit(shares.reserve(50 * MIB, MIB), 50 * MIB)
    idle = Spending(0, 0, 0, idle_bytes=50 * MIB, leaving_bytes=0, ages=())
    shares.report(idle, wanted_bytes=0, coveted_bytes=0)
    neighbour = Ledger.open(tmp_path / "ledgers", "GPU-a").join("neighbour", None)
    assert not shares.others_wait()
    neighbour.report(live_bytes=0, cached_bytes=0, wanted_bytes=9 * MIB)
    assert shares.others_wait()
    assert shares.owed_bytes() == 9 * MIB // 2
    neighbour.close()


def test_a_damaged_ledger_grants_nothing_and_raises_nothing(
    accounts: dict[str, Account], tmp_path: Path
) -> None:
    neighbour = Ledger.open(tmp_path / "ledgers", "GPU-a").join("neighbour", None)
    shares = Shares([(accounts["GPU-a"], 1), (accounts["GPU-b"], 1)])
    assert shares.reserve(8 * MIB, MIB) == 8 * MIB
    shares.cancel(8 * MIB)
    file = tmp_path / "ledgers" / "GPU-a.ledger"
    with file.open("r+b") as raw:
        raw.seek(records.HEADER_BYTES + neighbour.slot * records.RECORD_BYTES + records.USE.at)
        raw.write(b"\xff" * 16)
    neighbour.fix(1)
    assert shares.reserve(8 * MIB, MIB) == 8 * MIB, "its owner has mended it"
    with file.open("r+b") as raw:
        raw.seek(records.HEADER_BYTES + neighbour.slot * records.RECORD_BYTES + records.WHO.at + 9)
        raw.write(b"\xff" * 16)
    neighbour.fix(2)
    assert shares.reserve(8 * MIB, MIB) == 0
    assert shares.room_bytes() == 0
    neighbour.close()
