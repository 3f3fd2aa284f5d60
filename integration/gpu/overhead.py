"""What the elastic cache costs an engine that has the device to itself: plugin off against on.

Two ``vllm serve`` with the same KV bytes are up at once, and the same open-loop traffic goes to
one, then to the other, in turns: rates from light to saturated, short and long prompts, common
prefixes, long answers of staggered lengths. The most telling workloads come first, then all of them
again with other prompts, for as long as time allows. Writes overhead.json after each pair.

With ``--engines 3`` three elastic engines share these bytes, and each workload goes to the one that
has rested for longest: it gets its memory from the caches of the others, where stock has it all.
With ``--stock-engines 2`` stock takes turns as well, each of them with all these bytes, and with
``--roomy`` each elastic engine may have them all: what is left of a difference then is not due to
rests, or not to what neighbours give up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from integration.gpu import harness, slo, steps, traffic, watch
from integration.gpu.bursts import Load
from integration.gpu.machine import MachineSampler, spent
from integration.gpu.options import COMPILED
from integration.gpu.process import exit_on_signals, stop_all
from integration.gpu.record import GIB, Json
from integration.gpu.slo import Slo
from integration.gpu.tenants import OURS, STOCK, House, Seat
from integration.gpu.traffic import Ask
from integration.gpu.watch import LedgerWatch, gib
from kvcached_vmm.units import parse_size

ARMS = ("off", "on")
SATURATED = "saturated"
BESIDE_KV = 20 * GIB
"""Weights, activations, graphs and context of one 8B server, generously (measured: 17)."""
GOAL_THROUGHPUT = 0.995
"""Saturated output tokens per second, on over off, at least."""
GOAL_TTFT = 1.01
"""Mean TTFT below saturation, on over off, at most."""
ANY = Slo(ttft_s=1.0, tpot_s=0.05)
"""Only to use the figures that a service level comes with; no goal hangs on it."""
CAVEATS = [
    "Both servers hold their memory on one device while only one of them is loaded.",
    "CUDA graphs at few batch sizes, unless engine_args says otherwise: compare on with off.",
    "Start-up is of two servers that start at once, with a shared compile cache; onoff.py measures "
    "it alone.",
    "The first round includes the growth of the elastic cache from nothing.",
]
RECORDED = "Both kinds of engine recorded their steps, at 30 us each."
SMALL = {
    "kv_bytes": 64 << 20,
    "scale": 0.06,
    "rate_scale": 0.25,
    "seconds": 3.0,
    "tail_s": 10.0,
    "rounds": 1,
    "warmup": Load(2, 64, 4),
    "engine_args": {"enforce_eager": True},
}


class Work(NamedTuple):
    """A workload: its name, and what makes its requests from a seed."""

    name: str
    asks: Callable[[int], list[Ask]]
    below_saturation: bool = True


def workloads(o: argparse.Namespace) -> list[Work]:
    """All of them, in order of worth. ``--scale`` is for lengths, ``--rate-scale`` for rates."""
    seconds = o.seconds

    def tokens(count: int) -> int:
        return max(2, round(count * o.scale))

    def at(rate: float, prompt: int, output: int, seed: int) -> list[Ask]:
        return traffic.steady(rate * o.rate_scale, seconds, tokens(prompt), tokens(output), seed)

    def plain(rate: float) -> Callable[[int], list[Ask]]:
        return lambda seed: at(rate, 1024, 256, seed)

    count = max(4, round(256 * o.rate_scale * min(1.0, o.scale * 8)))
    return [
        Work(SATURATED, lambda seed: traffic.at_once(count, tokens(1024), tokens(256)), False),
        Work("half load, 11/s", plain(11.0)),
        Work(
            "common prefixes, 12/s",
            lambda seed: traffic.prefixed(at(12.0, 2176, 128, seed), 8, tokens(2048), seed),
        ),
        Work(
            "staggered answers, 4/s",
            lambda seed: traffic.staggered(at(4.0, 64, 256, seed), tokens(32), tokens(2048), seed),
        ),
        Work("short prompts, 40/s", lambda seed: at(40.0, 64, 64, seed)),
        Work("long prompts, 2/s", lambda seed: at(2.0, 6000, 128, seed)),
        Work("light, 2/s", plain(2.0)),
        Work("6/s", plain(6.0)),
        Work("16/s", plain(16.0)),
        Work("20/s", plain(20.0), False),
    ]


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = harness.parser(__doc__, "overhead.py")
    add = parser.add_argument
    add("--kv-bytes", type=parse_size, default=30 * GIB, help="of each server; less if need be")
    add("--engines", type=int, default=1, help="elastic engines, which take turns")
    add("--stock-engines", type=int, default=1, help="stock engines, which take turns")
    add("--roomy", action="store_true", help="a budget with --kv-bytes for each elastic engine")
    add("--seconds", type=float, default=10.0, help="arrivals of one run")
    add("--tail-s", type=float, default=25.0, help="from the last arrival to the end, at most")
    add("--rounds", type=int, default=3, help="at most, of all workloads")
    add("--scale", type=float, default=1.0, help="of all lengths")
    add("--rate-scale", type=float, default=1.0, help="of all rates")
    add("--only", default="", help="workloads whose name begins with this pattern")
    add("--steps", action="store_true", help="record each step of each engine, 30 us of its time")
    add("--warmup", type=harness.load, default=Load(32, 1024, 16), help="before the first run")
    parser.set_defaults(engine_args={"compilation_config": COMPILED}, ready_s=330.0)
    return harness.parse(parser, words, SMALL)


class Overhead:
    """Both servers, and what each workload took on them."""

    def __init__(self, run: harness.Run) -> None:
        o = run.o
        self.run = run
        self.runs: Json = {}
        self.left_out: list[str] = []
        slabs = o.stock_engines + (o.engines if o.roomy else 1)
        if run.on_gpu:
            beside = (o.stock_engines + o.engines) * BESIDE_KV
            o.kv_bytes = min(o.kv_bytes, (run.sampler.total_bytes - beside) // slabs // GIB * GIB)
        budget = o.kv_bytes * (o.engines if o.roomy else 1)
        off, on = numbered("off", o.stock_engines), numbered("on", o.engines)
        self.works = [work for work in workloads(o) if re.match(o.only, work.name)]
        self.turns = {"off": in_turn(off, len(self.works)), "on": in_turn(on, len(self.works))}
        self.steps = {name: run.work / f"steps-{name}.jsonl" for name in (off + on) if o.steps}
        recording = {name: steps.environment(path) for name, path in self.steps.items()}
        seats = {name: Seat(o.kv_bytes, STOCK, env=recording.get(name, {})) for name in off}
        for name in on:
            terms = {"KVCACHED_BUDGET": str(budget)}
            seats[name] = Seat(o.kv_bytes, OURS, env=terms | recording.get(name, {}))
        self.house = House(run, run.work / "both", seats)
        self.watch = LedgerWatch(self.house.ledger, run.device, 0.1)
        self.machine = MachineSampler()
        self.recorded: Json = {}

    def play(self) -> None:
        run, o = self.run, self.run.o
        self.watch.start()
        self.machine.start()
        if not self.house.wait_ready(min(run.deadline, time.time() + o.ready_s)):
            return
        warm = dict.fromkeys(self.house.tenants, 7)
        self.house.play("warm-up", o.warmup, warm, time.time() + 60.0)
        longest: dict[str, float] = {}
        for number in range(o.rounds):
            for index, work in enumerate(self.works):
                label = f"{number + 1}:{work.name}"
                expected = longest.get(work.name, 2 * (o.seconds + 6.0))
                if run.left_s() < 1.1 * expected:
                    self.left_out.append(label)
                    continue
                began = time.time()
                # Who comes first changes with each round, so that drift hits both.
                order = ARMS if number % 2 == 0 else ARMS[::-1]
                for arm in order:
                    self.one(label, work, arm, seed=1000 * (number + 1) + 10 * index)
                longest[work.name] = time.time() - began
                self.save()

    def one(self, label: str, work: Work, arm: str, seed: int) -> None:
        """One workload on one server."""
        run, o = self.run, self.run.o
        asks = work.asks(seed)
        name = f"{label.replace(':', '-').replace('/', '-per-').replace(' ', '-')}-{arm}"
        engine = next(self.turns[arm])
        before, counters = self.counted(engine), self.watch.counters()
        spent_before = spent(self.house.tenants[engine].child.pid)
        at, off, replies = self.house.send(name, {engine: asks}, seed, o.tail_s, run.deadline)
        found = slo.served(replies[engine], len(asks), ANY, at, off)
        found["engine"] = engine
        found["engine_ms"] = in_engine(before, self.counted(engine))
        spent_after = spent(self.house.tenants[engine].child.pid)
        found["processes"] = {
            what: round(spent_after[what] - spent_before[what], 3) for what in spent_after
        }
        found["machine"] = self.machine.window(at, time.time())
        found["first_token_ms"] = [
            [round(each.started - at, 3), round(1e3 * each.first_s, 1)] for each in replies[engine]
        ]
        found["at_s"] = round(at - o.started, 2)
        found["device_gib"] = run.sampler.window(at, time.time())
        if arm == "on":
            seen = watch.between(self.watch.samples, at, time.time())
            found["counters"] = {
                name: watch.counted(counters[name], now)
                for name, now in self.watch.counters().items()
                if name in counters
            }
            found["held_gib"] = {
                "first": gib(seen[0].used_bytes) if seen else None,
                "most": gib(max((each.used_bytes for each in seen), default=0)),
            }
        if found["failed"] or found["cut_off"]:
            told = f"{found['failed']} failed, {found['cut_off']} cut off"
            run.note(f"{label} {arm}: {told}: {found['errors']}")
        self.runs.setdefault(work.name, {}).setdefault(label.split(":")[0], {})[arm] = found
        print(f"{label} {arm}: ttft {found['ttft_ms']} tpot {found['tpot_ms']}", flush=True)

    def counted(self, engine: str) -> Json:
        try:
            return self.house.tenants[engine].metrics()
        except OSError as error:
            self.run.note(f"metrics of {engine}: {error}")
            return {}

    def end(self) -> None:
        self.machine.stop()
        self.watch.stop()
        self.house.stop()
        if self.steps:
            self.run.attempt("steps", self.look_at_steps)

    def look_at_steps(self) -> None:
        """The steps of all runs, when the engine cores have written theirs."""
        recorded = {name: steps.read(path) for name, path in self.steps.items()}
        windows: dict[str, list[tuple[float, float]]] = {}
        workloads: Json = {}
        for name, rounds in self.runs.items():
            of: dict[str, list[tuple[float, float]]] = {}
            for found in (arm for arms in rounds.values() for arm in arms.values()):
                at = self.run.o.started + found["at_s"]
                of.setdefault(found["engine"], []).append((at, at + found["duration_s"]))
            for engine, served in of.items():
                windows.setdefault(engine, []).extend(served)
            workloads[name] = steps.compared(recorded, of)
        self.recorded = steps.compared(recorded, windows) | {"workloads": workloads}
        print(json.dumps(self.recorded["added_ms"], indent=1), flush=True)

    def summary(self) -> Json:
        compared = {name: compare(rounds) for name, rounds in self.runs.items()}
        below = {work.name for work in workloads(self.run.o) if work.below_saturation}
        return {"workloads": compared, "goals": goals(compared, below)}

    def save(self) -> None:
        self.run.save(
            {
                "caveats": [*CAVEATS, *([RECORDED] if self.steps else [])],
                "kv_bytes": self.run.o.kv_bytes,
                "engines": self.run.o.engines,
                "stock_engines": self.run.o.stock_engines,
                "roomy": self.run.o.roomy,
                **self.summary(),
                "left_out": self.left_out,
                "runs": self.runs,
                "steps": self.recorded,
                "servers": self.house.describe(),
                "memory_series_gib": self.run.sampler.series(self.run.o.started, time.time(), 1.0),
            }
        )


def in_turn(engines: Sequence[str], per_round: int) -> Iterator[str]:
    """Engines one after the other, so many workloads in a round. Where each would get the same
    workloads in every round, rounds begin with another one: a process has its luck for life."""
    shift = per_round % len(engines) == 0
    for turn in itertools.count():
        yield engines[(turn + shift * (turn // per_round)) % len(engines)]


def numbered(name: str, count: int) -> list[str]:
    """``name``, ``name``-2, and so on."""
    return [name, *(f"{name}-{number}" for number in range(2, count + 1))]


def figures(found: Json) -> dict[str, float]:
    """The figures of one run that are compared."""
    told = {
        f"{which}_{what}": found[what][which]
        for what in ("ttft_ms", "tpot_ms")
        for which in ("mean", "median", "p99")
        if which in found[what]
    }
    if found["output_tokens_per_s"]:
        told["output_tokens_per_s"] = found["output_tokens_per_s"]
    return told


def compare(rounds: Mapping[str, Json]) -> Json:
    """Medians over the rounds for each arm, on over off of these, and of each round by itself."""
    whole = [each for each in rounds.values() if all(arm in each for arm in ARMS)]
    if not whole:
        return {}
    medians: dict[str, dict[str, float]] = {}
    for arm in ARMS:
        told = [figures(each[arm]) for each in whole]
        names = set.intersection(*(set(one) for one in told))
        medians[arm] = {
            name: round(statistics.median(one[name] for one in told), 3) for name in sorted(names)
        }
    return {
        "rounds": len(whole),
        **medians,
        "on_over_off": over(medians["off"], medians["on"]),
        "of_each_round": [over(figures(each["off"]), figures(each["on"])) for each in whole],
    }


def in_engine(before: Mapping[str, float], after: Mapping[str, float]) -> Json:
    """Where vLLM says that its requests waited: mean milliseconds in the queue and in prefill."""
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    count = spent.get("request_prefill_time_seconds_count")
    if not count:
        return {}
    return {
        part: round(1e3 * spent[f"request_{part}_time_seconds_sum"] / count, 3)
        for part in ("queue", "prefill")
    }


def over(off: Mapping[str, float], on: Mapping[str, float]) -> dict[str, float]:
    return {name: round(on[name] / off[name], 4) for name in off if off[name] and name in on}


def goals(compared: Mapping[str, Json], below: set[str]) -> Json:
    """Whether saturated throughput and mean TTFT below saturation are what they must be."""
    found: Json = {}
    rate = compared.get(SATURATED, {}).get("on_over_off", {}).get("output_tokens_per_s")
    if rate is not None:
        found["throughput"] = {
            "on_over_off": rate,
            "at_least": GOAL_THROUGHPUT,
            "met": rate >= GOAL_THROUGHPUT,
        }
    firsts = {
        name: each["on_over_off"]["mean_ttft_ms"]
        for name, each in compared.items()
        if name in below and "mean_ttft_ms" in each.get("on_over_off", {})
    }
    if firsts:
        worst = max(firsts, key=firsts.__getitem__)
        found["mean_ttft"] = {
            "worst_on_over_off": firsts[worst],
            "workload": worst,
            "at_most": GOAL_TTFT,
            "met": firsts[worst] <= GOAL_TTFT,
        }
    return found


def main() -> int:
    o = parse(sys.argv[1:])
    exit_on_signals()
    run = harness.Run("overhead", o, memory_every_s=1.0)
    overhead = Overhead(run)
    try:
        run.sampler.start()
        overhead.play()
    except Exception as error:
        run.note(f"{type(error).__name__}: {error}"[:300])
    finally:
        run.attempt("before the end", overhead.save)
        overhead.end()
        stop_all()
        run.sampler.stop()
        run.attempt("the last save", overhead.save)
        print(json.dumps(overhead.summary()["goals"], indent=1))
        print(f"ended after {time.time() - o.started:.1f} s, logs in {run.work}")
    told = overhead.summary()["goals"]
    return 0 if told and not run.notes and all(each["met"] for each in told.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
