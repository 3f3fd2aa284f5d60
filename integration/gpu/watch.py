"""The ledger over time, as another process sees it: who held how much, and was it ever too much."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from kvcached_vmm.ledger import SUFFIX, Ledger
from kvcached_vmm.records import Counters, LedgerView

Json = dict[str, Any]
GIB = 2**30


class Holding(NamedTuple):
    """Bytes of one engine; ``AccountView`` says what each is."""

    committed: int = 0
    reserved: int = 0
    live: int = 0
    cached: int = 0
    idle: int = 0
    leaving: int = 0
    wanted: int = 0

    @property
    def used(self) -> int:
        return self.committed + self.reserved


class Sample(NamedTuple):
    """One look at the ledger, at a moment in seconds since the epoch."""

    at: float
    capacity_bytes: int
    engines: dict[str, Holding]

    @property
    def used_bytes(self) -> int:
        return sum(each.used for each in self.engines.values())

    def of(self, name: str) -> Holding:
        return self.engines.get(name, Holding())


def sample(view: LedgerView, at: float) -> Sample:
    """What a snapshot says, by engine; one that is starting counts under its later name."""
    engines: dict[str, Holding] = {}
    for account in view.accounts:
        name = account.name.split(" ")[0]
        found = Holding(
            account.committed_bytes,
            account.reserved_bytes,
            account.live_bytes,
            account.cached_bytes,
            account.idle_bytes,
            account.leaving_bytes,
            account.wanted_bytes,
        )
        known = engines.get(name, Holding())
        engines[name] = Holding(*(one + two for one, two in zip(known, found, strict=True)))
    return Sample(at, view.capacity_bytes, engines)


class LedgerWatch(threading.Thread):
    """Looks every ``interval_s`` seconds from ``start`` to ``stop``, once there is a ledger."""

    def __init__(self, directory: Path, device: str, interval_s: float) -> None:
        super().__init__(daemon=True, name="ledger-watch")
        self.samples: list[Sample] = []
        self.errors: list[str] = []
        self._directory = directory
        self._device = device
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._opening = threading.Lock()
        self._ledger: Ledger | None = None

    def run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                view = self.view()
                if view is not None:
                    self.samples.append(sample(view, time.time()))
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}"[:300])

    def view(self) -> LedgerView | None:
        """The ledger now; None while there is none."""
        with self._opening:
            if self._ledger is None:
                if not (self._directory / f"{self._device}{SUFFIX}").exists():
                    return None
                self._ledger = Ledger.open(self._directory, self._device)
            return self._ledger.snapshot()

    def counters(self) -> dict[str, Counters]:
        view = self.view()
        return {} if view is None else {each.name: each.counters for each in view.accounts}

    def trim(self) -> None:
        """Ask every engine to give back all that it can spare."""
        view = self.view()
        if view is not None and self._ledger is not None:
            for account in view.accounts:
                self._ledger.set_terms(account, trim=True)

    def stop(self) -> None:
        self._stopped.set()
        if self.is_alive():
            self.join(5.0)
        if self._ledger is not None:
            with contextlib.suppress(Exception):
                self._ledger.close()


def between(samples: Sequence[Sample], begin: float, end: float) -> list[Sample]:
    return [each for each in samples if begin <= each.at <= end]


def budget_check(samples: Sequence[Sample]) -> Json:
    """The most that was used against what may be, and how closely was looked."""
    over = [each.used_bytes - each.capacity_bytes for each in samples]
    pauses = [b.at - a.at for a, b in itertools.pairwise(samples)]
    return {
        "samples": len(samples),
        "longest_pause_s": round(max(pauses, default=0.0), 3),
        "capacity_gib": gib(samples[-1].capacity_bytes) if samples else None,
        "max_used_gib": gib(max((each.used_bytes for each in samples), default=0)),
        "over_budget_bytes": max([0, *over]),
    }


def rise(samples: Sequence[Sample], name: str, began: float, ended: float) -> Json:
    """How an engine's memory grew in a burst, and what others gave for it.

    ``to_90_percent_s`` is from the burst's start until 90 % of its peak were held. What was cached
    counts as held; ``live_to_90_percent_s`` is the same for what requests use.
    """
    seen = between(samples, began, ended)
    if not seen:
        return {}
    used = [each.of(name).used for each in seen]
    live = [each.of(name).live for each in seen]
    others = [each.used_bytes - each.of(name).used for each in seen]

    def until(share: float, sizes: Sequence[int]) -> float:
        enough = share * max(sizes)
        at = next(each.at for each, size in zip(seen, sizes, strict=True) if size >= enough)
        return round(at - began, 3)

    waiting = [each for each in seen if each.of(name).wanted]
    return {
        "held_at_start_gib": gib(used[0]),
        "peak_gib": gib(max(used)),
        "live_peak_gib": gib(max(live)),
        "to_50_percent_s": until(0.5, used),
        "to_90_percent_s": until(0.9, used),
        "live_to_90_percent_s": until(0.9, live),
        "others_at_start_gib": gib(others[0]),
        "others_least_gib": gib(min(others)),
        "samples_waiting": len(waiting),
    }


def counted(before: Counters, after: Counters) -> Json:
    """What an engine did between two looks at its counters; a mean of 0 events is None."""
    old = asdict(before)
    delta = {name: value - old[name] for name, value in asdict(after).items()}
    found: Json = {name: round(value, 6) for name, value in delta.items()}
    found["reclaimed_gib"] = gib(found.pop("reclaimed_bytes"))
    reclaims, waits = found["reclaims"], found["waits"]
    found["mean_reclaim_ms"] = (
        round(1e3 * delta["reclaim_seconds"] / reclaims, 3) if reclaims else None
    )
    found["mean_wait_ms"] = round(1e3 * delta["wait_seconds"] / waits, 3) if waits else None
    return found


def holdings(view: LedgerView | None) -> Json:
    """Each engine's bytes in GiB, for a mark in the results."""
    if view is None:
        return {}
    return {
        name: {"used": gib(each.used)} | {what: gib(size) for what, size in each._asdict().items()}
        for name, each in sample(view, 0.0).engines.items()
    }


def series(samples: Sequence[Sample], begin: float, step_s: float) -> list[Json]:
    """Committed, live and cached of each engine in GiB, one point for every ``step_s``."""
    points: list[Json] = []
    due = begin
    for each in samples:
        if each.at >= due:
            due = each.at + step_s
            parts = {
                name: [gib(held.committed), gib(held.live), gib(held.cached)]
                for name, held in each.engines.items()
            }
            points.append({"s": round(each.at - begin, 2), **parts})
    return points


def seconds_until(
    holds: Callable[[], bool], timeout_s: float, step_s: float = 0.001
) -> float | None:
    """How long until ``holds``; None if that is not within ``timeout_s``."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > timeout_s:
            return None
        time.sleep(step_s)
    return time.monotonic() - began


def gib(size_bytes: float) -> float:
    return round(size_bytes / GIB, 4)
