"""Several models on one device whose peaks come one after the other, from light load to too much.

Three ``vllm serve`` have so much KV memory between them: split in three, in one budget of ours, or
shared by kvcached 0.1.6. One arm after the other, each with all rates while its servers stay up.
While one model's request rate goes up to its peak and down again, the others rest: the published
set-up (three Llama-3.1-8B, 80 GB, intermittent peaks). Writes colocation.json after each rate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from integration.gpu import arms, harness, slo, traffic, watch
from integration.gpu.bursts import Load
from integration.gpu.options import COMPILED
from integration.gpu.process import exit_on_signals, stop_all
from integration.gpu.record import GIB, Json
from integration.gpu.slo import Point, Slo
from integration.gpu.tenants import OURS, PEER, STOCK
from kvcached_vmm.units import parse_size

SATURATED = 10.0
"""A mean TTFT this many times its bound: higher rates are left out for this arm."""
REST_S = 1.0
"""Between rates, so that what one leaves behind is not billed to the next."""
COLD_S = 75.0
"""What the first arm's servers need longer to start: their code is compiled and cached then."""
END_S = 12.0
"""To stop an arm's servers and get their memory back."""
PUBLISHED = 28.0
"""Best ratio of p99 TTFT, without over with kvcached, that its authors report (A100-80G)."""
SLACK = 1.02
"""How much worse than the static split we may be at any rate."""
CAVEATS = [
    "CUDA graphs at few batch sizes, unless engine_args says otherwise: compare the arms, not with "
    "a tuned server.",
    "The budget is KV memory: what 80 GB leave beside three Llama-3.1-8B.",
    "kvcached has no budget; a ballast takes what the device has beyond, and what kvcached had "
    "mapped before it took its place it has on top.",
    "A request that was cut off before its first token counts in TTFT with the time that it had "
    "waited: ttft_lower_bounds says how many these are.",
]
SMALL = {
    "budget": 96 << 20,
    "arms": [STOCK, OURS],
    "rates": [3.0, 6.0],
    "seconds": 4.0,
    "tail_s": 6.0,
    "prompt_tokens": 64,
    "output_tokens": 32,
    "warmup": Load(2, 64, 4),
    "engine_args": {"enforce_eager": True},
    "plugin_env": {"KVCACHED_EXTENT": "4MiB"},
}


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = harness.parser(__doc__, "colocation.py")
    add = parser.add_argument
    add("--arms", type=arms.kinds, default=[STOCK, OURS], help="of static,ours,kvcached, in order")
    add("--engines", type=int, default=3, help="how many models")
    add("--budget", type=parse_size, default=24 * GIB, help="KV bytes of all together")
    add("--rates", type=floats, default=[24.0, 36.0, 48.0, 60.0, 72.0], help="peaks, requests/s")
    add("--seconds", type=float, default=9.0, help="of one model's peak, up and down")
    add("--gap-s", type=float, default=0.0, help="from the end of a peak to the next")
    add("--tail-s", type=float, default=8.0, help="after the last request of a rate, at most")
    add("--prompt-tokens", type=int, default=256)
    add("--output-tokens", type=int, default=400)
    add("--warmup", type=harness.load, default=Load(16, 256, 16), help="before the first rate")
    add("--join", type=Path, help="colocation.json of arms that this machine ran before")
    add("--slo-ttft-ms", type=float, default=500.0)
    add("--slo-tpot-ms", type=float, default=50.0)
    add("--slo-share", type=float, default=0.99, help="of requests that must be within both")
    parser.set_defaults(engine_args={"compilation_config": COMPILED}, ready_s=330.0)
    return harness.parse(parser, words, SMALL)


