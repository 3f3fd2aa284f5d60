"""Engines under random load with aggressive release, compared with stock vLLM token for token.

    python -m integration.soak [--minutes 10] [--engines 1] [--rate R] [--faults]
        [--poison nan|large] [--workers 1] [--seed S] [--json FILE]

Memory without content goes at once and cached blocks after 0.2 s, so that a block that is used
after its memory has gone is a fault of the process. Requests arrive in bursts, share prefixes, and
are cut off by closing their connection; the budget holds a part of them; limits move; a neighbour
in the ledger grabs memory, gives it back, leaves, and is killed. With ``--faults`` the engines
themselves, or one of their workers, are killed, ended, stopped and started again. With ``--poison``
memory that comes and memory that goes is filled with what spoils results.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from integration.conftest import elastic_env, mixed_requests, write_test_model
from integration.engine import MIB, Request, Server, generate
from integration.gpu.record import MemorySampler, facts, write_json
from integration.mishaps import Mishaps
from integration.places import FEW_KERNELS, Life, Place
from kvcached_plugins import control
from kvcached_vmm.errors import LedgerBusy
from kvcached_vmm.ledger import Ledger

EXTENT_BYTES = MIB
BUDGET_BYTES = 24 * MIB
"""For one engine: a burst of requests wants about twice as much."""
CLIENTS = 10
AT_ONCE_S = 0.002


class Setup(NamedTuple):
    """What a soak is to do.

    Attributes:
        rate: requests a second that come to each engine, in bursts; 0 for as many as it answers.
        faults: engines are killed, ended, stopped and started again.
        fault_pause_s: from one of those to the next, from and to.
        poison: what memory that comes and goes is filled with: `nan` or `large`.
        workers: of the last engine, which are tensor parallel; the others have one each.
    """

    minutes: float
    engines: int = 1
    seed: int = 0
    rate: float = 0.0
    faults: bool = False
    fault_pause_s: tuple[float, float] = (20.0, 90.0)
    poison: str = ""
    workers: int = 1


@dataclass
class Findings:
    """What a soak did and saw. Those that ``failures`` names are to be empty or 0."""

    completed: int = 0
    cut_off: int = 0
    lost: int = 0
    """Requests to an engine that was ended while they ran."""
    tokens: int = 0
    preemptions: int = 0
    prefix_hits: int = 0
    looks: int = 0
    longest_wait_s: float = 0.0
    longest_wait_of_stopped_s: float = 0.0
    """Of requests to an engine that was stopped while they ran."""
    mishaps: dict[str, Any] = field(default_factory=dict)
    different: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    over_committed_bytes: int = 0
    uncounted_bytes: int = 0
    grown: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    lives: list[dict[str, Any]] = field(default_factory=list)

    def failures(self) -> dict[str, Any]:
        bad = ["different", "errors", "over_committed_bytes", "uncounted_bytes"]
        bad += ["grown", "left", "ended"]
        return {name: getattr(self, name) for name in bad if getattr(self, name)}


class Soak:
    """Servers with one budget, those who disturb them, and who looks on."""

    def __init__(
        self,
        setup: Setup,
        model: Path,
        requests: Sequence[Request],
        reference: Sequence[list[int]],
        folder: Path,
    ) -> None:
        self._setup = setup
        self.found = Findings()
        self._requests = requests
        self._reference = reference
        self._folder = folder / "ledger"
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._files_in_folder: list[int] = []
        budget = BUDGET_BYTES * setup.engines
        env = {
            **elastic_env(self._folder),
            **FEW_KERNELS,
            "KVCACHED_BUDGET": str(budget),
            "KVCACHED_EXTENT": str(EXTENT_BYTES),
            "KVCACHED_DECAY": "0",
            "KVCACHED_RESERVE": "0",
            "KVCACHED_CACHE_TTL": "0.2",
            "KVCACHED_POISON": setup.poison,
        }
        names = [f"engine-{number}" for number in range(setup.engines)]

        def start(name: str, life: int) -> Server:
            workers = setup.workers if name == names[-1] else 1
            arguments = ("--tensor-parallel-size", str(workers))
            more = {**env, "KVCACHED_NAME": name}
            return Server(model, folder / f"{name}-{life}.log", env=more, arguments=arguments)

        self.places = [Place(name, functools.partial(start, name)) for name in names]
        how = budget, setup.seed, self._over, setup.fault_pause_s
        self._mishaps = Mishaps(self.places, self._folder, *how)

    def run(self) -> Findings:
        for place in self.places:
            place.wait_ready()
        crowd = itertools.product(self.places, range(CLIENTS))
        people: list[Callable[[], None]] = [
            functools.partial(self._client, *each) for each in crowd
        ]
        people += [self._sample, self._mishaps.move_limits, self._mishaps.grab, self._watch]
        if self._setup.faults:
            people.append(self._mishaps.fell)
        threads = [threading.Thread(target=self._guarded, args=(each,)) for each in people]
        for thread in threads:
            thread.start()
        self._over.wait(self._setup.minutes * 60)
        self._over.set()
        for thread in threads:
            thread.join()
        if not self.found.errors:
            self._mishaps.lift_limits()
            self._rest()
        self._draw_the_balance()
        return self.found

    def stop(self) -> None:
        self._over.set()
        for place in self.places:
            place.server.stop()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (Exception, pytest.fail.Exception) as error:
            print(f"A failure that ends the soak: {error!r}", flush=True)
            self.found.errors.append(repr(error))
            self._over.set()

    def _client(self, place: Place, number: int) -> None:
        chance = random.Random(f"{self._setup.seed}/{place.name}/{number}")
        while not self._over.is_set():
            self._pause(chance)
            if not place.up.wait(0.2):
                continue
            index = min(int(chance.expovariate(0.02)), len(self._requests) - 1)
            lines = chance.randrange(8) if chance.random() < 0.2 else None
            server, falls = place.server, place.falls
            began = time.monotonic()
            self._count(place, 1)
            try:
                if lines is not None:
                    self._cut_off(place, server, self._requests[index], lines)
                else:
                    tokens = server.complete(self._requests[index])
                    self._compare(place, falls, index, tokens, began)
            except (httpx.HTTPError, RuntimeError, AssertionError, ValueError):
                if place.falls == falls:
                    raise
                with self._lock:
                    self.found.lost += 1
            finally:
                self._count(place, -1)

    def _count(self, place: Place, requests: int) -> None:
        with self._lock:
            place.running += requests

    def _pause(self, chance: random.Random) -> None:
        """Until the next burst, which comes to all engines; if requests come one after another, now
        and then for long enough to lose cache and memory."""
        rate = self._setup.rate
        if rate:
            every = CLIENTS / rate
            self._over.wait(every - time.monotonic() % every + chance.uniform(0.0, 0.3))
        elif chance.random() < 0.08:
            self._over.wait(chance.uniform(0.2, 2.5))

    def _compare(
        self, place: Place, falls: int, index: int, tokens: list[int], began: float
    ) -> None:
        took = time.monotonic() - began
        expected = self._reference[index]
        with self._lock:
            found = self.found
            if place.falls != falls and tokens == expected[: len(tokens)] != expected:
                found.lost += 1  # vLLM answers with what it has when it is asked to end
                return
            found.completed += 1
            found.tokens += len(tokens)
            if began < place.disturbed_until:
                found.longest_wait_of_stopped_s = max(found.longest_wait_of_stopped_s, took)
            else:
                found.longest_wait_s = max(found.longest_wait_s, took)
            if tokens != expected:
                found.different.append(index)

    def _cut_off(self, place: Place, server: Server, request: Request, lines: int) -> None:
        """Close the connection after a few tokens."""
        body = {"model": "model", "prompt": request.prompt, "max_tokens": request.max_tokens}
        body |= {"temperature": 0, "stream": True}
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=120) as answer:
            for count, _ in enumerate(answer.iter_lines()):
                if count >= lines:
                    break
        with self._lock:
            self.found.cut_off += 1

    def _watch(self) -> None:
        """Is more committed than there is, or more in memory than the ledger knows of?"""
        found = self.found
        with contextlib.closing(Ledger.open(self._folder, "host")) as ledger:
            while not self._over.wait(0.02 if self._setup.rate else 0.01):
                try:
                    began = time.monotonic()
                    before = ledger.snapshot()
                    in_kernel = sum(place.kv_bytes() for place in self.places)
                    after = ledger.snapshot()
                except LedgerBusy:
                    continue
                found.looks += 1
                for view in (before, after):
                    over = view.used_bytes - view.budget_bytes
                    found.over_committed_bytes = max(found.over_committed_bytes, over)
                if time.monotonic() - began < AT_ONCE_S:
                    more = in_kernel - max(before.used_bytes, after.used_bytes)
                    found.uncounted_bytes = max(found.uncounted_bytes, more)

    def _sample(self) -> None:
        while not self._over.wait(1.0):
            for place in self.places:
                if not place.up.is_set():
                    continue
                life, falls = place.lives[-1], place.falls
                life.look()
                if life.server.process.poll() is not None and place.falls == falls:
                    self.found.ended.append(str(life.server))
                    self._over.set()
            if self._folder.exists():
                self._files_in_folder.append(len(list(self._folder.iterdir())))

    def _rest(self) -> None:
        """When all is over, each worker holds one extent and the ledger says so."""
        deadline = time.monotonic() + 10
        while True:
            accounts = control.read(self._folder).ledgers[0].accounts
            in_kernel = sum(place.kv_bytes() for place in self.places)
            most = (len(self.places) - 1 + self._setup.workers) * EXTENT_BYTES
            at_rest = in_kernel <= most and sum(each.used_bytes for each in accounts) <= most
            if at_rest and len(accounts) == len(self.places):
                return
            if time.monotonic() > deadline:
                self.found.left.append(f"{in_kernel} bytes; {accounts}")
                return
            time.sleep(0.05)

    def _draw_the_balance(self) -> None:
        found = self.found
        found.mishaps = vars(self._mishaps.seen)
        found.left += self._mishaps.seen.not_returned
        for place in self.places:
            with contextlib.suppress(httpx.HTTPError):
                found.preemptions += int(place.server.metric("vllm:num_preemptions_total"))
                found.prefix_hits += int(place.server.metric("vllm:prefix_cache_hits_total"))
            for life in place.lives:
                self._note(place, life)
        files = self._files_in_folder
        if files and max(files[-10:]) > max(files[: max(1, len(files) // 2)]):
            found.grown.append(f"files in the ledger's folder: {files[0]} -> {files[-1]}")

    def _note(self, place: Place, life: Life) -> None:
        first_and_last = life.first_and_last()
        if not first_and_last:
            return
        firsts, lasts = (
            {name: round(pair[at], 1) for name, pair in first_and_last.items()} for at in (0, 1)
        )
        about = {"engine": place.name, "minutes": round(life.minutes, 1)}
        self.found.lives.append({**about, "first": firsts, "last": lasts})
        grown = life.grown({"descriptors": CLIENTS, "threads": 4})
        self.found.grown += [f"{place.name}, {each}" for each in grown]


@contextlib.contextmanager
def soaking(
    setup: Setup,
    model: Path,
    requests: Sequence[Request],
    reference: Sequence[list[int]],
    folder: Path,
) -> Iterator[Soak]:
    made = Soak(setup, model, requests, reference, folder)
    try:
        yield made
    finally:
        made.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--engines", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--rate", type=float, default=0.0, help="requests/s for each engine")
    parser.add_argument("--faults", action="store_true", help="end, stop and restart engines")
    parser.add_argument("--poison", choices=("nan", "large"), default="", help="fill memory")
    parser.add_argument("--workers", type=int, default=1, help="of the last engine")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path, help="write the findings here")
    options = vars(parser.parse_args())
    report = options.pop("json")
    setup = Setup(**options)
    print(setup, flush=True)
    with tempfile.TemporaryDirectory(prefix="kvc-soak-") as name:
        folder = Path(name)
        model = write_test_model(folder / "model")
        requests = mixed_requests(120, seed=setup.seed, longest=900)
        stock = generate(model, requests, folder, kv_cache_memory_bytes=256 * MIB)
        with soaking(setup, model, requests, stock.tokens, folder) as soak:
            found = soak.run()
    print(json.dumps(vars(found), indent=1))
    if report:
        sizes = {"budget_bytes": BUDGET_BYTES * setup.engines, "extent_bytes": EXTENT_BYTES}
        more = {"cores": os.cpu_count(), "clients_per_engine": CLIENTS}
        write_json(
            report,
            {
                "facts": facts(MemorySampler()),
                "setup": {**setup._asdict(), **more, **sizes},
                "passed": not found.failures(),
                "findings": vars(found),
            },
        )
    for name, what in found.failures().items():
        print(f"Missed: {name}: {what}")
    return 1 if found.failures() else 0


if __name__ == "__main__":
    raise SystemExit(main())
