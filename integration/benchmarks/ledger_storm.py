"""Engines that reserve, release and change each other's terms at random, and are killed at random.

    python -m integration.benchmarks.ledger_storm [--processes 8] [--operations 1000000] [--seed S]
        [--json FILE]

Every process checks the whole ledger after each of its writes, before it lets go of the lock, and
its own record against what it knows. Some die by their own hand with half of a write done. An
onlooker checks snapshots, which take no lock, kills and starts anew. At the end the ledger must say
what the processes know, and nothing once they are gone.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import multiprocessing
import multiprocessing.sharedctypes
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import TracebackType

from integration.gpu.record import MemorySampler, facts, write_json
from kvcached_vmm.account import Account
from kvcached_vmm.errors import LedgerBusy, LedgerError
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.records import FILE_BYTES, NO_LIMIT, LedgerView
from kvcached_vmm.units import GIB, MIB

DEVICE = "storm"
BUDGET_BYTES = 64 * GIB
FIXED_BYTES = 13 * GIB
"""Weights of an engine that is never killed; they count where no user set the budget."""
UNIT_BYTES = 16 * MIB
MOST_UNITS = 800
SECONDS_BETWEEN_KILLS = 0.06
DEATHS_PER_OPERATION = 0.0005
SETTLE_SECONDS = 60.0


class Notes(ctypes.Structure):
    """What one worker tells, in memory that outlives it. It alone writes, but for the orders."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "operations",
            "checks",
            "grants",
            "short_grants",
            "half_written_records",
            "writing",
            "died_halfway",
            "over_committed_bytes",
            "broken_guarantees",
            "broken_maxima",
            "differences",
            "committed",
            "reserved",
            "finished",
            "order_to_finish",
            "order_to_leave",
        )
    )


@dataclass(frozen=True)
class Outcome:
    """What a storm did, and what it must not have done: the last six are to be 0."""

    processes: int
    operations: int
    seconds: float
    kills: int
    kills_with_the_lock_held: int
    deaths_halfway_through_a_write: int
    checks_under_the_lock: int
    snapshots: int
    grants: int
    short_grants: int
    half_written_records: int
    over_committed_bytes: int
    broken_guarantees: int
    broken_maxima: int
    differences: int
    bytes_that_the_dead_kept: int
    unexpected_deaths: int

    @property
    def passed(self) -> bool:
        return not any(getattr(self, field.name) for field in fields(self)[-6:])


class DeadlyMap(mmap.mmap):
    """The ledger's memory; the write that ``countdown`` counts down to is not finished."""

    countdown = 0
    notes: Notes

    def __setitem__(self, where: slice, raw: bytes) -> None:  # type: ignore[override]
        self.countdown -= 1
        if self.countdown == 0 and len(raw) > 8:
            half = len(raw) // 2
            super().__setitem__(slice(where.start, where.start + half), raw[:half])
            self.notes.died_halfway += 1
            os.kill(os.getpid(), signal.SIGKILL)
        super().__setitem__(where, raw)


