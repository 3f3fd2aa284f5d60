"""One file in which engines agree on who may use how much, whatever happens to any of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from kvcached_vmm.account import Account
from kvcached_vmm.errors import LedgerError
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import MIB

BUDGET = 100 * MIB
fork = multiprocessing.get_context("fork")
Engines = Callable[..., Account]


@pytest.fixture
def engines(folder: Path) -> Iterator[Engines]:
    """Makes accounts, each on a ledger of its own as in a process of its own."""
    opened: list[Ledger] = []

    def engine(name: str = "engine", budget: int | None = BUDGET, **terms: int) -> Account:
        opened.append(Ledger.open(folder, "host"))
        return opened[-1].join(name, budget, **terms)

    yield engine
    for ledger in opened:
        ledger.close()


@pytest.fixture
def onlooker(folder: Path) -> Iterator[Ledger]:
    """A ledger that has joined nothing."""
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        yield ledger


def test_grants_are_whole_units_of_what_nobody_uses(engines: Engines) -> None:
    first, second = engines(), engines()
    assert first.reserve(70 * MIB, 32 * MIB) == 64 * MIB
    assert second.reserve(70 * MIB, 32 * MIB) == 32 * MIB
    assert second.reserve(32 * MIB, 32 * MIB) == 0
    first.commit(64 * MIB, 40 * MIB)
    assert second.reserve(32 * MIB) == 28 * MIB
    first.release(40 * MIB)
    second.cancel(32 * MIB)
    assert first.reserve(BUDGET) == 72 * MIB


def test_nobody_is_granted_what_the_driver_has_not_got(engines: Engines) -> None:
    first, second = engines(), engines()
    assert first.reserve(BUDGET, 1, free_bytes=30 * MIB) == 30 * MIB
    assert second.reserve(BUDGET, 1, free_bytes=30 * MIB) == 0
    first.commit(30 * MIB, 30 * MIB)
    assert second.reserve(BUDGET, 1, free_bytes=-5) == 0


def test_a_guarantee_is_kept_from_others_until_its_owner_wants_it(engines: Engines) -> None:
    guest, owner = engines(), engines(minimum_bytes=40 * MIB)
    assert guest.reserve(BUDGET) == 60 * MIB
    assert owner.reserve(BUDGET) == 40 * MIB


@pytest.mark.parametrize("maximum", [0, 10 * MIB])
def test_a_maximum_holds_even_when_there_is_more(engines: Engines, maximum: int) -> None:
    modest = engines(maximum_bytes=maximum)
    assert modest.limit_bytes == maximum
    assert modest.reserve(BUDGET) == maximum
    assert modest.reserve(1) == 0


@pytest.mark.parametrize(("by_user", "left"), [(None, 30 * MIB), (BUDGET, BUDGET)])
def test_weights_count_against_the_default_budget_only(
    engines: Engines, by_user: int | None, left: int
) -> None:
    engines(budget=by_user, default_budget_bytes=BUDGET).fix(70 * MIB)
    assert engines(budget=None).reserve(BUDGET) == left


def test_what_is_wanted_and_since_when_can_be_seen(engines: Engines, onlooker: Ledger) -> None:
    account = engines("llama")
    account.reserve(BUDGET + MIB)
    account.report(live_bytes=3, cached_bytes=4, wanted_bytes=MIB)
    (seen,) = onlooker.snapshot().accounts
    assert (seen.name, seen.pid, seen.wanted_bytes) == ("llama", os.getpid(), MIB)
    assert (seen.live_bytes, seen.cached_bytes) == (3, 4)
    assert 0 < seen.waiting_since <= time.time()
    account.report(live_bytes=3, cached_bytes=4)
    (seen,) = onlooker.snapshot().accounts
    assert (seen.wanted_bytes, seen.waiting_since) == (0, 0.0)


def test_another_budget_than_the_one_in_use_is_refused(engines: Engines) -> None:
    first = engines()
    with pytest.raises(LedgerError, match=r"KVCACHED_BUDGET is 1 MiB, but .* share 100 MiB"):
        engines(budget=MIB)
    assert engines(budget=None).budget_bytes == first.budget_bytes == BUDGET


def test_whoever_comes_when_all_have_left_sets_the_budget(engines: Engines) -> None:
    engines().close()
    assert engines(budget=MIB).budget_bytes == MIB


def test_guarantees_that_do_not_fit_are_refused(engines: Engines, onlooker: Ledger) -> None:
    engines(minimum_bytes=60 * MIB)
    with pytest.raises(LedgerError, match="minimum of 50 MiB cannot be guaranteed: 60 MiB"):
        engines(minimum_bytes=50 * MIB)
    assert len(onlooker.snapshot().accounts) == 1
    engines(minimum_bytes=40 * MIB)


def test_leaving_wipes_only_the_own_record(engines: Engines, onlooker: Ledger) -> None:
    first, second = engines("llama"), engines("llama")
    first.reserve(MIB)
    second.reserve(2 * MIB)
    first.close()
    (left,) = onlooker.snapshot().accounts
    assert (left.name, left.reserved_bytes) == ("llama", 2 * MIB)


@pytest.mark.parametrize("name", ["", "ÄÖÜ" * 40, "x" * 500])
def test_any_name_fits(engines: Engines, name: str) -> None:
    (seen,) = engines(name).view().accounts
    assert name.startswith(seen.name.rstrip("\ufffd"))
    assert len(seen.name) >= min(len(name), 31)


def test_one_too_many_is_refused_and_a_record_is_used_again(
    engines: Engines, onlooker: Ledger
) -> None:
    accounts = [engines() for _ in range(256)]
    accounts[100].reserve(9 * MIB)
    accounts[100].fix(5)
    with pytest.raises(LedgerError, match="full: 256 engines use it"):
        engines()
    accounts[100].close()
    engines("late")
    view = onlooker.snapshot()
    assert len(view.accounts) == 256
    assert view.accounts[100].name == "late"
    assert view.used_bytes == 0


def test_an_open_ledger_serves_one_account(onlooker: Ledger) -> None:
    onlooker.join("first", BUDGET)
    with pytest.raises(ValueError, match="one account"):
        onlooker.join("second", BUDGET)


def test_an_account_may_be_closed_twice(engines: Engines) -> None:
    account = engines()
    account.close()
    account.close()


def test_an_engine_may_join_at_the_moment_at_which_another_leaves(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving, close = engines(), Ledger.close

    def join_first(ledger: Ledger) -> None:
        monkeypatch.setattr(Ledger, "close", close)
        engines("joining")
        close(ledger)

    monkeypatch.setattr(Ledger, "close", join_first)
    leaving.close()


def spend(folder: Path, seed: int, terms: dict[str, int], pipe: Connection) -> None:
    """Spend at random until told to stop, or killed; check what one engine can know alone."""
    chance = random.Random(seed)
    account = Ledger.open(folder, "host").join(f"spender-{seed}", BUDGET, **terms)
    pipe.send(os.getpid())
    reserved = committed = 0
    while not pipe.poll():
        size = chance.randrange(1, 40) * MIB
        action = chance.choice(["reserve", "reserve", "commit", "cancel", "release"])
        if action == "reserve":
            grant = account.reserve(size, MIB)
            assert 0 <= grant <= size
            reserved += grant
        elif action == "release":
            size = min(size, committed)
            account.release(size)
            committed -= size
        else:
            size = min(size, reserved)
            used = chance.randrange(size + 1) if action == "commit" else 0
            account.commit(size, used)
            reserved, committed = reserved - size, committed + used
        if account.is_late:  # somebody has lost its core with the lock held
            continue
        own = next(seen for seen in account.view().accounts if seen.pid == os.getpid())
        assert (own.reserved_bytes, own.committed_bytes) == (reserved, committed)
    account.close()


def test_processes_together_never_use_more_than_the_budget(folder: Path, onlooker: Ledger) -> None:
    pipes, processes = [], []
    terms_by_seed = {1: {"minimum_bytes": 30 * MIB}, 0: {}, 2: {"maximum_bytes": 20 * MIB}}
    for seed, terms in terms_by_seed.items():  # who has a guarantee comes before who could take it
        ours, theirs = fork.Pipe()
        process = fork.Process(target=spend, args=(folder, seed, terms, theirs), daemon=True)
        process.start()
        assert ours.recv() == process.pid
        pipes.append(ours)
        processes.append(process)
    most, start = 0, time.monotonic()
    while (passed := time.monotonic() - start) < 1.2 or (most <= BUDGET // 2 and passed < 20):
        view = onlooker.snapshot()
        used = {seen.name: seen.committed_bytes + seen.reserved_bytes for seen in view.accounts}
        assert len(used) == 3
        assert view.used_bytes == sum(used.values()) <= BUDGET
        assert used["spender-0"] + used["spender-2"] <= BUDGET - 30 * MIB
        assert used["spender-2"] <= 20 * MIB
        most = max(most, view.used_bytes)
    assert most > BUDGET // 2, "nobody spent much, so nothing was tested"

    os.kill(processes[1].pid, signal.SIGKILL)
    processes.pop(1).join()
    del pipes[1]
    assert "spender-0" not in {seen.name for seen in onlooker.snapshot().accounts}
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send("stop")
        process.join()
        assert process.exitcode == 0
    assert onlooker.join("heir", BUDGET).reserve(BUDGET) == BUDGET


def test_a_killed_engine_leaves_its_share_to_whoever_is_short(
    engines: Engines, folder: Path
) -> None:
    def hoard() -> None:
        theirs.send(Ledger.open(folder, "host").join("hoarder", BUDGET).reserve(60 * MIB))
        theirs.poll(60)

    survivor = engines()
    ours, theirs = fork.Pipe()
    process = fork.Process(target=hoard, daemon=True)
    process.start()
    assert ours.recv() == 60 * MIB
    assert survivor.reserve(BUDGET) == 40 * MIB
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert survivor.reserve(60 * MIB) == 60 * MIB


@pytest.mark.parametrize(
    "parent_ends",
    [
        False,
        True,
    ],
)
def test_a_child_has_no_part_in_its_parents_record(
    folder: Path, onlooker: Ledger, parent_ends: bool
) -> None:
    def child() -> None:
        with contextlib.suppress(ValueError, OSError):
            account.close()
        theirs.send("tried to end it")
        theirs.poll(60)

    ledger = Ledger.open(folder, "host")
    account = ledger.join("parent", BUDGET)
    ours, theirs = fork.Pipe()
    process = fork.Process(target=child, daemon=True)
    process.start()
    ours.recv()
    if parent_ends:
        ledger.close()
    alive = [seen.name for seen in onlooker.snapshot().accounts]
    process.kill()
    process.join()
    ledger.close()
    assert alive == ([] if parent_ends else ["parent"])
