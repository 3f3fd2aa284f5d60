"""How many engines fit on one device: with a fixed part of its memory each, and with ours.

``vllm serve`` processes are started in waves until the next would not fit, by what those before it
took, or until there are as many as were asked for. Then all of them get a light load at once, which
all must answer. Writes density.json after each wave.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from integration.gpu import arms, harness, slo, traffic, watch
from integration.gpu.process import exit_on_signals, stop_all
from integration.gpu.record import GIB, Json
from integration.gpu.slo import Slo
from integration.gpu.tenants import OURS, STOCK, House, Seat
from integration.gpu.watch import LedgerWatch, gib
from kvcached_vmm.units import MIB, parse_size

GOAL_IDLE_BYTES = 32 * MIB
END_S = 15.0
SMALL = {
    "models": ["tiny"],
    "most": [3],
    "wave": 2,
    "static_kv": 64 << 20,
    "virtual_kv": 128 << 20,
    "budget": 192 << 20,
    "rate": 1.0,
    "seconds": 3.0,
    "tail_s": 10.0,
    "prompt_tokens": 48,
    "output_tokens": 8,
}


def words(text: str) -> list[str]:
    return text.split(",")


def counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = harness.parser(__doc__, "density.py")
    add = parser.add_argument
    add("--models", type=words, default=["llama8b", "llama1b"], help="folders beside --model")
    add("--most", type=counts, default=[8, 10], help="engines of each model, at most")
    add("--arms", type=arms.kinds, default=[OURS, STOCK])
    add("--wave", type=int, default=4, help="servers that start at once")
    add(
        "--static-kv", type=parse_size, default=8 * GIB, help="of each engine that has a fixed part"
    )
    add("--virtual-kv", type=parse_size, default=32 * GIB, help="most of each engine of ours")
    add("--budget", type=parse_size, default=0, help="of all of ours; 0: the default")
    add("--rate", type=float, default=0.5, help="requests/s of each, lightly loaded")
    add("--seconds", type=float, default=10.0)
    add("--tail-s", type=float, default=15.0)
    add("--prompt-tokens", type=int, default=512)
    add("--output-tokens", type=int, default=128)
    return harness.parse(parser, arguments, SMALL)


def fits(free_bytes: int, before_bytes: int, now_bytes: int, engines: int) -> int:
    """How many more engines fit, each taking what the ``engines`` so far took on average."""
    each = (now_bytes - before_bytes) / engines
    return int(free_bytes // each) if each > 0 else sys.maxsize


class Crowd:
    """All engines of one model and one arm."""

    def __init__(self, run: harness.Run, model: str, kind: str, most: int, until: float) -> None:
        o = run.o
        self.run = run
        self.kind = kind
        self.most = most
        self.until = until
        self.before_bytes = run.sampler.used_bytes()
        folder = Path(o.model).parent / model
        env = {"KVCACHED_BUDGET": str(o.budget)} if kind == OURS and o.budget else {}
        size = o.virtual_kv if kind == OURS else o.static_kv
        # What must be free at start is checked by us; vLLM's own check is of its share only.
        self.seat = Seat(size, kind, {"gpu_memory_utilization": 0.01}, env, str(folder))
        if run.o.cpu:
            self.seat = Seat(size, kind, {}, env)
        self.house = House(run, run.work / f"{model}-{kind}", {})
        self.watch = LedgerWatch(self.house.ledger, run.device, 0.1)
        self.found: Json = {"model": model, "arm": kind, "kv_gib_of_each": gib(size), "waves": []}

    def play(self) -> None:
        """Waves, then the light load."""
        run, o = self.run, self.run.o
        if self.kind == OURS:
            self.watch.start()
        longest = 0.0
        while (left := self.most - len(self.house.tenants)) > 0:
            count = min(o.wave, left)
            if here := len(self.house.tenants):
                used = run.sampler.used_bytes()
                free = run.sampler.total_bytes - used
                more = fits(free, self.before_bytes, used, here)
                if run.on_gpu and more < 1:
                    each = (used - self.before_bytes) / here
                    self.found["stopped_by"] = f"{gib(free)} GiB free, one takes {gib(each)}"
                    break
                count = min(count, more) if run.on_gpu else count
            if time.time() + 1.2 * longest + o.seconds + o.tail_s > self.until:
                self.found["stopped_by"] = "time"
                break
            began = time.time()
            if not self.wave(count):
                self.found["stopped_by"] = "a server that did not start"
                break
            longest = max(longest, time.time() - began)
        else:
            self.found["stopped_by"] = f"as many as were asked for ({self.most})"
        if self.found["waves"]:
            self.light()

    def wave(self, count: int) -> bool:
        """Start ``count`` more; whether all of them serve."""
        run = self.run
        first = len(self.house.tenants)
        self.house.add({f"e{first + number}": self.seat for number in range(count)})
        ready = self.house.wait_ready(min(self.until, time.time() + run.o.ready_s))
        if not ready:
            return False
        time.sleep(1.5)
        used = run.sampler.used_bytes()
        engines = len(self.house.tenants)
        each = (used - self.before_bytes) / engines
        wave: Json = {"engines": engines, "device_gib": gib(used), "gib_of_each": gib(each)}
        if self.kind == OURS:
            view = self.watch.view()
            held = watch.sample(view, time.time()).engines if view is not None else {}
            wave["kv_idle_bytes_most"] = max((each.used for each in held.values()), default=0)
        self.found["waves"].append(wave)
        self.found["engines"] = engines
        return True

    def light(self) -> None:
        """A few requests to all of them, at the same time."""
        run, o = self.run, self.run.o
        serving = [name for name, each in self.house.tenants.items() if each.usable]
        plan = {
            name: traffic.steady(o.rate, o.seconds, o.prompt_tokens, o.output_tokens, 31 + number)
            for number, name in enumerate(serving)
        }
        at, off, replies = self.house.send("light", plan, 41, o.tail_s, self.until)
        answers = [reply for each in replies.values() for reply in each]
        asked = sum(map(len, plan.values()))
        found = slo.served(answers, asked, Slo(1.0, 0.1), at, off)
        found["device_gib"] = run.sampler.window(at, time.time())
        if self.kind == OURS:
            seen = watch.between(self.watch.samples, at, time.time())
            found["kv_used_gib"] = gib(max((each.used_bytes for each in seen), default=0))
        if found["failed"]:
            run.note(f"{self.found['model']} {self.kind}: {found['errors']}")
        self.found["light_load"] = found

    def end(self) -> None:
        self.watch.stop()
        self.house.stop()
        self.run.sampler.wait_below(self.before_bytes + GIB, timeout_s=15.0)


def goals(crowds: Sequence[Json]) -> Json:
    """The most KV that an idle engine of ours held, against what it may."""
    idle = [
        wave["kv_idle_bytes_most"]
        for crowd in crowds
        for wave in crowd["waves"]
        if "kv_idle_bytes_most" in wave
    ]
    if not idle:
        return {}
    return {
        "idle_kv_bytes": max(idle),
        "at_most": GOAL_IDLE_BYTES,
        "met": max(idle) <= GOAL_IDLE_BYTES,
    }


def main() -> int:
    o = parse(sys.argv[1:])
    exit_on_signals()
    run = harness.Run("density", o)
    crowds: list[Json] = []

    def save() -> None:
        run.save({"crowds": crowds, "goals": goals(crowds)})

    try:
        run.sampler.start()
        turns = [
            (model, most, kind)
            for model, most in zip(o.models, o.most, strict=True)
            for kind in o.arms
        ]
        for number, (model, most, kind) in enumerate(turns):
            until = time.time() + run.left_s() / (len(turns) - number) - END_S
            crowd = Crowd(run, model, kind, most, until)
            try:
                crowd.play()
            except Exception as error:
                run.note(f"{model} {kind}: {type(error).__name__}: {error}"[:300])
            finally:
                crowd.end()
                crowd.found["servers"] = crowd.house.describe()
                crowds.append(crowd.found)
                save()
            told = {name: crowd.found.get(name) for name in ("engines", "stopped_by")}
            print(f"{model} {kind}: {told}", flush=True)
    finally:
        stop_all()
        run.sampler.stop()
        run.attempt("the last save", save)
        print(json.dumps(goals(crowds), indent=1))
        print(f"ended after {time.time() - o.started:.1f} s, logs in {run.work}")
    return 0 if crowds and not run.notes and goals(crowds).get("met", True) else 1


if __name__ == "__main__":
    sys.exit(main())