def floats(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


class Sweep:
    """One arm from start to end, and what it made of each rate."""

    def __init__(self, run: harness.Run, kind: str, until: float) -> None:
        o = run.o
        self.run = run
        self.kind = kind
        self.until = until
        self.slo = Slo(o.slo_ttft_ms / 1e3, o.slo_tpot_ms / 1e3, o.slo_share)
        self.engines = [chr(ord("a") + number) for number in range(o.engines)]
        self.rates: Json = {}
        self.left_out: list[float] = []
        self.arm = arms.Arm(run, kind, self.engines, o.budget)

    def play(self, save: Any) -> None:
        o = self.run.o
        if not self.arm.wait_ready(self.until) or self.arm.house is None:
            return
        seeds = {name: 7 + number for number, name in enumerate(self.engines)}
        self.arm.house.play("warm-up", o.warmup, seeds, min(self.until, time.time() + 60.0))
        ceiling = float("inf")
        longest = o.engines * (o.seconds + o.gap_s) + o.tail_s / 2
        for rate in slo.sweep_order(o.rates):
            if rate >= ceiling or time.time() + longest + REST_S > self.until:
                self.left_out.append(rate)
                continue
            began = time.time()
            found = self.one(rate)
            if slo.saturated(found, SATURATED, self.slo):
                ceiling = min(ceiling, rate)
            longest = max(longest, time.time() - began)
            save()
            time.sleep(REST_S)

    def one(self, rate: float) -> Json:
        """One rate on all engines."""
        run, o = self.run, self.run.o
        assert self.arm.house is not None
        seed = round(1000 * rate)
        sizes = o.prompt_tokens, o.output_tokens
        plan = traffic.peaks(self.engines, rate, o.seconds, *sizes, seed, o.gap_s)
        label = f"{rate:g}"
        before = self.preemptions()
        at, off, replies = self.arm.house.send(label, plan, seed, o.tail_s, self.until)
        ended = time.time()
        everything = list(itertools.chain.from_iterable(replies.values()))
        asked = sum(map(len, plan.values()))
        found = slo.served(everything, asked, self.slo, at, off)
        found["engines"] = {
            name: slo.served(answers, len(plan[name]), self.slo, at, off)
            for name, answers in replies.items()
        }
        found["at_s"] = round(at - o.started, 2)
        found["memory_gib"] = run.sampler.window(at, ended)
        found["preemptions"] = round(self.preemptions() - before)
        if self.arm.watch is not None:
            seen = watch.between(self.arm.watch.samples, at, ended)
            found["ledger"] = watch.budget_check(seen)
        if found["failed"]:
            run.note(f"{self.kind} at {label}: {found['failed']} failed: {found['errors']}")
        self.rates[label] = found
        told = {name: found[name] for name in ("requests", "within_slo", "cut_off")}
        print(f"{self.kind} {label}/s: {told} ttft {found['ttft_ms']}", flush=True)
        return found

    def preemptions(self) -> float:
        found = 0.0
        assert self.arm.house is not None
        for tenant in self.arm.house.tenants.values():
            try:
                found += tenant.metrics().get("num_preemptions", 0.0)
            except OSError as error:
                self.run.note(f"metrics of {tenant.name}: {error}")
        return found

    def result(self) -> Json:
        points = [
            Point(float(rate), found["requests"], found["within_slo"])
            for rate, found in self.rates.items()
        ]
        return {
            **self.arm.result(),
            "rates": self.rates,
            "left_out": self.left_out,
            "slo_requests_per_s": slo.leaves(points, self.slo.share),
        }


def ratios(one: Json, two: Json) -> Json:
    """``one`` over ``two`` at each rate that both have; above 1 speaks for ``two``, but for
    ``within_slo``."""
    found: Json = {}
    for rate in sorted(one.keys() & two.keys(), key=float):
        pairs = {
            f"{which}_{what}": (one[rate][what].get(which), two[rate][what].get(which))
            for what in ("ttft_ms", "tpot_ms")
            for which in ("mean", "p99")
        }
        pairs["within_slo"] = (one[rate]["within_slo"], two[rate]["within_slo"])
        found[rate] = {
            name: round(first / second, 4) for name, (first, second) in pairs.items() if second
        }
    return found


def goals(static_over_ours: Json) -> Json:
    """The two bounds on p99 TTFT: one rate far better, no rate worse."""
    p99 = {rate: each["p99_ttft_ms"] for rate, each in static_over_ours.items()}
    if not p99:
        return {}
    best, worst = max(p99, key=p99.__getitem__), min(p99, key=p99.__getitem__)
    return {
        "best_p99_ttft_static_over_ours": p99[best],
        "best_at": float(best),
        "at_least": PUBLISHED,
        "best_met": p99[best] >= PUBLISHED,
        "worst_p99_ttft_ours_over_static": round(1 / p99[worst], 4) if p99[worst] else None,
        "worst_at": float(worst),
        "at_most": SLACK,
        "worst_met": p99[worst] * SLACK >= 1.0,
    }


SAME = (
    *("engines", "budget", "seconds", "gap_s", "tail_s", "prompt_tokens", "output_tokens"),
    *("model", "max_num_seqs", "engine_args", "slo_ttft_ms", "slo_tpot_ms", "slo_share"),
)
"""Parameters that arms must share to be compared."""


def joined(earlier: Json, gpu: Mapping[str, Any], vllm: Mapping[str, str], o: Any) -> Json:
    """The arms of an earlier run, marked as such, if they may stand beside those of this one.

    Raises:
        ValueError: another device, another engine, or another load.
    """
    if earlier["gpu"].get("uuid") != gpu.get("uuid"):
        raise ValueError("those arms ran on another device")
    if earlier["versions"].get("vllm") != vllm.get("vllm"):
        raise ValueError("those arms ran with another vLLM")
    told = earlier["parameters"]
    if other := [name for name in SAME if told.get(name) != str(getattr(o, name))]:
        raise ValueError(f"those arms had another {', '.join(other)}")
    return {
        kind: {**arm, "of_run": earlier["date_utc"]}
        for kind, arm in earlier["arms"].items()
        if kind not in o.arms
    }


class Comparison:
    """All arms, and the file that tells of them."""

    def __init__(self, run: harness.Run) -> None:
        self.run = run
        self.arms: dict[str, Json] = {}
        if run.o.join:
            run.attempt("--join", self._join)

    def _join(self) -> None:
        earlier = json.loads(self.run.o.join.read_text())
        facts = self.run.facts
        self.arms |= joined(earlier, facts["gpu"], facts["versions"], self.run.o)

    def play(self) -> None:
        kinds = self.run.o.arms
        for number, kind in enumerate(kinds):
            cold_s = 0.0 if number else COLD_S
            share = cold_s + (self.run.left_s() - cold_s) / (len(kinds) - number)
            sweep = Sweep(self.run, kind, time.time() + share - END_S)
            try:
                sweep.play(lambda sweep=sweep: self.keep(sweep))
            except Exception as error:
                self.run.note(f"{kind}: {type(error).__name__}: {error}"[:300])
            finally:
                sweep.arm.end()
                self.keep(sweep)

    def keep(self, sweep: Sweep) -> None:
        self.arms[sweep.kind] = sweep.result()
        self.save()

    def save(self) -> None:
        o = self.run.o
        described = Slo(o.slo_ttft_ms / 1e3, o.slo_tpot_ms / 1e3, o.slo_share).describe()
        self.run.save({"caveats": CAVEATS, "slo": described, **self.summary(), "arms": self.arms})

    def summary(self) -> Json:
        rates = {kind: arm["rates"] for kind, arm in self.arms.items()}
        pairs = ((STOCK, OURS), (PEER, OURS), (STOCK, PEER))
        found: Json = {
            f"{one}_over_{two}": ratios(rates[one], rates[two])
            for one, two in pairs
            if one in rates and two in rates
        }
        return {"ratios": found, "goals": goals(found.get(f"{STOCK}_over_{OURS}", {}))}


def main() -> int:
    o = parse(sys.argv[1:])
    exit_on_signals()
    run = harness.Run("colocation", o, memory_every_s=1.0)
    both = Comparison(run)
    try:
        run.sampler.start()
        both.play()
    finally:
        stop_all()
        run.sampler.stop()
        run.attempt("the last save", both.save)
        print(json.dumps(both.summary(), indent=1))
        print(f"ended after {time.time() - o.started:.1f} s, logs in {run.work}")
    found = both.summary()["goals"]
    return 0 if not run.notes and found.get("best_met") and found.get("worst_met") else 1


if __name__ == "__main__":
    sys.exit(main())
