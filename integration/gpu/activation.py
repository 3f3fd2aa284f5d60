"""How soon a model that sleeps serves again: vLLM's sleep mode, stock and with our KV cache.

Servers with sleep mode are put to sleep (level 1: weights to host memory, no KV) and woken, in
turns; what counts is from the call of ``/wake_up`` to the first token of a request sent right
after. Beside it the floor: the bytes of the weights over what the bus moves, measured in the same
run. ``--shape 70b-fp8`` makes a model of that shape, with weights made up. Writes activation.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from integration.gpu import arms, harness, watch
from integration.gpu.bursts import spread_ms
from integration.gpu.process import Child, environment, exit_on_signals, python, stop_all
from integration.gpu.record import GIB, Json, write_json
from integration.gpu.tenants import OURS, STOCK, House, Seat
from integration.gpu.watch import LedgerWatch, gib
from kvcached_vmm.units import parse_size

GOAL_MS = {"8b": 500.0, "70b-fp8": 1500.0}
"""Wake to first token, median: our goal for 8B; for 70B what was published (Prism)."""
CALL_S = 120.0
"""For a call to sleep or to wake, at most."""
SHAPE_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "ignored_layers": ["lm_head"],
    },
}
"""Llama-3.1-70B with linear layers in 8 bits: about 70 GB of weights."""
SMALL = {"kv_bytes": 64 << 20, "rounds": 2, "prompt_tokens": 48}


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = harness.parser(__doc__, "activation.py")
    add = parser.add_argument
    add("--arms", type=arms.kinds, default=[STOCK, OURS])
    add("--shape", choices=sorted(GOAL_MS), default="8b")
    add("--one-by-one", action="store_true", help="arms in sequence: two would not fit")
    add("--kv-bytes", type=parse_size, default=16 * GIB, help="of each server")
    add("--rounds", type=int, default=8, help="of sleep and wake, each arm")
    add("--prompt-tokens", type=int, default=128)
    return harness.parse(parser, words, SMALL)


def shaped(model: Path, shape: dict[str, object], folder: Path) -> Path:
    """A model folder like ``model`` with some of its configuration changed."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, **shape})
    return folder


class Sleepers:
    """Servers that are up together, each with its own way of keeping KV memory."""

    def __init__(self, run: harness.Run, kinds: Sequence[str]) -> None:
        o = run.o
        self.run = run
        self.rounds: dict[str, list[Json]] = {kind: [] for kind in kinds}
        arguments = {} if o.cpu else {"enable_sleep_mode": True}
        env = {"VLLM_SERVER_DEV_MODE": "1"}
        budget = {"KVCACHED_BUDGET": str(o.kv_bytes)}
        seats = {
            kind: Seat(o.kv_bytes, kind, arguments, env | (budget if kind == OURS else {}))
            for kind in kinds
        }
        self.before_bytes = run.sampler.used_bytes()
        self.house = House(run, run.work / "-".join(kinds), seats)
        self.watch = LedgerWatch(self.house.ledger, run.device, 1.0)

    def play(self) -> None:
        run, o = self.run, self.run.o
        if not self.house.wait_ready(min(run.deadline, time.time() + o.ready_s)):
            return
        longest = 0.0
        for number in range(o.rounds + 1):
            began = time.time()
            if run.left_s() < 15.0 + 1.2 * longest:
                run.note(f"round {number}: no time for it")
                break
            for kind in self.rounds:
                found = self.one(kind, seed=100 * number)
                if number:  # the first one is for warming up
                    self.rounds[kind].append(found)
                    print(f"{kind}: {found}", flush=True)
            longest = time.time() - began

    def one(self, kind: str, seed: int) -> Json:
        """A request, sleep, wake, the same request."""
        tenant = self.house.tenants[kind]
        first = self.ask(kind, seed)
        awake_bytes = self.run.sampler.used_bytes()
        began = time.perf_counter()
        tenant.post("/sleep?level=1", CALL_S)
        slept = time.perf_counter()
        time.sleep(0.5)
        asleep_bytes = self.run.sampler.used_bytes()
        found: Json = {
            "sleep_s": round(slept - began, 4),
            "device_gib_awake": gib(awake_bytes),
            "device_gib_asleep": gib(asleep_bytes),
        }
        if kind == OURS:
            held = watch.holdings(self.watch.view())
            found["kv_gib_asleep"] = sum(each["used"] for each in held.values())
        woken = time.perf_counter()
        tenant.post("/wake_up", CALL_S)
        up = time.perf_counter()
        again = self.ask(kind, seed)
        ended = time.perf_counter()
        found |= {
            "wake_s": round(up - woken, 4),
            "wake_to_first_token_s": round(ended - woken, 4),
            "same_token": again == first,
        }
        return found

    def ask(self, kind: str, seed: int) -> list[int]:
        """The first token of the answer to one prompt; the whole answer is that token."""
        o = self.run.o
        prompt = [10 + (seed + 7 * index) % 900 for index in range(o.prompt_tokens)]
        body = {
            "model": o.model,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.house.tenants[kind].port}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=CALL_S) as answer:
            tokens: list[int] = json.loads(answer.read())["choices"][0]["token_ids"]
        return tokens

    def end(self) -> None:
        self.watch.stop()
        self.house.stop()
        self.run.sampler.wait_below(self.before_bytes + GIB, timeout_s=20.0)


