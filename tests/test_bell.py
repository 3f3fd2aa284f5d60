"""A bell wakes whoever waits, in this process or another, and never keeps anybody for long."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from kvcached_vmm import bell as bell_module
from kvcached_vmm.account import Account
from kvcached_vmm.bell import Bell
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import MIB

BUDGET = 100 * MIB
AT_ONCE = 0.1
"""Seconds. Milliseconds are usual; this machine may be busy."""
LONG = 20.0
fork = multiprocessing.get_context("fork")


@pytest.fixture
def shared() -> Iterator[mmap.mmap]:
    with contextlib.closing(mmap.mmap(-1, mmap.PAGESIZE)) as shared:
        yield shared


@pytest.fixture
def account(folder: Path) -> Iterator[Account]:
    with contextlib.closing(Ledger.open(folder, "host").join("ours", BUDGET)) as account:
        yield account


def timed_wait(bell: Bell, heard: int, timeout_s: float) -> float:
    start = time.monotonic()
    bell.wait(heard, timeout_s)
    return time.monotonic() - start


def test_who_has_not_heard_the_last_ring_does_not_wait(shared: mmap.mmap) -> None:
    bell = Bell(shared, 40)
    heard = bell.rings
    bell.ring()
    assert timed_wait(bell, heard, LONG) < AT_ONCE


def test_a_silent_bell_keeps_nobody_beyond_the_limit(shared: mmap.mmap) -> None:
    bell = Bell(shared, 40)
    assert 0.02 <= timed_wait(bell, bell.rings, 0.02) < 0.02 + AT_ONCE


def test_the_interpreter_runs_on_while_one_thread_waits(shared: mmap.mmap) -> None:
    bell = Bell(shared, 40)
    waiter = threading.Thread(target=bell.wait, args=(bell.rings, LONG))
    waiter.start()
    time.sleep(0.05)
    bell.ring()
    waiter.join(AT_ONCE)
    assert not waiter.is_alive()


def test_a_slow_ringer_does_not_unring_the_bell(
    shared: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ring while a third is about to; who has heard them hears the one after it, too."""
    bell, slow = Bell(shared, 40), Bell(shared, 40)
    before = bell.rings
    bell.ring()
    bell.ring()
    heard = bell.rings
    with monkeypatch.context() as late:
        late.setattr(Bell, "rings", before)
        slow.ring()
    bell.ring()
    assert bell.rings != heard


def test_a_closed_bell_keeps_nobody(shared: mmap.mmap) -> None:
    bell = Bell(shared, 40)
    heard = bell.rings
    shared.close()
    assert timed_wait(bell, heard, LONG) < AT_ONCE


def test_machines_whose_system_call_is_unknown_look_often(
    shared: mmap.mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bell_module, "_FUTEX", None)
    bell = Bell(shared, 40)
    bell.ring()
    assert timed_wait(bell, bell.rings, LONG) < AT_ONCE


def listen(folder: Path, pipe: Connection) -> None:
    """Tell how long after each need arose it was heard of."""
    account = Ledger.open(folder, "host").join("listener", None)
    heard = account.wait_for_bell(0, 0)
    pipe.send("ready")
    while pipe.recv() == "wait":
        pipe.send("waiting")
        heard = account.wait_for_bell(heard, LONG)
        now = time.monotonic()
        wanted = sum(each.wanted_bytes for each in account.view().accounts)
        pipe.send((now, wanted))


def test_a_new_need_wakes_another_process_within_milliseconds(
    folder: Path, account: Account
) -> None:
    ours, theirs = fork.Pipe()
    process = fork.Process(target=listen, args=(folder, theirs), daemon=True)
    process.start()
    assert ours.recv() == "ready"
    delays = []
    for wanted in range(1, 11):
        ours.send("wait")
        ours.recv()
        time.sleep(0.02)
        asked = time.monotonic()
        account.report(0, 0, wanted * MIB)
        woken, seen = ours.recv()
        assert seen == wanted * MIB
        delays.append(woken - asked)
    process.kill()
    process.join()
    assert sorted(delays)[len(delays) // 2] < 0.005


def test_needs_that_are_not_new_ring_no_bell(account: Account) -> None:
    account.report(0, 0, 5 * MIB)
    heard = account.wait_for_bell(0, 0)
    account.report(0, 0, 5 * MIB)
    account.report(0, 0, 4 * MIB)
    assert account.wait_for_bell(heard, 0.0) == heard
    account.report(0, 0, 4 * MIB, coveted_bytes=MIB)
    assert account.wait_for_bell(heard, LONG) != heard


def test_what_was_welcome_and_is_needed_now_rings(account: Account) -> None:
    """It is not more than before, but others give for it what they would have kept."""
    account.report(0, 0, coveted_bytes=5 * MIB)
    heard = account.wait_for_bell(0, 0)
    account.report(0, 0, 4 * MIB, coveted_bytes=MIB)
    assert account.wait_for_bell(heard, LONG) != heard


@pytest.mark.parametrize("by", ["account", "ledger"])
def test_a_thread_that_waits_learns_that_its_account_was_closed(folder: Path, by: str) -> None:
    ledger = Ledger.open(folder, "host")
    account = ledger.join("ours", BUDGET)
    answers: list[int] = []

    def wait() -> None:
        heard = account.wait_for_bell(0, 0)
        while heard != -1:
            heard = account.wait_for_bell(heard, LONG)
        answers.append(heard)

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.05)
    (account if by == "account" else ledger).close()
    waiter.join(5 * AT_ONCE)
    assert answers == [-1]
    assert account.wait_for_bell(0, LONG) == -1


def test_an_engine_that_leaves_or_gets_other_terms_is_heard_by_the_others(
    folder: Path, account: Account
) -> None:
    neighbour = Ledger.open(folder, "host").join("neighbour", None)
    heard = account.wait_for_bell(0, 0)
    with contextlib.closing(Ledger.open(folder, "host")) as onlooker:
        view = next(each for each in onlooker.snapshot().accounts if each.name == "ours")
        onlooker.set_terms(view, trim=True)
    again = account.wait_for_bell(heard, LONG)
    assert again != heard
    neighbour.close()
    assert account.wait_for_bell(again, LONG) != again