class Engine:
    """One worker: what it knows of itself, and its account."""

    def __init__(self, directory: Path, index: int, notes: Notes, chance: random.Random) -> None:
        self.notes = notes
        self.chance = chance
        self.asked: tuple[int, int] | None = None
        """How much a ``reserve`` in progress wants, and in which units."""
        self.ledger = Ledger.open(directory, DEVICE)
        self.map = self.ledger._map = DeadlyMap(self.ledger._fd, FILE_BYTES)
        self.map.notes = notes
        self.map.countdown = chance.randrange(60)
        minimum = chance.choice([0, 0, BUDGET_BYTES // 16])
        terms = {"weight": chance.choice([0.5, 1.0, 2.0])}
        try:
            self.account = self.ledger.join(f"engine-{index}", None, minimum, **terms)
        except LedgerError:  # others have been promised more meanwhile
            self.account = self.ledger.join(f"engine-{index}", None, **terms)
        self.map.countdown = 0
        notes.committed = notes.reserved = 0
        self.check_every_write()

    def check_every_write(self) -> None:
        writing, engine = self.ledger._writing, self

        class Checked(type(writing)):  # type: ignore[misc]
            def __enter__(self) -> None:
                self.patiently()  # there are more processes than cores, and all want the lock
                super().__enter__()
                engine.notes.writing = 1

            def __exit__(
                self,
                kind: type[BaseException] | None,
                error: BaseException | None,
                trace: TracebackType | None,
            ) -> None:
                if kind is None:
                    engine.check()
                engine.notes.writing = 0
                super().__exit__(kind, error, trace)

        writing.__class__ = Checked

    def check(self) -> None:
        """With the lock held: is the budget kept, and was the last grant a right one?"""
        notes, account, ledger = self.notes, self.account, self.ledger
        notes.checks += 1
        _, _, _, capacity, by_user, _ = ledger._header()
        used = kept = 0
        for slot in ledger._used():
            try:
                _, terms, use, _ = ledger._record(slot)
            except LedgerError:
                notes.half_written_records += 1
                continue
            has = use.committed + use.reserved
            used += has
            kept += max(has, terms.minimum)
            capacity -= 0 if by_user else use.fixed
        notes.over_committed_bytes = max(notes.over_committed_bytes, used - capacity)
        own = account._committed + account._reserved
        granted = own - notes.committed - notes.reserved
        if self.asked is None:
            return
        terms = account.terms
        if granted and own > terms.minimum:
            notes.broken_guarantees += kept > capacity
        if granted:
            notes.broken_maxima += own > terms.maximum
        wanted, unit = self.asked
        due = min(wanted, terms.minimum - own + granted, terms.maximum - own + granted)
        notes.broken_guarantees += granted <= due - unit and capacity - used >= unit

    def run(self) -> None:
        notes, chance = self.notes, self.chance
        actions = [self.reserve] * 8 + [self.commit] * 5 + [self.cancel] * 2 + [self.release] * 4
        actions += [self.report] * 2
        while not notes.order_to_finish:
            if chance.random() < DEATHS_PER_OPERATION:
                self.map.countdown = chance.randrange(1, 4)
            (self.look if chance.random() < 0.01 else chance.choice(actions))()
            notes.operations += 1

    def some(self, most: int) -> int:
        return min(most, self.chance.randrange(MOST_UNITS) * UNIT_BYTES)

    def reserve(self) -> None:
        notes = self.notes
        self.asked = self.some(BUDGET_BYTES), UNIT_BYTES
        granted = self.account.reserve(*self.asked)
        notes.grants += granted > 0
        notes.short_grants += granted < self.asked[0]
        notes.reserved += granted
        self.asked = None

    def commit(self) -> None:
        granted = self.some(self.notes.reserved)
        used = self.some(granted)
        self.account.commit(granted, used)
        self.notes.reserved -= granted
        self.notes.committed += used

    def cancel(self) -> None:
        granted = self.some(self.notes.reserved)
        self.account.cancel(granted)
        self.notes.reserved -= granted

    def release(self) -> None:
        used = self.some(self.notes.committed)
        self.account.release(used)
        self.notes.committed -= used

    def report(self) -> None:
        live = self.some(self.notes.committed)
        wanted = self.chance.choice([0, 0, self.some(BUDGET_BYTES)])
        self.account.report(live, 0, wanted, idle_bytes=self.some(self.notes.committed - live))
        if self.account.others_wait():
            with contextlib.suppress(LedgerBusy):  # somebody lost its core with the lock held
                self.account.fair_share_bytes()

    def look(self) -> None:
        """See whether our record is as we know it; change somebody's terms."""
        notes, chance = self.notes, self.chance
        if self.account.is_late:
            return
        try:
            view = self.account.view()
        except LedgerBusy:
            return
        own = next(each for each in view.accounts if each.slot == self.account.slot)
        notes.differences += (own.committed_bytes, own.reserved_bytes) != (
            notes.committed,
            notes.reserved,
        )
        with contextlib.suppress(LedgerError):  # it has left, or too much is promised already
            self.ledger.set_terms(
                chance.choice(view.accounts[1:]),
                minimum_bytes=chance.choice([None, 0, self.some(BUDGET_BYTES // 16)]),
                maximum_bytes=chance.choice([None, self.some(NO_LIMIT)]),
                no_maximum=chance.random() < 0.5,
                weight=chance.choice([None, 0.5, 1.0, 2.0]),
                trim=chance.random() < 0.1,
            )


def _work(directory: Path, index: int, notes: Notes, seed: str) -> None:
    engine = Engine(directory, index, notes, random.Random(seed))
    engine.run()
    while engine.account.is_late:  # somebody else had lost its core with the lock held
        engine.account.report(0, 0)
    notes.finished = 1
    while not notes.order_to_leave:
        time.sleep(0.01)
    engine.account.close()


class Storm:
    """The parent: starts, kills, looks on, and draws the balance."""

    def __init__(self, directory: Path, processes: int, seed: int, by_user: bool) -> None:
        self._directory = directory
        self._seed = seed
        self._chance = random.Random(seed)
        self._context = multiprocessing.get_context("fork")
        self._notes = [multiprocessing.sharedctypes.RawValue(Notes) for _ in range(processes)]
        self._ledger = Ledger.open(directory, DEVICE)
        self.account: Account = self._ledger.join(
            "onlooker",
            BUDGET_BYTES if by_user else None,
            default_budget_bytes=BUDGET_BYTES,
        )
        self.account.fix(FIXED_BYTES)
        self._kills = self._writing = self._snapshots = self._over = self._deaths = 0
        self._processes = [self._start(index) for index in range(processes)]

    def _start(self, index: int) -> ForkProcess:
        notes = self._notes[index]
        seed = f"{self._seed}/{index}/{self._kills}/{notes.died_halfway}"
        arguments = self._directory, index, notes, seed
        process = self._context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        return process

    def _look(self) -> LedgerView:
        view = self._ledger.snapshot()
        self._snapshots += 1
        self._over = max(self._over, view.used_bytes - view.capacity_bytes)
        return view

    def _sum(self, name: str) -> int:
        return sum(getattr(notes, name) for notes in self._notes)

    def rage(self, operations: int) -> None:
        next_kill = 0.0
        while self._sum("operations") < operations and not self._deaths:
            with contextlib.suppress(LedgerBusy):
                self._look()
            self._replace_the_dead()
            if time.monotonic() > next_kill:
                self._kill(self._chance.randrange(len(self._processes)))
                next_kill = time.monotonic() + self._chance.uniform(0, 2 * SECONDS_BETWEEN_KILLS)

    def _replace_the_dead(self) -> None:
        for index, process in enumerate(self._processes):
            if process.exitcode is not None:
                self._deaths += process.exitcode != -signal.SIGKILL
                self._processes[index] = self._start(index)

    def _kill(self, index: int) -> None:
        self._processes[index].kill()
        self._processes[index].join()
        self._kills += 1
        self._writing += self._notes[index].writing
        self._notes[index].writing = 0

    def settle(self) -> tuple[int, int]:
        """How many records differ from what their owners know, and bytes that the dead kept."""
        for notes in self._notes:
            notes.order_to_finish = 1
        end = time.monotonic() + SETTLE_SECONDS
        while self._sum("finished") < len(self._notes) and not self._deaths:
            time.sleep(0.01)
            self._replace_the_dead()
            assert time.monotonic() < end, "a worker does not come to an end"
        told = {(0, 0), *((notes.committed, notes.reserved) for notes in self._notes)}
        view = self._look()
        differences = sum(
            (each.committed_bytes, each.reserved_bytes) not in told for each in view.accounts
        )
        differences += view.used_bytes != self._sum("committed") + self._sum("reserved")
        for index, notes in enumerate(self._notes):
            if index % 2:
                notes.order_to_leave = 1
                self._processes[index].join(SETTLE_SECONDS)
            else:
                self._kill(index)
        kept = self.account.view().capacity_bytes - self.account.reserve(BUDGET_BYTES)
        return differences, kept

    def outcome(self, operations: int) -> Outcome:
        begin = time.monotonic()
        self.rage(operations)
        seconds = time.monotonic() - begin
        done = self._sum("operations")
        differences, kept = self.settle()
        return Outcome(
            processes=len(self._processes),
            operations=done,
            seconds=round(seconds, 1),
            kills=self._kills,
            kills_with_the_lock_held=self._writing,
            deaths_halfway_through_a_write=self._sum("died_halfway"),
            checks_under_the_lock=self._sum("checks"),
            snapshots=self._snapshots,
            grants=self._sum("grants"),
            short_grants=self._sum("short_grants"),
            half_written_records=self._sum("half_written_records"),
            over_committed_bytes=max(
                self._over, *(notes.over_committed_bytes for notes in self._notes)
            ),
            broken_guarantees=self._sum("broken_guarantees"),
            broken_maxima=self._sum("broken_maxima"),
            differences=self._sum("differences") + differences,
            bytes_that_the_dead_kept=kept,
            unexpected_deaths=self._deaths,
        )

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._ledger.close()


@contextlib.contextmanager
def storm(directory: Path, processes: int, seed: int, by_user: bool = False) -> Iterator[Storm]:
    with contextlib.closing(Storm(directory, processes, seed, by_user)) as made:
        yield made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the outcome here")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        for budget in ("default", "user"):
            with storm(
                Path(folder) / budget, options.processes, options.seed, budget == "user"
            ) as raging:
                found = raging.outcome(options.operations // 2)
            outcomes[budget] = found
            print(f"budget set by {budget}:")
            for name, value in asdict(found).items():
                print(f"  {name:32s}{value:>9}", flush=True)
    if options.json:
        report = {
            "facts": facts(MemorySampler()),
            "setup": {
                "cores": os.cpu_count(),
                "seed": options.seed,
                "budget_bytes": BUDGET_BYTES,
                "fixed_bytes": FIXED_BYTES,
                "unit_bytes": UNIT_BYTES,
            },
            "passed": all(found.passed for found in outcomes.values()),
            "by_budget": {budget: asdict(found) for budget, found in outcomes.items()},
        }
        write_json(options.json, report)
    return 0 if all(found.passed for found in outcomes.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
