"""What an engine may have: agreed at the start, changed by others at run time, always possible."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from kvcached_vmm.account import Account
from kvcached_vmm.errors import LedgerError
from kvcached_vmm.ledger import Ledger, devices
from kvcached_vmm.records import AccountView
from kvcached_vmm.units import MIB

BUDGET = 100 * MIB
fork = multiprocessing.get_context("fork")
Engines = Callable[..., Account]


@pytest.fixture
def engines(folder: Path) -> Iterator[Engines]:
    """Makes accounts, each on a ledger of its own as in a process of its own."""
    with contextlib.ExitStack() as opened:

        def engine(name: str = "engine", **terms: Any) -> Account:
            ledger = opened.enter_context(contextlib.closing(Ledger.open(folder, "host")))
            return ledger.join(name, BUDGET, **terms)

        yield engine


@pytest.fixture
def onlooker(folder: Path) -> Iterator[Ledger]:
    """A ledger that has joined nothing."""
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        yield ledger


def seen(ledger: Ledger, name: str = "engine") -> AccountView:
    return next(each for each in ledger.snapshot().accounts if each.name == name)


def in_another_process(target: Callable[[], object]) -> object:
    """The answer of ``target``, or what it raised."""

    def run(pipe: Connection) -> None:
        try:
            pipe.send(target())
        except Exception as error:
            pipe.send(error)

    ours, theirs = fork.Pipe()
    process = fork.Process(target=run, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(20)
    answer = ours.recv()
    process.join()
    return answer


def test_terms_that_another_process_sets_are_in_force_at_once(
    folder: Path, engines: Engines, onlooker: Ledger
) -> None:
    account = engines(weight=2.0)
    assert account.reserve(10 * MIB) == 10 * MIB
    view = seen(onlooker)

    def limit() -> None:
        with contextlib.closing(Ledger.open(folder, "host")) as ledger:
            ledger.set_terms(view, minimum_bytes=MIB, maximum_bytes=12 * MIB, cache_bytes=0)

    assert in_another_process(limit) is None
    assert account.limit_bytes == 12 * MIB
    assert account.reserve(BUDGET) == 2 * MIB
    assert (account.terms.cache, account.terms.weight) == (0, 2.0)
    onlooker.set_terms(view, no_maximum=True, no_cache_bound=True, trim=True)
    assert account.reserve(BUDGET) == 88 * MIB
    after = seen(onlooker)
    assert (after.maximum_bytes, after.cache_bytes, after.trims) == (None, None, 1)
    assert after.minimum_bytes == MIB


def test_a_maximum_below_what_is_used_converges_as_memory_comes_free(
    engines: Engines, onlooker: Ledger
) -> None:
    account = engines()
    account.commit(account.reserve(50 * MIB), 50 * MIB)
    onlooker.set_terms(seen(onlooker), maximum_bytes=20 * MIB)
    for _ in range(4):
        assert account.reserve(MIB) == 0
        account.release(8 * MIB)
    assert account.reserve(50 * MIB) == 2 * MIB


def test_a_minimum_set_later_is_kept_from_others_as_memory_comes_free(
    engines: Engines, onlooker: Ledger
) -> None:
    hoarder, late = engines("hoarder"), engines("late")
    hoarder.commit(hoarder.reserve(BUDGET), BUDGET)
    onlooker.set_terms(seen(onlooker, "late"), minimum_bytes=30 * MIB)
    assert late.reserve(MIB) == 0
    hoarder.release(20 * MIB)
    assert hoarder.reserve(MIB) == 0
    assert late.reserve(BUDGET) == 20 * MIB
    hoarder.release(20 * MIB)
    assert late.reserve(5 * MIB) == 5 * MIB
    assert hoarder.reserve(BUDGET) == 10 * MIB


def test_two_guarantees_that_are_not_met_yet_do_not_lock_each_other_out(engines: Engines) -> None:
    """What has come free is within the guarantee of either; nobody else may have it."""
    hoarder = engines()
    hoarder.commit(hoarder.reserve(90 * MIB), 90 * MIB)
    first, second = engines(minimum_bytes=30 * MIB), engines(minimum_bytes=30 * MIB)
    assert hoarder.reserve(MIB) == 0
    assert first.reserve(6 * MIB) == 6 * MIB
    assert second.reserve(30 * MIB) == 4 * MIB
    hoarder.release(40 * MIB)
    assert first.reserve(BUDGET) == 24 * MIB
    assert second.reserve(BUDGET) == 16 * MIB
    assert hoarder.reserve(MIB) == 0


def test_guarantees_that_do_not_fit_are_refused_and_change_nothing(
    engines: Engines, onlooker: Ledger
) -> None:
    engines("first", minimum_bytes=60 * MIB)
    second = engines("second", minimum_bytes=10 * MIB)
    with pytest.raises(LedgerError, match="minimum of 50 MiB cannot be guaranteed: 60 MiB"):
        onlooker.set_terms(seen(onlooker, "second"), minimum_bytes=50 * MIB, weight=3.0)
    assert (second.terms.minimum, second.terms.weight) == (10 * MIB, 1.0)
    onlooker.set_terms(seen(onlooker, "first"), minimum_bytes=50 * MIB)
    onlooker.set_terms(seen(onlooker, "second"), minimum_bytes=50 * MIB)


IMPOSSIBLE = [
    pytest.param({"minimum_bytes": 60, "maximum_bytes": 50}, "raise that first", id="min-over-max"),
    pytest.param({"weight": 0.0}, "from 0.001 to 1000", id="no-weight"),
    pytest.param({"weight": -1.0}, "from 0.001 to 1000", id="negative-weight"),
    pytest.param({"weight": math.nan}, "from 0.001 to 1000", id="no-number"),
    pytest.param({"weight": math.inf}, "from 0.001 to 1000", id="infinite-weight"),
    pytest.param({"minimum_bytes": -1}, "0 or more and less than", id="negative-minimum"),
    pytest.param({"maximum_bytes": -1}, "0 or more and less than", id="negative-maximum"),
    pytest.param({"maximum_bytes": 1 << 63}, "0 or more and less than", id="beyond-the-file"),
    pytest.param({"cache_bytes": 1 << 63}, "0 or more and less than", id="cache-beyond-that"),
]


@pytest.mark.parametrize(("terms", "told"), IMPOSSIBLE)
def test_impossible_terms_are_refused_at_run_time_and_at_the_start(
    engines: Engines, onlooker: Ledger, terms: dict[str, Any], told: str
) -> None:
    account, neighbour = engines(), engines("neighbour")
    before = account.terms
    with pytest.raises(LedgerError, match=told):
        onlooker.set_terms(seen(onlooker), **terms)
    with pytest.raises(LedgerError, match=told):
        engines("newcomer", **terms)
    assert account.terms == before
    assert {each.name for each in onlooker.snapshot().accounts} == {"engine", "neighbour"}
    assert neighbour.fair_share_bytes() == BUDGET


def test_terms_are_for_the_engine_that_was_seen_and_not_for_its_heir(
    engines: Engines, onlooker: Ledger
) -> None:
    gone = engines("llama")
    view = seen(onlooker, "llama")
    gone.close()
    heir = engines("llama")
    assert seen(onlooker, "llama").slot == view.slot
    for stale in (view, replace(seen(onlooker, "llama"), pid=1)):
        with pytest.raises(LedgerError, match="llama has left the ledger of host"):
            onlooker.set_terms(stale, maximum_bytes=0)
    assert heir.reserve(BUDGET) == BUDGET


def test_a_killed_engine_has_left_even_if_nobody_has_looked(folder: Path, onlooker: Ledger) -> None:
    def join() -> AccountView:
        ledger = Ledger.open(folder, "host")
        ledger.join("llama", BUDGET)
        return seen(ledger, "llama")

    view = in_another_process(join)
    assert isinstance(view, AccountView)
    with pytest.raises(LedgerError, match="llama has left"):
        onlooker.set_terms(view, trim=True)


def test_weights_and_minima_decide_shares_while_others_wait(
    engines: Engines, onlooker: Ledger
) -> None:
    heavy, light = engines("heavy", weight=3.0), engines("light")
    heavy.report(0, 0, BUDGET)
    light.report(0, 0, BUDGET)
    assert heavy.others_wait()
    assert (heavy.fair_share_bytes(), light.fair_share_bytes()) == (75 * MIB, 25 * MIB)
    assert light.reserve(BUDGET) == 25 * MIB
    onlooker.set_terms(seen(onlooker, "light"), minimum_bytes=40 * MIB)
    assert (heavy.fair_share_bytes(), light.fair_share_bytes()) == (60 * MIB, 40 * MIB)
    assert light.reserve(BUDGET) == 15 * MIB


def test_an_engine_that_needs_no_more_than_it_has_leaves_the_rest(engines: Engines) -> None:
    modest, hungry = engines("modest"), engines("hungry")
    modest.commit(modest.reserve(10 * MIB), 10 * MIB)
    modest.report(10 * MIB, 0, wanted_bytes=MIB)
    assert hungry.reserve(BUDGET) == 89 * MIB
    assert modest.reserve(MIB) == MIB
    modest.report(11 * MIB, 0)
    assert not hungry.others_wait()


def test_one_in_the_middle_of_starting_requests_is_still_one_that_waits(
    engines: Engines,
) -> None:
    """It gets what it has reported, and may need more at once; its next report tells."""
    owner, waiter = engines("owner"), engines("waiter")
    for engine in (owner, waiter):
        engine.commit(engine.reserve(50 * MIB), 50 * MIB)
    waiter.report(50 * MIB, 0, wanted_bytes=10 * MIB)
    waiter.release(50 * MIB)
    assert waiter.reserve(10 * MIB) == 10 * MIB
    assert owner.others_wait()
    assert owner.reserve(BUDGET) == 0
    assert waiter.reserve(40 * MIB) == 40 * MIB
    waiter.cancel(50 * MIB)
    waiter.report(0, 0)
    assert not owner.others_wait()
    assert owner.reserve(BUDGET) == 50 * MIB


def test_devices_are_those_that_have_a_ledger(folder: Path, tmp_path: Path) -> None:
    assert devices(tmp_path / "nowhere") == []
    assert not (tmp_path / "nowhere").exists()
    for device in ("host", "GPU-1"):
        Ledger.open(folder, device).close()
    (folder / "something else").touch()
    assert devices(folder) == ["GPU-1", "host"]
    with pytest.raises(LedgerError, match="cannot be read"):
        devices(folder / "host.ledger")


def test_a_closed_ledger_says_so(engines: Engines, onlooker: Ledger) -> None:
    account = engines()
    view = seen(onlooker)
    account.close()
    onlooker.close()
    for call in (
        onlooker.snapshot,
        lambda: onlooker.set_terms(view, trim=True),
        lambda: onlooker.join("late", BUDGET),
        lambda: account.reserve(1),
        lambda: account.report(0, 0),
        account.view,
        account.fair_share_bytes,
    ):
        with pytest.raises(LedgerError, match=r"host\.ledger is closed"):
            call()


def test_a_child_forked_while_a_thread_writes_can_leave(folder: Path) -> None:
    """A lock that a thread holds at the fork is held for ever in the child, which has no thread."""
    ledger = Ledger.open(folder, "host")
    account = ledger.join("parent", BUDGET)
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with ledger._threads:
            held.set()
            forked.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    child = os.fork()
    if child == 0:
        account.close()
        os._exit(7)
    forked.set()
    thread.join()
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        threading.Event().wait(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done, "the child hangs"
    assert os.waitstatus_to_exitcode(status) == 7
    assert seen(ledger, "parent").pid == os.getpid()
    ledger.close()
