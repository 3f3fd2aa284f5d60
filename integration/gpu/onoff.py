"""Stock vLLM with the plugin off and on, on one machine in one run (see README.md)."""

from __future__ import annotations

import argparse
import json
import lzma
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from integration.gpu import serving, workload
from integration.gpu.process import (
    Child,
    environment,
    exit_on_signals,
    python,
    stop_all,
)
from integration.gpu.record import (
    GIB,
    EventLog,
    Json,
    MemorySampler,
    facts,
    ledger_snapshot,
    plugin_lines,
    write_json,
    write_tails,
)

ORDER_A = ("off", "on", "on", "off")
MARGIN_S = 12.0
"""Kept free before the deadline for writing results."""


class Session:
    """One invocation: its folder for results, its deadline, and what all parts found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix="onoff-", dir=options.work))
        self.sampler = MemorySampler()
        self.sampler.start()
        self.deadline = options.started + options.deadline_s - MARGIN_S
        self.facts = facts(self.sampler)
        self.device: str = self.facts["gpu"].get("uuid", "host")
        self.parameters = {k: str(v) for k, v in vars(options).items()}
        self.answers: dict[str, Any] = {}
        self.results: Json = {}

    def left_s(self) -> float:
        return float(self.deadline - time.time())

    def save(self, part: str, result: Json) -> None:
        """Write a part and the whole, and the tails of all logs. Called after every arm."""
        self.results[part] = result
        head = {**self.facts, "parameters": self.parameters}
        write_json(self.out / f"onoff-{part}.json", {**head, "part": part, "result": result})
        write_json(self.out / "onoff.json", {**head, "results": self.results})
        write_tails(self.out / "logs.txt", self.work)
        packed = json.dumps(self.answers).encode()
        (self.out / "tokens.json.xz").write_bytes(lzma.compress(packed, preset=1))

    def engine_arguments(self, kv_bytes: int) -> Json:
        """What both arms give to ``vllm.LLM``: equal but for the environment variable."""
        o = self.options
        return {
            "model": o.model,
            "load_format": "dummy",
            "max_model_len": o.max_model_len,
            "kv_cache_memory_bytes": kv_bytes,
            "max_num_seqs": o.max_num_seqs,
            "max_num_batched_tokens": 8192,
            "seed": 0,
            **o.engine_args,
        }


class InProcess:
    """A child that runs one engine for part A or C, watched while it works."""

    def __init__(self, session: Session, name: str, kind: str, engine: Json, work: Json) -> None:
        o = session.options
        self.session = session
        self.name = name
        self.elastic = "on" in name.split("-")
        folder = self.folder = session.work / name
        folder.mkdir()
        self.log = folder / "engine.log"
        self.events = EventLog(folder / "events.jsonl")
        self.spec_path = folder / "spec.json"
        self.spec = {
            "kind": kind,
            "events": str(self.events.path),
            "engine": engine,
            "work": work,
            "reseed": o.reseed,
        }
        kind_of_arm = "-".join(w for w in name.split("-") if w in ("off", "on", "bi", "control"))
        extra = {**o.env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        if self.elastic:
            extra |= {"KVCACHED_DIR": str(folder / "ledger"), **o.plugin_env}
        if "bi" in name.split("-"):
            extra["VLLM_BATCH_INVARIANT"] = "1"
        cache = o.cache / (kind_of_arm if o.own_caches else "shared")
        self.env = environment(self.elastic, extra, cache)
        self.ledger: Json = {}
        self._seen = 0

    def start(self, until: float) -> None:
        self.used_before = self.session.sampler.used_bytes()
        write_json(self.spec_path, {**self.spec, "deadline": until, "launched": time.time()})
        command = python("integration.gpu.arm", str(self.spec_path))
        self.child = Child(command, self.log, self.env)

    def follow(self) -> None:
        """Note what the ledger says at each step that the child reports."""
        known = self.events.read()
        for event in known[self._seen :]:
            if self.elastic:
                name = f"{event['event']}{event.get('rep', '')}"
                self.ledger[name] = ledger_snapshot(self.folder / "ledger", self.session.device)
        self._seen = len(known)

    def finish(self, until: float) -> Json:
        """Wait for the end, or end it; all that is known. Its answers go to the session."""
        status = self.child.wait(until, self.follow)
        self.child.stop()
        self.follow()
        end = time.time()
        for path in self.events.path.parent.glob("events.*.json"):
            self.session.answers[f"{self.name}:{path.suffixes[0][1:]}"] = json.loads(
                path.read_text()
            )
        events = self.events.read()
        sampler = self.session.sampler
        times = {event["event"]: event["t"] for event in events}
        memory: Json = {"before": round(self.used_before / GIB, 3)}
        windows = {
            "after_start": (times.get("ready", 0.0) - 0.3, times.get("ready", 0.0) + 0.3),
            "under_load": (times.get("load", end), times.get("idle", end)),
            "idle": (times.get("idle", end), times.get("drained", end)),
            "cache_dropped": (times.get("drained", end), times.get("emptied", end)),
        }
        memory |= {name: sampler.window(*window) for name, window in windows.items()}
        return {
            "arm": self.name,
            "status": status if status is not None else "stopped: out of time",
            "events": events,
            "memory_gib": memory,
            "memory_series_gib": sampler.series(self.child.launched, end),
            "ledger": self.ledger,
            "plugin_log": plugin_lines(self.log),
        }


def part_a(session: Session) -> None:
    """Throughput and memory of one engine at a time, off, on, on, off as far as time allows."""
    o = session.options
    arms: list[Json] = []
    longest = 0.0
    for number, kind in enumerate(ORDER_A[: o.a_starts]):
        if session.left_s() < (1.05 * longest or o.arm_s / 2):
            break
        begin = time.time()
        share = session.left_s() / (o.a_starts - number)
        work = {**o.load, "mixed": o.mixed, "reps": o.reps, "longest": o.longest}
        work |= {"saturated": o.saturated, "drain_s": o.drain_s}
        arm = InProcess(
            session, f"A{number}-{kind}", "throughput", session.engine_arguments(o.kv_bytes), work
        )
        arm.start(begin + max(share - 8.0, 0.75 * o.arm_s))
        arms.append(arm.finish(min(session.deadline, begin + 2.5 * o.arm_s)))
        session.sampler.wait_below(arm.used_before + GIB, timeout_s=15.0)
        longest = max(longest, time.time() - begin)
        session.save("A", {"arms": arms, "summary": summarise_a(session, arms)})


def summarise_a(session: Session, arms: list[Json]) -> Json:
    rates: dict[str, list[float]] = {"off": [], "on": []}
    for arm in arms:
        kind = arm["arm"].split("-")[1]
        rates[kind] += [e["output_tokens_per_s"] for e in arm["events"] if e["event"] == "rep"]
    medians = {kind: statistics.median(found) for kind, found in rates.items() if found}
    summary: Json = {"output_tokens_per_s": rates, "median": medians}
    if len(medians) == 2:
        summary["throughput_on_over_off"] = round(medians["on"] / medians["off"], 4)
    summary["arms"] = {arm["arm"]: brief(arm) for arm in arms}
    names = [arm["arm"] for arm in arms]
    for other in names[1:]:
        for work in ("mixed", "saturated"):
            summary[f"{work}:{names[0]}/{other}"] = compared(session, names[0], other, work)
    return summary


def brief(arm: Json) -> Json:
    """Start-up time, memory and whether tokens depend on the KV cache at all, of one arm."""
    found = {event["event"]: event for event in arm["events"]}
    return {
        "status": arm["status"],
        "startup_s": found.get("ready", {}).get("startup_s"),
        "early_tokens_change_answers": found.get("context", {}).get("early_tokens_change_answers"),
        "gib": {
            name: w["last"] for name, w in arm["memory_gib"].items() if isinstance(w, dict) and w
        },
        "gib_peak": arm["memory_gib"].get("under_load", {}).get("max"),
        "counters": found.get("counters"),
    }


def compared(session: Session, one: str, two: str, work: str) -> Json:
    first, second = (session.answers.get(f"{name}:{work}") for name in (one, two))
    if first is None or second is None:
        return {"missing": [n for n, a in ((one, first), (two, second)) if a is None]}
    return workload.compare(workload.unpack(first), workload.unpack(second))


def part_c(session: Session) -> None:
    """Equal tokens under preemption and prefix caching; several engines share the GPU meanwhile."""
    o = session.options
    free = session.sampler.total_bytes - session.sampler.used_bytes()
    slots = max(1, min(o.c_parallel, int(free / (o.c_engine_gib * GIB))))
    waiting = [f"C-{name}" for name in o.c_arms]
    running: list[InProcess] = []
    done: list[Json] = []
    work = {**o.load, "requests": o.requests, "longest": o.c_longest, "first": o.c_first}
    work |= {"drain_s": o.drain_s}
    until = min(session.deadline, time.time() + o.c_limit_s)
    while waiting or running:
        while waiting and len(running) < slots and time.time() < until - o.arm_s / 2:
            name = waiting.pop(0)
            kv_bytes = o.c_kv_bytes * 9 // 8 if "control" in name else o.c_kv_bytes
            engine = session.engine_arguments(kv_bytes)
            engine |= {"enable_prefix_caching": True, "disable_log_stats": False}
            engine["gpu_memory_utilization"] = 0.05
            running.append(InProcess(session, name, "correctness", engine, work))
            running[-1].start(until)
        if not running:
            break
        time.sleep(0.2)
        for arm in list(running):
            arm.follow()
            if arm.child.returncode is not None or time.time() > until:
                running.remove(arm)
                done.append(arm.finish(until))
                session.save("C", {"arms": done, "summary": summarise_c(session, done)})


def summarise_c(session: Session, arms: list[Json]) -> Json:
    names = {arm["arm"] for arm in arms}
    pairs = (("C-off", "C-on"), ("C-bi-off", "C-bi-on"), ("C-off", "C-control-off"))
    found = {arm["arm"]: brief(arm) for arm in arms}
    return {"arms": found} | {
        f"{one}/{two}": compared(session, one, two, "staggered")
        for one, two in pairs
        if {one, two} <= names
    }


def part_b(session: Session) -> None:
    """Latency at three request rates, one server after the other."""
    o = session.options
    arms: list[Json] = []
    options = {
        "env": o.env,
        "plugin_env": o.plugin_env,
        "cache": o.cache,
        "port": o.port,
        "model": o.model,
        "rates": o.rates,
        "seconds": o.seconds,
        "load": {**o.load, "tail_s": o.tail_s},
        "device": session.device,
        "serve_command": serve_command(o),
    }
    labels: set[str] | None = None
    for number, elastic in enumerate((False, True)):
        until = time.time() + session.left_s() / (2 - number)
        arm = serving.Arm(elastic, session.work, session.sampler, options)
        result = arm.run(labels, until)
        labels = labels or set(result.get("runs", {})) or None
        arms.append(result)
        summary = serving.ratios(*arms) if len(arms) == 2 else {}
        session.save("B", {"arms": arms, "summary": summary})


def serve_command(o: argparse.Namespace) -> list[str]:
    flags: Json = {
        "load_format": "dummy",
        "max_model_len": o.max_model_len,
        "kv_cache_memory_bytes": o.kv_bytes,
        "port": o.port,
        "host": "127.0.0.1",
        "uvicorn_log_level": "warning",
        "seed": 0,
        **o.engine_args,
    }
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    return python("vllm.entrypoints.cli.main", "serve", o.model, *words)


def main() -> int:
    from integration.gpu.options import parse

    options = parse(sys.argv[1:])
    exit_on_signals()
    session = Session(options)
    failures = 0
    try:
        for part in options.parts:
            try:
                {"A": part_a, "B": part_b, "C": part_c}[part](session)
            except Exception as error:
                failures += 1
                found = session.results.get(part, {})
                failure = f"{type(error).__name__}: {error}"
                session.save(part, {**found, "harness_error": failure})
                print(f"part {part}: {failure}", file=sys.stderr)
            finally:
                stop_all()
    finally:
        stop_all()
        session.sampler.stop()
        summaries = {part: r.get("summary", {}) for part, r in session.results.items()}
        print(json.dumps(summaries, indent=1))
        print(f"results in {session.out}, logs in {session.work}, pid {os.getpid()}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
