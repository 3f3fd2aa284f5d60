"""A process that is stopped while it has the ledger's lock stops nobody else.

The kernel takes the lock from who dies, not from who is stopped. Engines go on with what they have,
get nothing more meanwhile, and their records are right again as soon as the lock is free.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from kvcached_plugins.shares import Shares
from kvcached_vmm.account import Account
from kvcached_vmm.errors import LedgerBusy
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.records import AccountView
from kvcached_vmm.units import MIB

BUDGET = 100 * MIB
MOMENT_S = 0.05
"""What an engine may lose by somebody else's stop, however many calls it makes."""

fork = multiprocessing.get_context("fork")
Ran = Callable[..., object]


def hold(folder: Path, half_written: bool, pipe: Connection) -> None:
    """Stop in the middle of a write, as Ctrl-Z or a debugger would have it."""
    ledger = Ledger.open(folder, "host")
    account = ledger.join("holder", BUDGET)
    account.commit(account.reserve(10 * MIB), 10 * MIB)
    pipe.send(os.getpid())
    with ledger._writing:
        if half_written:
            place = slice(account._place.start, account._place.start + 30)
            was, ledger._map[place] = ledger._map[place], bytes(30)
        os.kill(os.getpid(), signal.SIGSTOP)
        if half_written:
            ledger._map[place] = was
    pipe.poll(60)


