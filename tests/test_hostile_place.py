"""What can happen to the folder of a ledger, to its file and to processes, while engines run."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from kvcached_plugins import control
from kvcached_plugins.shares import Shares
from kvcached_vmm import records
from kvcached_vmm.account import Account
from kvcached_vmm.errors import LedgerError
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import MIB

BUDGET = 100 * MIB
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
fork = multiprocessing.get_context("fork")
Engines = Callable[..., Account]

_libc = ctypes.CDLL(None, use_errno=True)
_MS_REMOUNT, _MS_RDONLY, _MNT_DETACH = 32, 1, 2


@pytest.fixture
def engines(folder: Path) -> Iterator[Engines]:
    with contextlib.ExitStack() as opened:

        def engine(name: str = "engine", **terms: int) -> Account:
            ledger = opened.enter_context(contextlib.closing(Ledger.open(folder, "host")))
            return ledger.join(name, BUDGET, **terms)

        yield engine


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 KiB of our own."""
    path = tmp_path / "disk"
    path.mkdir()
    if _libc.mount(b"none", bytes(path), b"tmpfs", 0, b"size=512k,mode=0700"):
        pytest.skip(f"mount: {os.strerror(ctypes.get_errno())}")
    yield path
    _libc.umount2(bytes(path), _MNT_DETACH)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "everything").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def elsewhere(function: Callable[[], object]) -> object:
    """What ``function`` answers, or raises, in another process."""

    def run(pipe: Connection) -> None:
        try:
            pipe.send(function())
        except LedgerError as error:
            pipe.send(error)

    ours, theirs = fork.Pipe()
    process = fork.Process(target=run, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        return process.exitcode
    finally:
        process.join()


def a_new_engine(folder: Path) -> Callable[[], object]:
    return lambda: Ledger.open(folder, "host").join("new", BUDGET).reserve(BUDGET)


def look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcached_vmm.ledger.CHECK_SECONDS", 0.0)


def spend(account: Account) -> None:
    account.commit(account.reserve(10 * MIB), 5 * MIB)
    account.report(5 * MIB, 0)
    account.release(5 * MIB)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_engines_share_a_deleted_ledger_and_no_other_one_is_begun(
    engines: Engines, folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    look_at_once(monkeypatch)
    first, second = engines(), engines()
    first.reserve(40 * MIB)
    shutil.rmtree(folder) if what == "folder" else (folder / "host.ledger").unlink()

    spend(first)
    assert second.reserve(BUDGET) == 60 * MIB
    found = elsewhere(a_new_engine(folder))
    assert isinstance(found, LedgerError)
    assert str(found) == (
        f"The ledger {folder}/host.ledger was deleted while engines use it, and what they hold is "
        f"not known here: stop them first (process {os.getpid()}), or set KVCACHED_DIR to another "
        "folder."
    )
    first.close()
    second.close()
    assert elsewhere(a_new_engine(folder)) == BUDGET


def test_who_only_looks_at_a_deleted_ledger_is_in_nobodys_way(folder: Path) -> None:
    with contextlib.closing(Ledger.open(folder, "host")):
        (folder / "host.ledger").unlink()
        assert elsewhere(a_new_engine(folder)) == BUDGET


def test_an_engine_whose_ledger_is_replaced_gets_no_more_and_says_why_once(
    engines: Engines,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As if the other generation were in another container, which no look at /proc reveals."""
    look_at_once(monkeypatch)
    account = engines()
    shares = Shares([(account, 1)])
    shares.commit(shares.reserve(40 * MIB, MIB), 30 * MIB)
    (folder / "host.ledger").unlink()
    monkeypatch.setattr("kvcached_vmm.ledger_file.os.listdir", lambda _: [])
    engines("other generation")
    account.report(0, 0)

    assert [shares.reserve(MIB, MIB) for _ in range(3)] == [0, 0, 0]
    shares.release(10 * MIB)
    assert shares.owed_bytes() >= 0
    assert [each.message for each in caplog.records] == [
        f"kvcached: no more memory is granted: The ledger {folder}/host.ledger was replaced by "
        "another file, whose engines do not know of this one; restart this engine to use it."
    ]


@as_root
def test_a_disk_that_is_full_refuses_a_new_ledger_and_ends_nobody(disk: Path) -> None:
    """A write to a page that a sparse file has not got would be the end of the process."""
    folder = disk / "ledgers"
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        fill(disk)
        accounts = [ledger.join("first", BUDGET)]
        for _ in range(records.SLOTS - 1):  # writes to all of the file
            accounts.append(Ledger.open(folder, "host").join("engine", BUDGET))
        for account in accounts:
            spend(account)
            account.close()
    found = elsewhere(lambda: Ledger.open(folder, "GPU-1"))
    assert isinstance(found, LedgerError)
    assert str(found).endswith("GPU-1.ledger cannot be used: No space left on device.")


@as_root
def test_a_sparse_file_on_a_full_disk_is_refused_too(disk: Path) -> None:
    """A ledger that was copied, or made by who does not know better."""
    folder = disk / "ledgers"
    Ledger.open(folder, "host").close()
    path = folder / "host.ledger"
    header = path.read_bytes()[: records.HEADER_BYTES]
    path.write_bytes(header)
    os.truncate(path, records.FILE_BYTES)
    fill(disk)
    found = elsewhere(a_new_engine(folder))
    assert isinstance(found, LedgerError), found
    assert "No space left" in str(found)


@as_root
def test_a_disk_that_becomes_read_only_ends_nobody(disk: Path) -> None:
    folder = disk / "ledgers"
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        account = ledger.join("engine", BUDGET)
        flags = _MS_REMOUNT | _MS_RDONLY
        done = _libc.mount(b"none", bytes(disk), b"tmpfs", flags, b"") == 0
        spend(account)  # who has the file open for writing keeps the disk writable
        found = elsewhere(a_new_engine(folder))
        if done:
            assert isinstance(found, LedgerError)
            assert "Read-only file system" in str(found)
        account.close()


def test_the_clock_may_jump_by_years(
    engines: Engines, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = engines("first"), engines("second")
    clock = time.time
    for jump in (3600.0, -1e8, 1e9, -clock(), 1e300):
        monkeypatch.setattr("time.time", lambda jump=jump: clock() + jump)
        spend(first)
        second.report(0, 0, MIB)
        assert first.others_wait()
        assert first.reserve(30 * MIB, MIB) == 30 * MIB
        first.cancel(30 * MIB)
        second.report(0, 0)
        control.limit("first", maximum=50 * MIB, directory=folder)
        assert first.limit_bytes == 50 * MIB
        control.limit("first", maximum="none", directory=folder)
        assert {each.name for each in second.view().accounts} == {"first", "second"}


def test_a_pid_that_another_process_has_now_is_no_sign_of_life(
    engines: Engines, folder: Path
) -> None:
    """The record of the dead has the pid of somebody who lives: what counts is its lock."""

    def die() -> None:
        account = Ledger.open(folder, "host").join("dead", BUDGET)
        account.reserve(60 * MIB)
        os.kill(os.getpid(), signal.SIGKILL)

    survivor = engines("survivor")
    process = fork.Process(target=die, daemon=True)
    process.start()
    process.join()
    with (folder / "host.ledger").open("r+b") as file:
        at = records.HEADER_BYTES + records.RECORD_BYTES
        file.seek(at)
        who = list(records.WHO.unpack(file.read(records.RECORD_BYTES)) or ())
        assert who[0] == process.pid
        who[0] = os.getpid()
        file.seek(at)
        file.write(records.WHO.pack(tuple(who)))
    assert survivor.reserve(BUDGET) == BUDGET


def test_a_fork_in_the_middle_of_a_write_keeps_neither_lock_nor_record(
    engines: Engines, folder: Path
) -> None:
    """The child shares the open file, and the lock with it, until it closes its copy."""
    survivor, ledger = engines("survivor"), Ledger.open(folder, "host")
    ledger.join("forks", BUDGET).reserve(60 * MIB)
    ours, theirs = fork.Pipe()

    def child() -> None:
        theirs.send("runs")
        theirs.poll(20)

    with ledger._writing:
        process = fork.Process(target=child, daemon=True)
        process.start()
        assert ours.recv() == "runs"
        assert survivor.reserve(MIB) == 0
    assert survivor.reserve(MIB) == MIB
    ledger.close()
    assert survivor.reserve(BUDGET) == BUDGET - MIB
    process.kill()
    process.join()


def test_64_engines_that_start_at_once_all_get_their_part(tmp_path: Path) -> None:
    """None of them finds a folder or a file, and all make them."""
    folder = tmp_path / "new"
    start = fork.Barrier(64)
    ours, theirs = fork.Pipe(duplex=False)

    def engine(number: int) -> None:
        start.wait(60)
        account = Ledger.open(folder, "host").join(f"engine-{number}", 64 * MIB)
        end = time.monotonic() + 30
        while not (grant := account.reserve(MIB)):  # the others have had the lock for 0.1 s
            assert time.monotonic() < end
        account.commit(grant, grant)
        theirs.send_bytes(bytes([grant == MIB]))
        theirs.close()
        time.sleep(60)

    processes = [fork.Process(target=engine, args=(n,), daemon=True) for n in range(64)]
    for process in processes:
        process.start()
    theirs.close()  # of an engine that fails nothing comes, and then the pipe ends
    try:
        assert [ours.recv_bytes() for _ in processes] == [b"\1"] * 64
        with contextlib.closing(Ledger.open(folder, "host")) as ledger:
            view = ledger.snapshot()
            assert len({each.slot for each in view.accounts}) == 64
            assert {each.name for each in view.accounts} == {f"engine-{n}" for n in range(64)}
            assert view.used_bytes == view.budget_bytes == 64 * MIB
            for process in processes[::2]:
                process.kill()
            for process in processes[::2]:
                process.join()
            assert ledger.snapshot().used_bytes == 32 * MIB
    finally:
        for process in processes:
            process.kill()
            process.join()
