"""What an engine holds beyond what its requests need: under load, after it, and when idle.

Requests whose answers differ in length by two orders of magnitude end one by one, and what they
leave is scattered over the pool: the case in which page-wise systems hold several times of what is
used. Two ``vllm serve`` with the plugin, without prefix caching and with it, get the same load one
after the other; the ledger is read every 25 ms. Committed bytes over the packed floor, which is
what live and cached blocks would take without gaps. Writes footprint.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from integration.gpu import harness, slo, traffic, watch
from integration.gpu.bursts import Load
from integration.gpu.process import exit_on_signals, stop_all
from integration.gpu.record import GIB, Json
from integration.gpu.slo import Slo
from integration.gpu.tenants import OURS, House, Seat
from integration.gpu.watch import LedgerWatch, Sample, gib
from kvcached_vmm.units import MIB, parse_size

ENGINES = {"plain": False, "caching": True}
"""Name of each server, and whether it has prefix caching."""
LOOK_S = 0.025
GOAL_RATIO = 1.15
GOAL_IDLE_BYTES = 32 * MIB
SHARES = (0.5, 0.25, 0.1)
"""Of the peak of live bytes: the moments after the load at which the ratio is told."""
IDLE_S = (1.0, 3.0)
"""Seconds after the last answer at which idle bytes are told."""
ANY = Slo(ttft_s=1.0, tpot_s=0.05)
SMALL = {
    "kv_bytes": 96 << 20,
    "rate": 3.0,
    "seconds": 4.0,
    "tail_s": 15.0,
    "prompt_tokens": 48,
    "shortest": 2,
    "longest": 200,
    "warmup": Load(2, 64, 4),
    "plugin_env": {"KVCACHED_EXTENT": "4MiB"},
}


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = harness.parser(__doc__, "footprint.py")
    add = parser.add_argument
    add("--kv-bytes", type=parse_size, default=32 * GIB, help="most of each server")
    add("--rate", type=float, default=12.0, help="requests/s")
    add("--seconds", type=float, default=20.0, help="arrivals")
    add("--tail-s", type=float, default=60.0, help="from the last arrival to the end, at most")
    add("--prompt-tokens", type=int, default=512)
    add("--shortest", type=int, default=16, help="answer, tokens")
    add("--longest", type=int, default=2048, help="answer, tokens")
    add("--prefixes", type=int, default=8, help="common ones, of half of a prompt")
    add("--warmup", type=harness.load, default=Load(8, 256, 16), help="before the load")
    return harness.parse(parser, words, SMALL)


def packed(sample: Sample, name: str) -> int:
    """Bytes that the blocks with content would take without gaps."""
    held = sample.of(name)
    return held.live + held.cached


def over_floor(samples: Sequence[Sample], name: str) -> float | None:
    """Committed over packed bytes, both summed over time; None if nothing was packed."""
    floor = sum(packed(each, name) for each in samples)
    committed = sum(each.of(name).committed for each in samples)
    return round(committed / floor, 4) if floor else None


def falling(samples: Sequence[Sample], name: str, shares: Sequence[float] = SHARES) -> list[Json]:
    """The ratio when live bytes have fallen to each share of their peak, after that peak."""
    if not samples:
        return []
    top = max(range(len(samples)), key=lambda index: samples[index].of(name).live)
    peak = samples[top].of(name).live
    told = []
    for share in shares:
        later = (each for each in samples[top:] if 0 < each.of(name).live <= share * peak)
        found = next(later, None)
        if found is not None:
            told.append(
                {
                    "live_share": share,
                    "live_gib": gib(found.of(name).live),
                    "packed_gib": gib(packed(found, name)),
                    "committed_gib": gib(found.of(name).committed),
                    "ratio": round(found.of(name).committed / packed(found, name), 4),
                }
            )
    return told


def load(o: argparse.Namespace, seed: int = 0) -> list[traffic.Ask]:
    """The requests; those of the servers have seed 0."""
    asks = traffic.steady(o.rate, o.seconds, o.prompt_tokens, 1, seed=11 + 100 * seed)
    asks = traffic.prefixed(asks, o.prefixes, o.prompt_tokens // 2, 12 + 100 * seed, share=2 / 3)
    return traffic.staggered(asks, o.shortest, o.longest, seed=13 + 100 * seed)


class Footprint:
    """Both servers, one load on each, and what they held."""

    def __init__(self, run: harness.Run) -> None:
        o = run.o
        self.run = run
        self.engines: Json = {}
        budget = {"KVCACHED_BUDGET": str(2 * o.kv_bytes), "KVCACHED_MAX": str(o.kv_bytes)}
        seats = {
            name: Seat(o.kv_bytes, OURS, {"enable_prefix_caching": caching}, budget)
            for name, caching in ENGINES.items()
        }
        self.house = House(run, run.work / "servers", seats)
        self.watch = LedgerWatch(self.house.ledger, run.device, LOOK_S)

    def play(self) -> None:
        run, o = self.run, self.run.o
        self.watch.start()
        if not self.house.wait_ready(min(run.deadline, time.time() + o.ready_s)):
            return
        time.sleep(2.0)
        after_start = watch.holdings(self.watch.view())
        self.house.play("warm-up", o.warmup, dict.fromkeys(ENGINES, 7), time.time() + 60.0)
        for name in ENGINES:
            if run.left_s() < o.seconds + 15.0:
                run.note(f"{name}: no time for it")
                continue
            self.engines[name] = {"after_start": after_start.get(name)}
            self.one(name)
            self.save()

    def one(self, name: str) -> None:
        """The load on one of them, until it is idle again."""
        run, o = self.run, self.run.o
        asks = load(o)
        at, off, replies = self.house.send(name, {name: asks}, 14, o.tail_s, run.deadline)
        last_at = at + traffic.ends_s({name: asks})
        ended = max((reply.ended for reply in replies[name]), default=last_at)
        idle = self.idle(name)
        seen = self.watch.samples
        found = {
            **self.engines[name],
            "load": slo.served(replies[name], len(asks), ANY, at, off),
            "live_peak_gib": gib(max((each.of(name).live for each in seen), default=0)),
            "under_load": over_floor(watch.between(seen, at, last_at), name),
            "after_load": over_floor(watch.between(seen, last_at, ended), name),
            "falling": falling(watch.between(seen, at, ended), name),
            "idle": idle,
            "series": watch.series(watch.between(seen, at, time.time()), at, 0.25),
        }
        if found["load"]["failed"] or found["load"]["cut_off"]:
            run.note(f"{name}: failed or cut off: {found['load']['errors']}")
        self.engines[name] = found

    def idle(self, name: str) -> Json:
        """What it holds some seconds after the last answer, and when its cache is dropped too."""
        began, told = time.time(), {}
        for after in IDLE_S:
            time.sleep(max(0.0, began + after - time.time()))
            told[f"{after:g}s"] = self.held(name)
        self.watch.trim()
        time.sleep(IDLE_S[0])
        told["trimmed"] = self.held(name)
        return told

    def held(self, name: str) -> Json:
        """Its part of the ledger now, and the bytes of it unrounded."""
        view = self.watch.view()
        assert view is not None
        used = watch.sample(view, time.time()).of(name).used
        return {**watch.holdings(view).get(name, {}), "used_bytes": used}

    def end(self) -> None:
        self.watch.stop()
        self.house.stop()

    def save(self) -> None:
        self.run.save(
            {
                "engines": self.engines,
                "goals": goals(self.engines),
                "ledger": watch.budget_check(self.watch.samples),
                "servers": self.house.describe(),
            }
        )


def goals(engines: Json) -> Json:
    """After-load ratio of both, and idle bytes without a cache, against what they must be."""
    found: Json = {}
    for name, each in engines.items():
        ratio = each.get("after_load")
        if ratio is not None:
            found[f"after_load_{name}"] = {
                "ratio": ratio,
                "at_most": GOAL_RATIO,
                "met": ratio <= GOAL_RATIO,
            }
        last = (each.get("idle") or {}).get("trimmed")
        if last is not None:
            idle = last["used_bytes"]
            found[f"idle_{name}"] = {
                "bytes": idle,
                "at_most": GOAL_IDLE_BYTES,
                "met": idle <= GOAL_IDLE_BYTES,
            }
    return found


def main() -> int:
    o = parse(sys.argv[1:])
    exit_on_signals()
    run = harness.Run("footprint", o)
    footprint = Footprint(run)
    try:
        run.sampler.start()
        footprint.play()
    except Exception as error:
        run.note(f"{type(error).__name__}: {error}"[:300])
    finally:
        footprint.end()
        stop_all()
        run.sampler.stop()
        run.attempt("the last save", footprint.save)
        print(json.dumps(goals(footprint.engines), indent=1))
        print(f"ended after {time.time() - o.started:.1f} s, logs in {run.work}")
    told = goals(footprint.engines)
    return 0 if told and not run.notes and all(each["met"] for each in told.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
