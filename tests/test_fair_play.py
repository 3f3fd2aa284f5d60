"""Engines with more requests than memory settle at fair shares, soon, and stay there.

One has everything when the others come. Requests hold memory for a while and are never cut short,
so a share changes hands only as they end.
"""

from __future__ import annotations

import contextlib
import heapq
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvcached_vmm import account as account_module
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import MIB

BUDGET = 1000 * MIB
HOLD_SECONDS = 0.1, 0.6
SETTLED_SECONDS = 5.0
NEAR = 0.05
"""How far from its fair share an engine may be, as a part of it."""


class Engine:
    """An engine whose queue never ends. It reports the first ``queue_bytes`` of it as wanted."""

    def __init__(
        self,
        folder: Path,
        index: int,
        weight: float,
        step_s: float,
        queue_bytes: int,
        now: Callable[[], float],
    ) -> None:
        self.account = Ledger.open(folder, "host").join(f"engine-{index}", BUDGET, weight=weight)
        self.step_s = step_s
        self.used = 0
        self.samples: list[tuple[float, int]] = []
        self._queue_bytes = queue_bytes
        self._now = now
        self._chance = random.Random(index)
        self._running: list[tuple[float, int]] = []
        self._next = self._request()

    def _request(self) -> int:
        return self._chance.randrange(1, 9) * MIB

    def _may_start(self) -> bool:
        account = self.account
        if account.others_wait() and self.used + self._next > account.fair_share_bytes():
            return False
        return account.reserve(self._next, self._next) > 0

    def step(self) -> None:
        now = self._now()
        while self._running and self._running[0][0] <= now:
            ended = heapq.heappop(self._running)[1]
            self.account.release(ended)
            self.used -= ended
        while self._may_start():
            self.account.commit(self._next, self._next)
            self.used += self._next
            ends = now + self._chance.uniform(*HOLD_SECONDS)
            heapq.heappush(self._running, (ends, self._next))
            self._next = self._request()
        self.account.report(self.used, 0, max(self._next, self._queue_bytes))
        self.samples.append((now, self.used))


class Clock:
    """Stands in for ``time`` in the ledger; it goes as the simulation does."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@contextlib.contextmanager
def crowd(
    folder: Path,
    weights: Sequence[float],
    steps_s: Sequence[float],
    queue_bytes: int,
    now: Callable[[], float],
) -> Iterator[list[Engine]]:
    """Engines on one ledger, of which the first has taken all."""
    engines = [
        Engine(folder, index, weight, step_s, queue_bytes, now)
        for index, (weight, step_s) in enumerate(zip(weights, steps_s, strict=True))
    ]
    engines[0].step()
    assert engines[0].used > 0.99 * BUDGET
    yield engines
    for engine in engines:
        engine.account.close()


def play(clock: Clock, engines: Sequence[Engine], seconds: float) -> None:
    """Let engines step in turn, each at its own pace."""
    end = clock.now + seconds
    turns = [(clock.now, index) for index in range(len(engines))]
    while turns[0][0] < end:
        clock.now, index = heapq.heappop(turns)
        engines[index].step()
        heapq.heappush(turns, (clock.now + engines[index].step_s, index))


@pytest.mark.parametrize(
    ("weights", "steps_s", "queue_bytes"),
    [
        pytest.param([1, 1], [0.01, 0.01], 0, id="two-equals"),
        pytest.param([1, 1], [0.01, 0.05], 100 * MIB, id="the-newcomer-is-slow"),
        pytest.param([1, 1], [0.05, 0.01], 0, id="the-owner-is-slow"),
        pytest.param([1, 2, 1], [0.01, 0.01, 0.01], 0, id="three-by-weight"),
        pytest.param([1, 2, 1], [0.01, 0.03, 0.02], 100 * MIB, id="three-at-their-own-pace"),
    ],
)
def test_endless_demand_settles_at_fair_shares_and_stays_there(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: list[float],
    steps_s: list[float],
    queue_bytes: int,
) -> None:
    clock = Clock()
    monkeypatch.setattr(account_module, "time", clock)
    with crowd(folder, weights, steps_s, queue_bytes, clock.monotonic) as engines:
        settled = clock.now + SETTLED_SECONDS
        play(clock, engines, SETTLED_SECONDS + 2)
        for engine, weight in zip(engines, weights, strict=True):
            share = BUDGET * weight / sum(weights)
            used = [size for at, size in engine.samples if at >= settled]
            assert statistics.mean(used) == pytest.approx(share, rel=NEAR)
            assert max(used) - min(used) <= 2 * NEAR * share
        assert sum(engine.used for engine in engines) > 0.97 * BUDGET


def test_what_a_satisfied_engine_leaves_goes_to_those_that_want_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(account_module, "time", clock)
    with crowd(folder, [1, 1, 1], [0.01] * 3, 0, clock.monotonic) as engines:
        engines[2].account.commit(engines[2].account.reserve(MIB), 0)
        engines[2].account.report(0, 0)
        play(clock, engines[:2], SETTLED_SECONDS)
        assert [engine.used / BUDGET for engine in engines[:2]] == pytest.approx(
            [0.5, 0.5], rel=0.05
        )


def test_an_engine_that_has_stopped_while_it_waited_holds_nobody_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(account_module, "time", clock)
    with crowd(folder, [1, 1], [0.01] * 2, 2 * BUDGET, clock.monotonic) as engines:
        play(clock, engines, SETTLED_SECONDS)
        engines[1].account.release(engines[1].used)  # as when its process is under SIGSTOP
        play(clock, engines[:1], 2.0)
        assert engines[0].used > 0.97 * BUDGET


def test_threads_that_run_at_once_settle_as_well(folder: Path) -> None:
    def run(engine: Engine) -> None:
        while time.monotonic() < end:
            engine.step()
            time.sleep(engine.step_s)

    weights = [1.0, 2.0, 1.0]
    with crowd(folder, weights, [0.004, 0.008, 0.004], 100 * MIB, time.monotonic) as engines:
        end = time.monotonic() + 2.5
        threads = [threading.Thread(target=run, args=(engine,)) for engine in engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for engine, weight in zip(engines, weights, strict=True):
            used = [size for at, size in engine.samples if at >= end - 0.8]
            assert statistics.median(used) == pytest.approx(BUDGET * weight / 4, rel=NEAR)
