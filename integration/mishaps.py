"""What goes wrong in a soak: limits move, neighbours grab memory and are killed, engines fall."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from integration.engine import MIB, wait_until
from integration.places import KILLS, STOPS, Place
from kvcached_plugins import control
from kvcached_vmm.errors import LedgerBusy, LedgerError
from kvcached_vmm.ledger import Ledger

LIMITS = ("none", "12MiB", "16MiB", "20MiB")
CACHES = ("none", "0", "4MiB")
LONGEST_STOP_S = 12.0


@dataclass
class Seen:
    """What was done, and how memory came back. The lists are to be empty."""

    limits_moved: int = 0
    neighbours: dict[str, int] = field(default_factory=dict)
    engines: dict[str, int] = field(default_factory=dict)
    ended_only_when_killed: dict[str, int] = field(default_factory=dict)
    longest_return_s: float = 0.0
    """From the end of an engine's processes until the ledger had all that it held."""
    longest_start_s: float = 0.0
    not_returned: list[str] = field(default_factory=list)

    def count(self, kind: dict[str, int], what: str) -> None:
        kind[what] = kind.get(what, 0) + 1


class Mishaps:
    """Disturbs the engines of ``places`` until ``over`` is set.

    Args:
        folder: of the ledger.
        budget_bytes: what all engines share.
        pause_s: between one fall of an engine and the next, from and to.
    """

    def __init__(
        self,
        places: Sequence[Place],
        folder: Path,
        budget_bytes: int,
        seed: int,
        over: threading.Event,
        pause_s: tuple[float, float],
    ) -> None:
        self.seen = Seen()
        self._places = places
        self._folder = folder
        self._budget = budget_bytes
        self._seed = seed
        self._over = over
        self._pause_s = pause_s

    def move_limits(self) -> None:
        """Move limits, and ask for everything that can be spared."""
        chance = random.Random(f"{self._seed}/mover")
        while not self._over.wait(chance.uniform(0.1, 1.5)):
            place = chance.choice(self._places)
            with self._present(place):
                if chance.random() < 0.3:
                    control.trim(place.name, self._folder)
                else:
                    control.limit(
                        place.name,
                        maximum=chance.choice(LIMITS),
                        cache=chance.choice(CACHES),
                        weight=chance.choice([0.5, 1, 2]),
                        directory=self._folder,
                    )
                self.seen.limits_moved += 1

    def lift_limits(self) -> None:
        for place in self._places:
            control.limit(
                place.name, maximum="none", cache="none", weight=1, directory=self._folder
            )

    def grab(self) -> None:
        """Engines of another kind come, take, and go or are killed."""
        chance = random.Random(f"{self._seed}/neighbour")
        context = multiprocessing.get_context("spawn")
        while not self._over.wait(chance.uniform(0.1, 1.0)):
            process: BaseProcess = context.Process(
                target=_grab, args=(self._folder, self._budget, chance.random()), daemon=True
            )
            process.start()
            process.join(chance.uniform(1.0, 6.0))
            how = "killed" if process.exitcode is None else "left"
            process.kill()
            process.join()
            self.seen.count(self.seen.neighbours, how)

    def fell(self) -> None:
        """Kill, end and stop engines at random points of their load, now and then while idle, one
        at a time; one that has ended is started again. The first one is only stopped, so that one
        lives all along."""
        chance = random.Random(f"{self._seed}/falls")
        while not self._over.wait(chance.uniform(*self._pause_s)):
            place = chance.choice(self._places)
            kinds = STOPS if place is self._places[0] else (*KILLS, *STOPS)
            how = chance.choice(kinds)
            if chance.random() < 0.8:
                wait_until(lambda place=place: place.running > 0 or self._over.is_set(), 60.0, 0.01)
                self._over.wait(chance.uniform(0.0, 2.0))
            self.seen.count(self.seen.engines, how)
            if how in STOPS:
                place.hold_up(how, chance.uniform(1.0, LONGEST_STOP_S))
            else:
                self._end_and_begin(place, how)

    def _end_and_begin(self, place: Place, how: str) -> None:
        pids, alone = place.end(how)
        if not alone:
            self.seen.count(self.seen.ended_only_when_killed, how)
            place.server.stop()
        began = time.monotonic()
        if wait_until(lambda: not pids & self._in_ledger(), 10.0, 0.005):
            took = time.monotonic() - began
            self.seen.longest_return_s = max(self.seen.longest_return_s, took)
        else:
            self.seen.not_returned.append(f"{place.name}, {how}")
        began = time.monotonic()
        place.begin()
        self.seen.longest_start_s = max(self.seen.longest_start_s, time.monotonic() - began)

    def _in_ledger(self) -> set[int]:
        with contextlib.closing(Ledger.open(self._folder, "host")) as ledger:
            return {account.pid for account in ledger.snapshot().accounts}

    @contextlib.contextmanager
    def _present(self, place: Place) -> Iterator[None]:
        """An engine that is down has no limits; a stopped one may hold the ledger's lock."""
        falls = place.falls
        try:
            yield
        except LedgerBusy:
            return
        except (control.UnknownEngine, control.AmbiguousEngine, LedgerError):
            if place.up.is_set() and place.falls == falls:
                raise


def _grab(folder: Path, budget_bytes: int, share: float) -> None:
    """Take what is granted, up to a share, and give it back."""
    chance = random.Random(os.getpid())
    account = Ledger.open(folder, "host").join("neighbour", budget_bytes, weight=0.5)
    end = time.monotonic() + chance.uniform(0.5, 4.0)
    held = 0
    with contextlib.suppress(LedgerError):  # a stopped engine may hold the lock: leave
        while time.monotonic() < end:
            wanted = int(share * budget_bytes / 2)
            granted = account.reserve(max(0, wanted - held), MIB)
            account.commit(granted, granted)
            held += granted
            account.report(held, 0, max(0, wanted - held))
            time.sleep(chance.uniform(0.01, 0.2))
            if account.others_wait() or chance.random() < 0.2:
                back = chance.randrange(held // MIB + 1) * MIB
                account.release(back)
                held -= back
                account.report(held, 0)
    account.close()
