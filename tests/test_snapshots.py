"""Who looks without the lock sees the ledger as it was at one moment, whoever writes or dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import struct
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Semaphore
from pathlib import Path

import pytest

from kvcached_vmm import records
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import MIB

BUDGET = 100 * MIB
fork = multiprocessing.get_context("fork")


@pytest.fixture
def onlooker(folder: Path) -> Iterator[Ledger]:
    """A ledger that has joined nothing."""
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        yield ledger


@contextlib.contextmanager
def running(target: Callable[..., None], *arguments: object, times: int = 1) -> Iterator[None]:
    """Processes that do something until they are killed; they have all begun."""
    begun = fork.Semaphore(0)
    processes = [
        ForkProcess(target=target, args=(begun, *arguments), daemon=True) for _ in range(times)
    ]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            assert begun.acquire(timeout=20)
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def take_all_or_nothing(begun: Semaphore, folder: Path) -> None:
    account = Ledger.open(folder, "host").join("glutton", BUDGET)
    begun.release()
    while True:
        account.cancel(account.reserve(BUDGET, BUDGET))


def seconds(duration: float) -> Iterator[None]:
    end = time.monotonic() + duration
    while time.monotonic() < end:
        yield


def test_what_is_used_twice_in_a_row_is_never_seen_twice_at_once(
    folder: Path, onlooker: Ledger
) -> None:
    """A reader that mixed two moments would see the whole budget taken by two engines."""
    seen = set()
    with running(take_all_or_nothing, folder, times=3):
        for _ in seconds(0.7):
            seen.add(onlooker.snapshot().used_bytes)
    assert seen == {0, BUDGET}


def test_changes_are_counted_forwards_only(folder: Path, onlooker: Ledger) -> None:
    """A count that came by the same figure again would hide that somebody wrote in between."""
    count, at = struct.Struct("<Q"), records.CHANGES_AT
    with running(take_all_or_nothing, folder):
        last = 0
        for _ in seconds(0.7):
            for _ in range(1000):
                now = count.unpack_from(onlooker._map, at)[0]
                assert now >= last
                last = now


def test_a_writer_that_died_while_writing_blocks_nobody(folder: Path, onlooker: Ledger) -> None:
    account = Ledger.open(folder, "host").join("engine", BUDGET)
    account.reserve(MIB)
    path = folder / "host.ledger"
    content = bytearray(path.read_bytes())
    (changes,) = struct.unpack_from("<Q", content, records.CHANGES_AT)
    with path.open("r+b") as file:  # as a writer that has begun leaves it
        file.seek(records.CHANGES_AT)
        file.write(struct.pack("<Q", changes + 1))
    assert onlooker.snapshot().used_bytes == MIB
    assert onlooker._count[0] == changes + 2
    assert account.reserve(MIB) == MIB
    assert onlooker.snapshot().used_bytes == 2 * MIB
    account.close()
