"""Engines under random load with aggressive release, compared with stock vLLM token for token.

    python -m integration.soak [--minutes 10] [--engines 1] [--seed S] [--stock]
        [--against FILE] [--json FILE]

Memory without content goes at once and cached blocks after 0.2 s, so that a block that is used
after its memory has gone is a fault of the process. Requests arrive in bursts, share prefixes, and
are cut off by closing their connection; the budget holds a part of them; limits move; a neighbour
in the ledger grabs memory, gives it back, leaves, and is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from integration.conftest import elastic_env, mixed_requests, write_test_model
from integration.engine import MIB, ArenaFiles, Request, Server, family, generate
from integration.gpu.record import MemorySampler, facts, write_json
from kvcached_plugins import control
from kvcached_vmm.errors import LedgerBusy
from kvcached_vmm.ledger import Ledger

EXTENT_BYTES = MIB
BUDGET_BYTES = 24 * MIB
"""For one engine: a burst of requests wants about twice as much."""
CLIENTS = 10
STOCK = ("--kv-cache-memory-bytes", str(64 * MIB))
AT_ONCE_S = 0.002
WARM_SAMPLES = 240
"""Seconds; before that processes still touch pages for the first time."""

LIMITS = ("none", "12MiB", "16MiB", "20MiB")
CACHES = ("none", "0", "4MiB")


@dataclass
class Findings:
    """What a soak did and saw. The seven that ``failures`` names are to be empty or 0."""

    completed: int = 0
    cut_off: int = 0
    tokens: int = 0
    preemptions: int = 0
    prefix_hits: int = 0
    limits_moved: int = 0
    neighbours: Counter[str] = field(default_factory=Counter)
    looks: int = 0
    longest_wait_s: float = 0.0
    different: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    over_committed_bytes: int = 0
    uncounted_bytes: int = 0
    grown: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def failures(self) -> dict[str, Any]:
        bad = ["different", "errors", "over_committed_bytes", "uncounted_bytes"]
        bad += ["grown", "left", "ended"]
        return {name: getattr(self, name) for name in bad if getattr(self, name)}


class Soak:
    """Servers with one budget, those who disturb them, and who looks on."""

    def __init__(
        self,
        model: Path,
        requests: Sequence[Request],
        reference: Sequence[list[int]],
        folder: Path,
        engines: int,
        seed: int,
        stock: bool,
    ) -> None:
        self._stock = stock
        self.stock_growth: dict[str, float] = {}
        """MiB a minute by which an engine grows without us: vLLM's worker does, on a CPU."""
        self._minutes = 0.0
        self.found = Findings()
        self._requests = requests
        self._reference = reference
        self._folder = folder / "ledger"
        self._seed = seed
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._budget = BUDGET_BYTES * engines
        env = {
            **elastic_env(self._folder),
            "KVCACHED_BUDGET": str(self._budget),
            "KVCACHED_EXTENT": str(EXTENT_BYTES),
            "KVCACHED_DECAY": "0",
            "KVCACHED_RESERVE": "0",
            "KVCACHED_CACHE_TTL": "0.2",
        }
        self.servers = [
            Server(model, folder / f"{name}.log", env={}, arguments=STOCK)
            if stock
            else Server(model, folder / f"{name}.log", env={**env, "KVCACHED_NAME": name})
            for name in (f"engine-{number}" for number in range(engines))
        ]
        self._samples: list[dict[str, float]] = []

    def run(self, minutes: float) -> Findings:
        self._minutes = minutes
        for server in self.servers:
            server.wait_ready()
        files = [ArenaFiles(server.process.pid) for server in self.servers]
        crowd = itertools.product(self.servers, range(CLIENTS))
        people = [functools.partial(self._client, *each) for each in crowd]
        people.append(self._sample)
        if not self._stock:
            people += [self._mover, self._neighbour, lambda: self._watch(files)]
        threads = [threading.Thread(target=self._guarded, args=(each,)) for each in people]
        for thread in threads:
            thread.start()
        self._over.wait(minutes * 60)
        self._over.set()
        for thread in threads:
            thread.join()
        if not self._stock:
            self._rest(files)
        self._draw_the_balance()
        return self.found

    def stop(self) -> None:
        self._over.set()
        for server in self.servers:
            server.stop()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.found.errors.append(repr(error))
            self._over.set()

    def _client(self, server: Server, number: int) -> None:
        chance = random.Random(f"{self._seed}/{server.url[-1:]}/{number}")
        while not self._over.is_set():
            if chance.random() < 0.08:
                self._over.wait(chance.uniform(0.2, 2.5))  # long enough to lose cache and memory
            index = min(int(chance.expovariate(0.02)), len(self._requests) - 1)
            began = time.monotonic()
            if chance.random() < 0.2:
                self._cut_off(server, self._requests[index], chance.randrange(8))
                continue
            tokens = server.complete(self._requests[index])
            with self._lock:
                found = self.found
                found.completed += 1
                found.tokens += len(tokens)
                found.longest_wait_s = max(found.longest_wait_s, time.monotonic() - began)
                if tokens != self._reference[index]:
                    found.different.append(index)

    def _cut_off(self, server: Server, request: Request, lines: int) -> None:
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

    def _mover(self) -> None:
        """Moves limits, and asks for everything that can be spared."""
        chance = random.Random(f"{self._seed}/mover")
        names = [f"engine-{number}" for number in range(len(self.servers))]
        while not self._over.wait(chance.uniform(0.1, 1.5)):
            with contextlib.suppress(LedgerBusy):
                if chance.random() < 0.3:
                    control.trim(chance.choice(names), self._folder)
                else:
                    control.limit(
                        chance.choice(names),
                        maximum=chance.choice(LIMITS),
                        cache=chance.choice(CACHES),
                        weight=chance.choice([0.5, 1, 2]),
                        directory=self._folder,
                    )
                self.found.limits_moved += 1
        for name in names:
            control.limit(name, maximum="none", cache="none", weight=1, directory=self._folder)

    def _neighbour(self) -> None:
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
            self.found.neighbours[how] += 1

    def _watch(self, files: list[ArenaFiles]) -> None:
        """Is more committed than there is, or more in memory than the ledger knows of?"""
        found = self.found
        with contextlib.closing(Ledger.open(self._folder, "host")) as ledger:
            while not self._over.wait(0.01):
                try:
                    began = time.monotonic()
                    before = ledger.snapshot()
                    in_kernel = sum(each.size_bytes() for each in files)
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
            self._samples.append(self._usage())
            for server in self.servers:
                if server.process.poll() is not None:
                    self.found.ended.append(str(server))
                    self._over.set()

    def _usage(self) -> dict[str, float]:
        """Anonymous memory by kind of process; descriptors, threads and processes of all servers.

        Pages of files and of KV caches are not anonymous.
        """
        total: Counter[str] = Counter()
        for server in self.servers:
            for process in family(server.process.pid):
                with contextlib.suppress(psutil.Error, OSError):
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    kib = int(status.partition("RssAnon:")[2].split()[0])
                    total[f"memory_mib {process.name()}"] += kib / 1024
                    total["descriptors"] += process.num_fds()
                    total["threads"] += process.num_threads()
                    total["processes"] += 1
        total["files"] = len(list(self._folder.iterdir())) if self._folder.exists() else 0
        return dict(total)

    def _rest(self, files: list[ArenaFiles]) -> None:
        """When all is over, each engine holds one extent and the ledger says so."""
        deadline = time.monotonic() + 10
        while True:
            accounts = control.read(self._folder).ledgers[0].accounts
            in_kernel = sum(each.size_bytes() for each in files)
            most = len(files) * EXTENT_BYTES
            at_rest = in_kernel <= most and sum(each.used_bytes for each in accounts) <= most
            if at_rest and len(accounts) == len(files):
                return
            if time.monotonic() > deadline:
                self.found.left.append(f"{in_kernel} bytes; {accounts}")
                return
            time.sleep(0.05)

    def _draw_the_balance(self) -> None:
        found, samples = self.found, self._samples
        for server in self.servers:
            found.preemptions += int(server.metric("vllm:num_preemptions_total"))
            found.prefix_hits += int(server.metric("vllm:prefix_cache_hits_total"))
        part = max(1, len(samples) // 4)
        for name in samples[-1] if samples else ():
            first, last = (
                median(each.get(name, 0) for each in some)
                for some in (samples[part : 2 * part] or samples, samples[-part:])
            )
            found.first[name], found.last[name] = round(first, 1), round(last, 1)
            of_memory = name.startswith("memory_mib")
            spare = {"descriptors": CLIENTS * len(self.servers), "threads": 4}.get(name, 0)
            if of_memory:
                without_us = self.stock_growth.get(name, 0.0) * len(self.servers)
                spare = max(0.05 * first, 1.1 * without_us * self._minutes / 2) + 16
            warm = not of_memory or len(samples) > WARM_SAMPLES
            if warm and last > first + spare:
                found.grown.append(f"{name}: {first:.1f} -> {last:.1f}")


def _grab(folder: Path, budget_bytes: int, share: float) -> None:
    """An engine of another kind: takes what it gets, up to its share, and gives it back."""
    chance = random.Random(os.getpid())
    account = Ledger.open(folder, "host").join("neighbour", budget_bytes, weight=0.5)
    end = time.monotonic() + chance.uniform(0.5, 4.0)
    held = 0
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


@contextlib.contextmanager
def soaking(
    model: Path,
    requests: Sequence[Request],
    reference: Sequence[list[int]],
    folder: Path,
    engines: int = 1,
    seed: int = 0,
    stock: bool = False,
) -> Iterator[Soak]:
    made = Soak(model, requests, reference, folder, engines, seed, stock)
    try:
        yield made
    finally:
        made.stop()


def growth(report: Path) -> dict[str, float]:
    """How much each figure of an engine grew in a minute; first and last are half a soak apart."""
    read = json.loads(report.read_text())
    found, setup = read["findings"], read["setup"]
    parts = setup["engines"] * setup["minutes"] / 2
    return {name: (found["last"][name] - was) / parts for name, was in found["first"].items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--engines", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--stock", action="store_true", help="the same without us, to compare with")
    parser.add_argument("--against", type=Path, help="what --stock --json wrote, for the growth")
    parser.add_argument("--json", type=Path, help="write the findings here")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="kvc-soak-") as name:
        folder = Path(name)
        model = write_test_model(folder / "model")
        requests = mixed_requests(120, seed=options.seed, longest=900)
        stock = generate(model, requests, folder, kv_cache_memory_bytes=256 * MIB)
        how = options.engines, options.seed, options.stock
        with soaking(model, requests, stock.tokens, folder, *how) as soak:
            soak.stock_growth = growth(options.against) if options.against else {}
            found = soak.run(options.minutes)
    print(json.dumps(vars(found), indent=1))
    if options.json:
        report = {
            "facts": facts(MemorySampler()),
            "setup": {
                "minutes": options.minutes,
                "engines": options.engines,
                "stock": options.stock,
                "seed": options.seed,
                "cores": os.cpu_count(),
                "budget_bytes": BUDGET_BYTES * options.engines,
                "extent_bytes": EXTENT_BYTES,
                "clients_per_engine": CLIENTS,
            },
            "passed": not found.failures(),
            "findings": vars(found),
        }
        write_json(options.json, report)
    for name, what in found.failures().items():
        print(f"Missed: {name}: {what}")
    return 1 if found.failures() else 0


if __name__ == "__main__":
    raise SystemExit(main())