class Holder:
    """A process that has stopped with the lock held."""

    def __init__(self, folder: Path, half_written: bool = False) -> None:
        self._pipe, theirs = fork.Pipe()
        arguments = folder, half_written, theirs
        self.process: BaseProcess = fork.Process(target=hold, args=arguments, daemon=True)
        self.process.start()
        self.pid: int = self._pipe.recv()
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def let_go(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def account(folder: Path) -> Iterator[Account]:
    ledger = Ledger.open(folder, "host")
    account = ledger.join("engine", BUDGET)
    account.commit(account.reserve(40 * MIB), 40 * MIB)
    account.reserve(20 * MIB)
    yield account
    ledger.close()


@pytest.fixture(params=[False, True], ids=["between writes", "in the middle of a record"])
def holder(request: pytest.FixtureRequest, account: Account, folder: Path) -> Iterator[Holder]:
    holder = Holder(folder, half_written=request.param)
    yield holder
    holder.end()


def record(folder: Path, name: str = "engine") -> AccountView:
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        return next(each for each in ledger.snapshot().accounts if each.name == name)


def exact(folder: Path, account: Account) -> bool:
    seen = record(folder)
    return (seen.committed_bytes, seen.reserved_bytes) == (account._committed, account._reserved)


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def one_step(account: Account) -> None:
    """More calls than a step of a real engine makes."""
    for _ in range(20):
        account.cancel(account.reserve(MIB))
    account.others_wait()
    with contextlib.suppress(LedgerBusy):
        account.fair_share_bytes()
    account.report(30 * MIB, 5 * MIB, MIB)


def test_an_engine_goes_on_while_the_holder_of_the_lock_is_stopped(
    account: Account, holder: Holder, folder: Path
) -> None:
    one_step(account)  # whoever comes first waits, for a moment
    times = []
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        begin = time.monotonic()
        one_step(account)
        times.append(time.monotonic() - begin)
    assert account.held_up
    assert sorted(times)[len(times) // 2] < MOMENT_S / 10

    account.commit(20 * MIB, 5 * MIB)
    account.release(15 * MIB)
    account.report(30 * MIB, 0)
    assert account.reserve(MIB) == 0
    assert account.is_late

    holder.let_go()
    assert until(lambda: account.reserve(MIB) == MIB)
    assert not account.is_late
    assert exact(folder, account)
    seen = record(folder)
    assert (seen.committed_bytes, seen.reserved_bytes, seen.live_bytes) == (30 * MIB, MIB, 30 * MIB)
    assert account.reserve(BUDGET) == BUDGET - 10 * MIB - 31 * MIB


@pytest.mark.parametrize("call", ["reserve", "commit", "cancel", "release", "report", "close"])
def test_the_first_call_waits_for_a_moment_only(
    account: Account, holder: Holder, folder: Path, call: str
) -> None:
    calls: dict[str, Ran] = {
        "reserve": lambda: account.reserve(MIB),
        "commit": lambda: account.commit(MIB, MIB),
        "cancel": lambda: account.cancel(MIB),
        "release": lambda: account.release(MIB),
        "report": lambda: account.report(1, 2),
        "close": account.close,
    }
    begin = time.monotonic()
    calls[call]()
    assert time.monotonic() - begin < 1.0, "20 ms, on a machine that has nothing else to do"
    holder.let_go()
    if call == "close":
        with contextlib.closing(Ledger.open(folder, "host")) as ledger:
            assert until(lambda: [a.name for a in ledger.snapshot().accounts] == ["holder"])
    else:
        account.reserve(0)
        assert until(lambda: not account.held_up or account.reserve(0) > 0)
        account.report(1, 2)
        assert exact(folder, account)


def test_a_holder_that_is_killed_while_stopped_leaves_the_lock(
    account: Account, holder: Holder, folder: Path
) -> None:
    one_step(account)
    account.release(40 * MIB)
    holder.end()
    account.report(0, 0)
    assert exact(folder, account)
    assert account.reserve(BUDGET) == BUDGET - 20 * MIB


def test_people_see_who_is_there_though_somebody_holds_the_lock(
    account: Account, folder: Path
) -> None:
    holder = Holder(folder)
    begin = time.monotonic()
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        view = ledger.snapshot()
    assert time.monotonic() - begin < 1.0
    assert {each.name for each in view.accounts} == {"engine", "holder"}
    holder.end()


def test_the_dead_are_not_shown_though_they_cannot_be_collected(
    account: Account, folder: Path
) -> None:
    dead = Ledger.open(folder, "host")
    dead.join("dead", BUDGET).reserve(MIB)
    with contextlib.closing(Ledger.open(folder, "host")) as onlooker:
        holder = Holder(folder)
        dead.close()
        assert {each.name for each in onlooker.snapshot().accounts} == {"engine", "holder"}
        holder.let_go()
        assert until(lambda: account.reserve(30 * MIB) == 30 * MIB)
        holder.end()


def test_a_half_written_record_of_the_stopped_is_told_in_a_sentence(
    account: Account, folder: Path
) -> None:
    holder = Holder(folder, half_written=True)
    with (
        contextlib.closing(Ledger.open(folder, "host")) as ledger,
        pytest.raises(LedgerBusy, match=r"does not let go of the ledger .+kill -CONT.+\.$"),
    ):
        ledger.snapshot()
    holder.end()


def test_who_starts_or_changes_limits_waits_as_long_as_a_person_would(
    account: Account, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcached_vmm.locks.PATIENT_SECONDS", 0.3)
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        view = ledger.snapshot().accounts[0]
        holder = Holder(folder)
        for change in (
            lambda: ledger.set_terms(view, trim=True),
            lambda: ledger.join("late", BUDGET),
        ):
            begin = time.monotonic()
            with pytest.raises(LedgerBusy):
                change()
            assert 0.3 <= time.monotonic() - begin < 1.0
        holder.let_go()
        assert until(lambda: not Writes(ledger).held())
        ledger.set_terms(view, trim=True)
        assert account.terms.trims == 1
        holder.end()


class Writes:
    """Whether another process has the lock now."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def held(self) -> bool:
        try:
            with self._ledger._writing:
                return False
        except LedgerBusy:
            return True


def test_an_engine_complains_once_and_serves_on(
    account: Account, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shares = Shares([(account, 1)])
    holder = Holder(folder)
    assert [shares.reserve(MIB, MIB) for _ in range(5)] == [0] * 5
    assert shares.fair_share_bytes() >= 0
    assert shares.owed_bytes() >= 0
    shares.release(MIB)
    assert ["does not let go of the ledger" in each.message for each in caplog.records] == [True]
    holder.end()
    assert shares.reserve(MIB, MIB) == MIB
    assert caplog.records[-1].message == "kvcached: memory can be granted again."


def spend(folder: Path, seed: int, seconds: float, pipe: Connection) -> None:
    chance, account = random.Random(seed), Ledger.open(folder, "host").join(f"{seed}", BUDGET)
    end = time.monotonic() + seconds
    longest = 0.0
    while time.monotonic() < end:
        begin = time.monotonic()
        account.reserve(chance.randrange(20) * MIB)
        used = chance.randrange(account._reserved + 1)
        account.commit(chance.randrange(used, account._reserved + 1), used)
        account.release(chance.randrange(account._committed + 1))
        account.report(0, 0, chance.choice([0, MIB]))
        longest = max(longest, time.monotonic() - begin)
    until(lambda: (account.report(0, 0), not account.is_late)[1])
    pipe.send((account._committed + account._reserved, longest))
    pipe.poll(60)


def test_random_stops_over_commit_nothing_and_lose_no_byte(folder: Path) -> None:
    pipes, processes = [], []
    for seed in range(4):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=spend, args=(folder, seed, 3.0, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    chance = random.Random(1)
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            stopped = chance.choice(processes).pid
            os.kill(stopped, signal.SIGSTOP)
            for _ in range(50):
                with contextlib.suppress(LedgerBusy):
                    assert ledger.snapshot().used_bytes <= BUDGET
                time.sleep(0.001)
            os.kill(stopped, signal.SIGCONT)
        told = [pipe.recv()[0] for pipe in pipes]
        view = ledger.snapshot()
    assert sorted(each.used_bytes for each in view.accounts) == sorted(told)
    for process in processes:
        process.kill()
        process.join()