def figure(rounds: Sequence[Json]) -> Json:
    """Of all rounds of one arm."""
    names = ("sleep_s", "wake_s", "wake_to_first_token_s")
    freed = [each["device_gib_awake"] - each["device_gib_asleep"] for each in rounds]
    return {
        **{name.replace("_s", "_ms"): spread_ms(each[name] for each in rounds) for name in names},
        "freed_gib": round(max(freed, default=0.0), 3),
        "same_tokens": all(each["same_token"] for each in rounds),
        "rounds": list(rounds),
    }


def goals(found: Json, shape: str, floor_ms: float | None) -> Json:
    """Our median against the goal, stock's, and the floor."""
    ours = found.get(OURS, {}).get("wake_to_first_token_ms", {}).get("median")
    if ours is None:
        return {}
    stock = found.get(STOCK, {}).get("wake_to_first_token_ms", {}).get("median")
    return {
        "wake_to_first_token_ms": ours,
        "at_most": GOAL_MS[shape],
        "stock_ms": stock,
        "ours_over_stock": round(ours / stock, 4) if stock else None,
        "floor_ms": floor_ms,
        "met": ours <= GOAL_MS[shape],
    }


class Activation:
    """The run: the bus, then arms together or one by one."""

    def __init__(self, run: harness.Run) -> None:
        self.run = run
        self.found: dict[str, Json] = {}
        self.servers: Json = {}
        self.bus: Json = {}

    def play(self) -> None:
        run, o = self.run, self.run.o
        path = run.work / "pcie.json"
        words = ["cpu"] if o.cpu else []
        env = environment(False, o.env, o.cache)
        child = Child(python("integration.gpu.pcie", str(path), *words), run.work / "pcie.log", env)
        if child.wait(time.time() + 60.0) == 0:
            self.bus = json.loads(path.read_text())
        else:
            run.note("the bus could not be measured; see pcie.log")
        child.stop()
        if o.shape != "8b":
            o.model = str(shaped(Path(o.model), SHAPE_70B, run.work / o.shape))
        for kinds in [[kind] for kind in o.arms] if o.one_by_one else [o.arms]:
            sleepers = Sleepers(run, kinds)
            try:
                sleepers.play()
            except Exception as error:
                run.note(f"{kinds}: {type(error).__name__}: {error}"[:300])
            finally:
                sleepers.end()
                self.servers |= sleepers.house.describe()
                self.found |= {k: figure(each) for k, each in sleepers.rounds.items() if each}
                self.save()

    def save(self) -> None:
        self.run.save(
            {
                "shape": self.run.o.shape,
                "bus": self.bus,
                "floor_ms": self.floor_ms(),
                "arms": self.found,
                "goals": self.goals(),
                "servers": self.servers,
            }
        )

    def floor_ms(self) -> float | None:
        """The weights over the bus. What our arm frees when it falls asleep, with nearly no KV
        committed, is its weights; stock's part would have its KV buffer in it."""
        rate = self.bus.get("to_device_gib_per_s")
        freed = self.found.get(OURS, {}).get("freed_gib")
        return round(1e3 * freed / rate, 1) if rate and freed and freed > 0 else None

    def goals(self) -> Json:
        return goals(self.found, self.run.o.shape, self.floor_ms())


def main() -> int:
    o = parse(sys.argv[1:])
    exit_on_signals()
    run = harness.Run("activation", o)
    activation = Activation(run)
    try:
        run.sampler.start()
        activation.play()
    except Exception as error:
        run.note(f"{type(error).__name__}: {error}"[:300])
    finally:
        stop_all()
        run.sampler.stop()
        run.attempt("the last save", activation.save)
        print(json.dumps(activation.goals(), indent=1))
        print(f"ended after {time.time() - o.started:.1f} s, logs in {run.work}")
    return 0 if activation.goals().get("met") and not run.notes else 1


if __name__ == "__main__":
    sys.exit(main())
