"""Part B: one ``vllm serve`` after the other, the same open-loop load on each."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from integration.gpu.bench_client import healthy
from integration.gpu.process import Child, environment, python
from integration.gpu.record import (
    EventLog,
    Json,
    MemorySampler,
    ledger_snapshot,
    plugin_lines,
    write_json,
)

DRAIN_S = (0.0, 1.0, 2.0, 5.0, 10.0)
"""Moments after the last request at which memory is noted."""
LATENCIES = [
    f"{which}_{what}_ms" for what in ("ttft", "tpot") for which in ("mean", "median", "p99")
]
COMPARED = [*LATENCIES, "output_throughput"]
KEPT = [*COMPARED, "request_throughput", "completed", "failed", "duration"]
KEPT += ["max_concurrent_requests"]
LABELS = ("half", "near", "low", "half-again")
"""Benchmark runs in order of worth: a run that does not fit the time is left out."""


def plan(rates: list[float], seconds: float, port: int, model: str, options: Json) -> list[Json]:
    """The benchmark runs, one per label.

    Each has a seed of its own: with one seed for all, later runs would find every prompt cached.
    """
    low, half, near = rates
    runs: list[Json] = []
    for seed, (label, rate) in enumerate(zip(LABELS, (half, near, low, half), strict=True)):
        run = benchmark(label, rate, seconds, 100 + seed, port, model, options)
        if not runs:
            run["arguments"] += ["--num-warmups", "8"]
        runs.append(run)
    return runs


def benchmark(
    label: str, rate: float, seconds: float, seed: int, port: int, model: str, options: Json
) -> Json:
    """One run of vLLM's benchmark, as bench_client.py takes it."""
    count = max(8, round(rate * seconds))
    arguments = {
        "--backend": "vllm",
        "--port": str(port),
        "--model": model,
        "--dataset-name": "random",
        "--random-input-len": str(options["prompt_len"]),
        "--random-output-len": str(options["max_tokens"]),
        "--num-prompts": str(count),
        "--request-rate": f"{rate:g}",
        "--seed": str(seed),
        "--percentile-metrics": "ttft,tpot,itl",
        "--metric-percentiles": "50,99",
        "--result-dir": options["result_dir"],
        "--result-filename": f"{label}.json",
    }
    words = [word for pair in arguments.items() for word in pair]
    return {
        "label": label,
        "rate": rate,
        "expected_s": count / rate + options["tail_s"],
        "arguments": [*words, "--ignore-eos", "--save-result", "--disable-tqdm"],
    }


def start_client(folder: Path, spec: Json, env: Mapping[str, str]) -> tuple[Child, EventLog]:
    """Start bench_client.py, which waits until it may begin; and where it says what it does."""
    events = EventLog(folder / "client.jsonl")
    path = folder / "client-spec.json"
    write_json(path, {"events": str(events.path), **spec})
    command = python("integration.gpu.bench_client", str(path))
    return Child(command, folder / "client.log", env), events


def figures(path: Path, names: list[str]) -> Json:
    """Those figures of ``names`` that a run of the benchmark has left in its file."""
    full = json.loads(path.read_text())
    return {name: full[name] for name in names if name in full}


def over(one: Json, two: Json, names: list[str]) -> Json:
    """``two`` over ``one``, for each figure that both have."""
    return {n: round(two[n] / one[n], 4) for n in names if one.get(n) and two.get(n) is not None}


