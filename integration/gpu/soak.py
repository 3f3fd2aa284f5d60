"""Minutes of random load on a server that gives memory back at once, and the same on a stock one.

    integration/gpu/run.sh soak --minutes 8

Both are `vllm serve` with CUDA graphs and asynchronous scheduling, and batch-invariant kernels, so
that tokens do not depend on who is batched with whom. Ours releases an extent as soon as it is
free and forgets prefixes after a second; memory is filled with NaN before blocks are handed out.
Requests share prefixes, come in waves, and one in eight of ours is called off; its KV cache is so
small that requests are preempted. Beside it the limit moves, caches are dropped, and an account of
another engine takes a part of the budget. Every answer must be that of the stock server. Writes
soak.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from integration.gpu import workload
from integration.gpu.options import parse_soak
from integration.gpu.process import exit_on_signals, stop_all
from integration.gpu.record import (
    Json,
    MemorySampler,
    facts,
    ledger_snapshot,
    write_json,
    write_tails,
)
from integration.gpu.server import Server
from integration.gpu.tenants import scrape
from integration.gpu.workload import Answer, Request
from integration.probe import wait_for_grant
from kvcached_vmm.ledger import Ledger

ARMS = ("off", "on")
BEST = 5
MARGIN_S = 25.0
"""Before the deadline: the last answers, results, the end of both servers."""
CALLED_OFF = 8
"""One request in so many is called off at a random moment."""


class Soak:
    """Both servers, what they were asked and what they answered."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.o = o
        o.out.mkdir(parents=True, exist_ok=True)
        self.work = Path(o.work) / f"soak-{int(o.started)}"
        self.work.mkdir()
        self.sampler = MemorySampler()
        self.facts = facts(self.sampler)
        self.device = self.facts["gpu"].get("uuid", "host")
        self.vocabulary = min(
            json.loads((Path(o.model) / "config.json").read_text())["vocab_size"], 120_000
        )
        o.plugin_env = {"KVCACHED_BUDGET": str(o.kv_bytes), **o.plugin_env}
        self.servers = {
            name: Server(name, o.port + number, self.work, o) for number, name in enumerate(ARMS)
        }
        self.answers: dict[str, dict[int, Answer]] = {name: {} for name in ARMS}
        self.failures: list[str] = []
        self.called_off = 0
        self.moves: dict[str, int] = {}
        self.notes: list[str] = []
        self.until = 0.0

    def play(self) -> None:
        o = self.o
        ready_by = min(o.started + o.deadline_s - 2 * MARGIN_S, time.time() + o.ready_s)
        while time.time() < ready_by and not all(s.usable for s in self.servers.values()):
            for server in self.servers.values():
                server.look()
                if server.child.returncode is not None:
                    self.notes.append(f"{server.name}: ended with {server.child.returncode}")
                    return
            time.sleep(0.2)
        if not all(server.usable for server in self.servers.values()):
            self.notes.append("not ready in time")
            return
        for server in self.servers.values():
            if o.reseed:
                server.found["reseeded"] = server.call("kvc_reseed", 60.0)
        self.until = min(time.time() + 60.0 * o.minutes, o.started + o.deadline_s - MARGIN_S)
        threads = [threading.Thread(target=self.load, args=(name,)) for name in ARMS]
        threads.append(threading.Thread(target=self.attempt, args=(self.meddle,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self.notes.append(f"{type(error).__name__}: {error}"[:300])

    def wave(self, number: int) -> list[Request]:
        """The requests of a wave; the same for both servers."""
        o = self.o
        return workload.staggered(o.wave, o.longest, o.answer, self.vocabulary, seed=1000 + number)

    def load(self, name: str) -> None:
        """Wave after wave, each with another number of requests at a time, until time is up."""
        o = self.o
        for number in range(10_000):
            dice = random.Random(number)
            together = dice.choice((o.together // 8 or 1, o.together // 2 or 1, o.together))
            off = {index for index in range(o.wave) if dice.randrange(CALLED_OFF) == 0}
            with ThreadPoolExecutor(together) as several:
                for index, request in enumerate(self.wave(number)):
                    if index not in off:
                        several.submit(self.ask, name, number * o.wave + index, request)
                    elif name == "on":
                        several.submit(self.call_off, request, dice.uniform(0.02, 1.0))
            if time.time() >= self.until:
                return

    def ask(self, name: str, key: int, request: Request) -> None:
        if time.time() >= self.until:
            return
        try:
            self.answers[name][key] = self.servers[name].complete(
                self.o.model, request, BEST, timeout_s=120.0
            )
        except Exception as error:
            self.failures.append(f"{name} {key}: {type(error).__name__}: {error}"[:200])

    def call_off(self, request: Request, after_s: float) -> None:
        if time.time() < self.until:
            self.called_off += 1
            with contextlib.suppress(OSError):
                self.servers["on"].complete(self.o.model, request, None, timeout_s=after_s)

    def meddle(self) -> None:
        """Move the limit, drop caches, be a neighbour, until time is up; then lift the limit."""
        dice = random.Random(7)
        with contextlib.closing(
            Ledger.open(self.servers["on"].folder / "ledger", self.device)
        ) as ledger:
            try:
                while time.time() < self.until:
                    what, action = dice.choice(
                        [
                            ("limit", self.limit),
                            ("trim", lambda ledger, dice: self.change(ledger, trim=True)),
                            ("neighbour", self.neighbour),
                        ]
                    )
                    with contextlib.suppress(TimeoutError):  # live blocks are not taken
                        action(ledger, dice)
                        self.moves[what] = self.moves.get(what, 0) + 1
                    time.sleep(dice.uniform(0.2, 2.0))
            finally:
                self.change(ledger, no_maximum=True)

    def limit(self, ledger: Ledger, dice: random.Random) -> None:
        self.change(ledger, maximum_bytes=int(self.o.kv_bytes * dice.uniform(0.5, 1.0)))

    def neighbour(self, ledger: Ledger, dice: random.Random) -> None:
        """Somebody takes up to a third of the budget for a second, and leaves without a word."""
        account = Ledger.open(ledger.path.parent, self.device).join("neighbour", None)
        try:
            unit = max(1, self.o.kv_bytes // 64)
            wait_for_grant(account, unit * dice.randint(4, 20), unit, timeout_s=5.0)
            time.sleep(dice.uniform(0.1, 1.0))
        finally:
            account.close()

    def change(self, ledger: Ledger, **terms: object) -> None:
        for account in ledger.snapshot().accounts:
            if account.name != "neighbour":
                ledger.set_terms(account, **terms)  # type: ignore[arg-type]

    def result(self) -> Json:
        both = sorted(self.answers["off"].keys() & self.answers["on"].keys())
        compared = workload.compare(*([self.answers[n][key] for key in both] for n in ARMS))
        preempted: Json = {}
        for name, server in self.servers.items():
            with contextlib.suppress(Exception):
                preempted[name] = scrape(server.port)["num_preemptions"]
        return {
            **self.facts,
            "parameters": {name: str(value) for name, value in vars(self.o).items()},
            "seconds": round(time.time() - self.o.started, 1),
            "answers": {name: len(found) for name, found in self.answers.items()},
            "compared": compared,
            "failures": self.failures[:20],
            "failed": len(self.failures),
            "called_off": self.called_off,
            "moves": self.moves,
            "preemptions": preempted,
            "ledger": ledger_snapshot(self.servers["on"].folder / "ledger", self.device),
            "servers": {n: s.describe(s.child.returncode) for n, s in self.servers.items()},
            "notes": self.notes,
        }


def passed(result: Json) -> bool:
    """Answers of both, all equal, none failed, and both servers still there."""
    compared = result["compared"]
    alive = all(each["exit_status"] is None for each in result["servers"].values())
    return bool(
        alive and compared["requests"] and not compared["differing"] and not result["failed"]
    )


def main(words: Sequence[str] | None = None) -> int:
    o = parse_soak(sys.argv[1:] if words is None else words, __doc__ or "")
    exit_on_signals()
    soak = Soak(o)
    try:
        soak.attempt(soak.play)
    finally:
        result = soak.result()
        stop_all()
        result["passed"] = passed(result) and not soak.notes
        write_json(o.out / "soak.json", result)
        write_tails(o.out / "soak-logs.txt", soak.work)
        told = ("answers", "compared", "failed", "called_off", "moves", "preemptions", "notes")
        print(json.dumps({name: result[name] for name in told}, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
