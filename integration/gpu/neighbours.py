"""Two stock ``vllm serve`` in one budget that cannot hold both of their peaks, bursts in turn.

First with the plugin and one budget, then stock with half of it each, the same bursts. Every 25 ms
the ledger is read, every 50 ms the device's memory. Writes neighbours.json, again after each burst.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from integration.gpu import harness, watch
from integration.gpu.bursts import ENGINES, Load, Phase, figures, ratios, schedule
from integration.gpu.process import exit_on_signals, stop_all
from integration.gpu.record import GIB, Json
from integration.gpu.tenants import OURS, SGLANG, STOCK, VLLM, House, Seat
from integration.gpu.watch import LedgerWatch, gib
from kvcached_vmm.units import parse_size

LEDGER_LOOK_S = 0.025
TRIMMED_BYTES = 512 << 20
"""After a trim an engine should hold less than this: one extent, and what a tail of steps left."""
CAVEATS = [
    "Eager mode unless engine_args says otherwise: compare the arms, not with a tuned server.",
    "All requests of a burst arrive at once, so TTFT is mostly the queue before a request.",
    "memory_gib is the whole device: weights, activations and contexts of both servers too.",
    "Cached prefixes stay until somebody needs their memory or their time to live is over, so an "
    "engine that is drained still holds them; trim shows what is left without.",
]
SMALL = {
    "budget": 192 << 20,
    "load": Load(12, 256, 128),
    "warmup": Load(2, 128, 8),
    "rounds": 1,
    "drain_s": 1.5,
    "plugin_env": {"KVCACHED_EXTENT": "8MiB"},
}


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = harness.parser(__doc__, "neighbours.py")
    add = parser.add_argument
    add("--budget", type=parse_size, default=24 * GIB, help="KV bytes of both, or halves of it")
    add("--load", type=harness.load, default=Load(128, 1024, 256), help="a burst on one engine")
    add("--warmup", type=harness.load, default=Load(8, 512, 16), help="before the first burst")
    add("--rounds", type=int, default=2, help="of: A, B, A again, both")
    add("--drain-s", type=float, default=4.0, help="idle seconds after a burst")
    add("--elastic-share", type=float, default=0.5, help="of the time, where stock runs too")
    add("--second", choices=(VLLM, SGLANG), default=VLLM, help="what the second server is")
    add("--no-static", dest="static", action="store_false", help="no stock servers")
    return harness.parse(parser, words, SMALL)


class Arm:
    """Two servers from start to end: elastic in one budget, or stock with half of it each."""

    def __init__(self, run: harness.Run, name: str, until: float) -> None:
        o = run.o
        self.run = run
        self.name = name
        self.until = until
        self.elastic = name == "elastic"
        self.phases: Json = {}
        self.marks: list[Json] = []
        self.found: Json = {"arm": name}
        self.began = time.time()
        self.before_bytes = run.sampler.used_bytes()
        if self.elastic:
            budget = str(o.budget)
            o.plugin_env = {**o.plugin_env, "KVCACHED_BUDGET": budget}
        seat = Seat(o.budget, OURS) if self.elastic else Seat(o.budget // 2, STOCK)
        seats = {ENGINES[0]: seat, ENGINES[1]: replace(seat, engine=o.second)}
        self.house = House(run, run.work / name, seats)
        self.watch = LedgerWatch(self.house.ledger, run.device, LEDGER_LOOK_S)

    def play_all(self, phases: Sequence[Phase]) -> None:
        """Start, warm up, play as many phases as there is time for."""
        o = self.run.o
        self.watch.start()
        if not self.house.wait_ready(min(self.until, time.time() + o.ready_s)):
            return
        self.mark("ready")
        seeds = {name: 7 + number for number, name in enumerate(ENGINES)}
        self.house.play("warm-up", o.warmup, seeds, min(self.until, time.time() + 60.0))
        self.mark("warm")
        longest = 0.0
        for phase in phases:
            expected = longest * (2.0 if len(phase.seeds) > 1 else 1.2)
            if time.time() + expected > self.until:
                self.found.setdefault("left_out", []).append(phase.label)
                continue
            began = time.time()
            self.play(phase)
            longest = max(longest, (time.time() - began) / len(phase.seeds))
        if self.elastic:
            self.trim()
        self.watch.stop()

    def play(self, phase: Phase) -> None:
        run, o = self.run, self.run.o
        counters = self.watch.counters()
        before = {name: self.metrics(name) for name in phase.seeds}
        began, replies = self.house.play(phase.label, o.load, phase.seeds, self.until)
        engines: Json = {}
        for name, answers in replies.items():
            found = figures(answers, o.load, began)
            after = self.metrics(name)
            found["preemptions"] = after.get("num_preemptions", 0) - before[name].get(
                "num_preemptions", 0
            )
            if self.elastic:
                ended = began + found["duration_s"]
                found["memory"] = watch.rise(self.watch.samples, name, began, ended)
            engines[name] = found
            if found["failed"]:
                run.note(f"{self.name} {phase.label} {name}: {found['failed']} failed")
        ended = began + max(each["duration_s"] for each in engines.values())
        result: Json = {
            "at_s": round(began - run.o.started, 2),
            "engines": engines,
            "memory_gib": run.sampler.window(began, ended),
        }
        if self.elastic:
            seen = watch.between(self.watch.samples, began, ended)
            result["ledger"] = watch.budget_check(seen)
            now = self.watch.counters()
            result["counters"] = {
                name: watch.counted(counters[name], now[name]) for name in ENGINES if name in now
            }
        time.sleep(max(0.0, min(o.drain_s, self.until - time.time())))
        result["drained"] = self.mark(f"drained:{phase.label}")
        self.phases[phase.label] = result

    def metrics(self, name: str) -> Json:
        found: Json = {}
        self.run.attempt(
            f"metrics of {name}", lambda: found.update(self.house.tenants[name].metrics())
        )
        return found

    def mark(self, name: str) -> Json:
        """Memory of this moment, by the device and by the ledger."""
        entry: Json = {"at": name, "s": round(time.time() - self.run.o.started, 2)}
        entry["device_gib"] = gib(self.run.sampler.used_bytes())
        if self.elastic:
            entry["ledger"] = watch.holdings(self.watch.view())
        self.marks.append(entry)
        return entry

    def trim(self) -> None:
        """Drop all caches through the ledger, and see how soon the memory is there."""

        def small() -> bool:
            view = self.watch.view()
            limit = min(TRIMMED_BYTES, self.run.o.budget // 4)
            return view is not None and all(a.committed_bytes <= limit for a in view.accounts)

        held = self.mark("before the trim")
        self.watch.trim()
        took_s = watch.seconds_until(small, 5.0)
        time.sleep(1.0)
        self.found["trim"] = {
            "seconds": round(took_s, 4) if took_s is not None else None,
            "before": held,
            "after_1_s": self.mark("trimmed"),
        }
        if took_s is None:
            self.run.note("a trim took more than 5 s")

    def end(self) -> None:
        self.watch.stop()
        self.house.stop()
        self.run.sampler.wait_below(self.before_bytes + GIB, timeout_s=15.0)

    def result(self) -> Json:
        samples, now = self.watch.samples, time.time()
        found = {**self.found, "servers": self.house.describe(), "phases": self.phases}
        found["marks"] = self.marks
        found["memory_gib"] = self.run.sampler.window(self.began, now)
        found["memory_series_gib"] = self.run.sampler.series(self.began, now, 0.5)
        if self.elastic:
            found["ledger"] = watch.budget_check(samples)
            found["ledger_errors"] = self.watch.errors[:10]
            found["device_kv_peak_gib"] = device_kv_peak_gib(self.marks, found["memory_gib"])
            found["series"] = watch.series(samples, self.began, 0.25)
        return found


def checks(o: argparse.Namespace, token_bytes: int, arms: Json) -> Json:
    """What must be true of the elastic arm for its figures to say anything."""
    elastic = arms.get("elastic", {})
    phases = elastic.get("phases", {})
    bursts = [each for phase in phases.values() for each in phase["engines"].values()]
    ledger = elastic.get("ledger", {})
    return {
        "bursts": len(bursts),
        "each_burst_wants_gib": gib(o.load.peak_bytes(token_bytes)),
        "budget_gib": gib(o.budget),
        "both_would_fit": 2 * o.load.peak_bytes(token_bytes) <= o.budget,
        "one_would_fit_its_half": o.load.peak_bytes(token_bytes) <= o.budget // 2,
        "failed_requests": sum(each["failed"] for each in bursts),
        "failed_requests_static": sum(
            each["failed"]
            for phase in arms.get("static", {}).get("phases", {}).values()
            for each in phase["engines"].values()
        ),
        "over_budget_bytes": ledger.get("over_budget_bytes"),
        "samples": ledger.get("samples", 0),
    }


def moved(phases: Json) -> Json:
    """Seconds from a burst's start to 90 % of its peak, with what the neighbour gave meanwhile:
    with none given it is the time that the work itself takes."""
    return {
        f"{label}:{engine}": {
            "to_90_percent_s": found["memory"]["to_90_percent_s"],
            "live_to_90_percent_s": found["memory"]["live_to_90_percent_s"],
            "held_at_start_gib": found["memory"]["held_at_start_gib"],
            "peak_gib": found["memory"]["peak_gib"],
            "neighbour_gave_gib": round(
                found["memory"]["others_at_start_gib"] - found["memory"]["others_least_gib"], 4
            ),
        }
        for label, phase in phases.items()
        for engine, found in phase["engines"].items()
        if found.get("memory")
    }


def device_kv_peak_gib(marks: Sequence[Json], memory: Json) -> float | None:
    """The most KV memory that the device's figure leaves room for: all that came after the warm-up,
    and what the ledger had then. More than the budget by what torch took besides."""
    warm = next((each for each in marks if each["at"] == "warm"), None)
    if warm is None or not memory:
        return None
    held = sum(each["used"] for each in warm["ledger"].values())
    return float(round(memory["max"] - warm["device_gib"] + held, 3))


def passed(found: Json) -> bool:
    return (
        found["bursts"] > 0
        and not found["failed_requests"]
        and found["over_budget_bytes"] == 0
        and not found["both_would_fit"]
    )


class Comparison:
    """Both arms, and the file that tells of them."""

    def __init__(self, run: harness.Run) -> None:
        self.run = run
        self.arms: dict[str, Any] = {}

    def play(self, name: str, phases: Sequence[Phase], until: float) -> None:
        arm = Arm(self.run, name, until)
        try:
            arm.play_all(phases)
        except Exception as error:
            self.run.note(f"{name}: {type(error).__name__}: {error}"[:300])
        finally:
            self.keep(arm)
            arm.end()
            self.keep(arm)

    def keep(self, arm: Arm) -> None:
        self.arms[arm.name] = arm.result()
        self.save()

    def save(self) -> None:
        self.run.save({"caveats": CAVEATS, **self.summary(), "arms": self.arms})

    def summary(self) -> Json:
        phases = {name: arm.get("phases", {}) for name, arm in self.arms.items()}
        elastic = phases.get("elastic", {})
        return {
            "checks": checks(self.run.o, self.run.token_bytes, self.arms),
            "memory_moved": moved(elastic),
            "static_over_elastic": ratios(phases.get("static", {}), elastic),
        }


def main() -> int:
    o = parse(sys.argv[1:])
    exit_on_signals()
    run = harness.Run("neighbours", o)
    both = Comparison(run)
    phases = schedule(o.rounds)
    try:
        run.sampler.start()
        share = o.elastic_share if o.static else 1.0
        both.play("elastic", phases, time.time() + share * run.left_s())
        played = both.arms["elastic"]["phases"]
        if o.static and played:
            both.play("static", [p for p in phases if p.label in played], run.deadline)
    finally:
        stop_all()
        run.sampler.stop()
        run.attempt("the last save", both.save)
        print(json.dumps(both.summary(), indent=1))
        print(f"ended after {time.time() - o.started:.1f} s, logs in {run.work}")
    return 0 if passed(both.summary()["checks"]) and not run.notes else 1


if __name__ == "__main__":
    sys.exit(main())