class Arm:
    """A server, plugin on or off, from its start to its end."""

    def __init__(
        self, elastic: bool, work: Path, sampler: MemorySampler, options: Mapping[str, Any]
    ) -> None:
        self.name = "on" if elastic else "off"
        self.folder = work / f"B-{self.name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "server.log"
        self._elastic = elastic
        self._sampler = sampler
        self._options = options
        self._marks: list[tuple[str, float]] = []
        self._ledger: Json = {}

    def run(self, labels: set[str] | None, deadline: float) -> Json:
        """Serve, load, drain. Returns what is known, also when something failed on the way.

        ``labels`` keeps the load to these runs, so that a second arm does what the first finished.
        """
        options = self._options
        before = self._sampler.used_bytes()
        env = environment(self._elastic, options["env"], options["cache"] / "shared")
        if self._elastic:
            env |= {"KVCACHED_DIR": str(self.folder / "ledger"), **options["plugin_env"]}
        server = Child(options["serve_command"], self.log, env)
        client = None
        result: Json = {"arm": self.name, "command": server.command, "used_before": before}
        begin = server.launched
        try:
            client, events = self._start_client(labels, deadline)
            while not healthy(options["port"]):
                if server.returncode is not None:
                    result["error"] = f"the server ended with status {server.returncode}"
                    return result
                if time.time() > deadline:
                    result["error"] = "the server was not ready in time"
                    return result
                time.sleep(0.1)
            result["startup_s"] = round(time.time() - begin, 2)
            self._mark("ready")
            time.sleep(1.0)
            seen = 0

            def follow() -> None:
                nonlocal seen
                for event in (known := events.read())[seen:]:
                    if event["event"] in ("run_begin", "run_end"):
                        self._mark(f"{event['event']}:{event['label']}")
                seen = len(known)

            status = client.wait(deadline, follow)
            if status != 0:
                result["error"] = f"the load ended with status {status}"
            self._drain(deadline)
            result["load_events"] = events.read()
        finally:
            if client is not None:
                client.stop(grace_s=2.0)
            result["exit_status"] = server.stop()
            self._sampler.wait_below(before + (1 << 30), timeout_s=15.0)
            end = time.time()
            result["runs"] = self._results()
            result["memory_gib"] = self._memory(begin, end)
            result["memory_series_gib"] = self._sampler.series(begin, end)
            result["ledger"] = self._ledger
            result["plugin_log"] = plugin_lines(self.log)
        return result

    def _start_client(self, labels: set[str] | None, deadline: float) -> tuple[Child, EventLog]:
        options = self._options
        runs = plan(
            options["rates"],
            options["seconds"],
            options["port"],
            options["model"],
            {**options["load"], "result_dir": str(self.folder)},
        )
        runs = [run for run in runs if labels is None or run["label"] in labels]
        last = deadline - DRAIN_S[-1] - 10.0
        spec = {"port": options["port"], "deadline": last, "runs": runs}
        return start_client(
            self.folder, spec, environment(False, options["env"], options["cache"] / "client")
        )

    def _mark(self, name: str) -> None:
        self._marks.append((name, time.time()))
        if self._elastic:
            device = self._options["device"]
            self._ledger[name] = ledger_snapshot(self.folder / "ledger", device)

    def _drain(self, deadline: float) -> None:
        begin = time.time()
        for after in DRAIN_S:
            wait_s = begin + after - time.time()
            if time.time() + wait_s > deadline:
                break
            time.sleep(max(0.0, wait_s))
            self._mark(f"drained+{after:g}s")

    def _memory(self, begin: float, end: float) -> Json:
        at = {name: self._sampler.window(t - 0.6, t + 0.6).get("last") for name, t in self._marks}
        return {"at": at, "whole": self._sampler.window(begin, end)}

    def _results(self) -> Json:
        runs: Json = {}
        for path in sorted(self.folder.glob("*.json")):
            if path.stem not in LABELS:
                continue
            with contextlib.suppress(json.JSONDecodeError):
                runs[path.stem] = figures(path, KEPT)
        return runs


def ratios(off: Json, on: Json) -> Json:
    """On over off for each run, and how much one arm differs from itself at half load."""
    found: Json = {}
    for label in off["runs"].keys() & on["runs"].keys():
        found[label] = over(off["runs"][label], on["runs"][label], COMPARED)
    noise = {}
    for arm in (off, on):
        if {"half", "half-again"} <= arm["runs"].keys():
            noise[arm["arm"]] = over(arm["runs"]["half"], arm["runs"]["half-again"], COMPARED)
    return {"on_over_off": found, "same_arm_again_over_first": noise}
