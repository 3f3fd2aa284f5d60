"""Two ``vllm serve`` on one GPU at once, plugin off and on, loaded in turns.

One start-up pays for both arms, and what drifts between runs hits both: for a machine that is lent
for four minutes. First the same greedy requests to both, then vLLM's benchmark, off, on, off, on,
as long as time allows. Writes paired.json, paired-tokens.json and paired-logs.txt after each run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from integration.gpu import serving, workload
from integration.gpu.options import parse_paired
from integration.gpu.process import Child, environment, exit_on_signals, stop_all
from integration.gpu.record import (
    GIB,
    Json,
    MemorySampler,
    facts,
    gpu_processes,
    ledger_snapshot,
    write_json,
    write_tails,
)
from integration.gpu.server import Server
from integration.gpu.workload import Answer, Request

ARMS = ("off", "on")
MARGIN_S = 6.0
"""From the end of all work to the deadline: stop two servers, write results."""
BESIDE_KV = 24 * GIB
"""Weights, activations, graphs and context of one 8B server, generously."""
BEST = 5
KEPT = [*serving.KEPT, "mean_itl_ms", "p99_itl_ms"]
CAVEATS = [
    "Both servers hold their memory on one GPU while only one of them is loaded.",
    "No Inductor compilation, CUDA graphs for decoding at few batch sizes: compare on with off, "
    "not with figures of a tuned server.",
    "vLLM's own dummy weights make tokens insensitive to the KV cache; tokens say something only "
    "where reseeded is true and early_tokens_change_answers is true.",
    "Concurrent requests are batched as timing has it, so other roundings may give other tokens; "
    "the first ones go alone, and control is stock against stock.",
    "vLLM's random prompts are runs of consecutive token ids: a few in a hundred repeat one that "
    "the same server has seen. Both runs of a pair have the same prompts.",
]


class Session:
    """The run: both servers, the load, and what is known so far."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.o = o
        o.out.mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix="paired-", dir=o.work))
        self.end = o.started + o.deadline_s - MARGIN_S
        self.sampler = MemorySampler()
        if self.sampler.method != "host":
            o.kv_bytes = min(o.kv_bytes, (self.sampler.total_bytes // 2 - BESIDE_KV) >> 30 << 30)
        self.servers: dict[str, Server] = {}
        self.statuses: dict[str, int | None] = {}
        self.answers: dict[str, list[Answer]] = {}
        self.tokens: Json = {}
        self.marks: list[Json] = []
        self.notes: list[str] = []
        self.facts: Json = {}
        self.device = "host"
        self._seen = 0
        self._due: list[tuple[float, str]] = []

    def start(self) -> None:
        o = self.o
        self.before_bytes = self.sampler.used_bytes()
        for number, name in enumerate(ARMS):
            self.servers[name] = Server(name, o.port + number, self.work, o)
        self._start_client()
        self.sampler.start()
        self.facts = facts(self.sampler)
        self.device = self.facts["gpu"].get("uuid", "host")
        if not self.facts["commit"]:
            with contextlib.suppress(OSError):
                self.facts["commit"] = Path(".gpu/commit").read_text().strip()

    def _start_client(self) -> None:
        o = self.o
        self.results = self.work / "runs"
        self.results.mkdir()
        self.go = self.work / "go"
        load = {**o.load, "tail_s": o.tail_s, "result_dir": str(self.results)}
        runs: list[Json] = []
        lengths = [(str(k + 1), o.seconds) for k in range(o.pairs)] + [("short", o.short_s)]
        for seed, (pair, seconds) in enumerate(lengths):
            for name in ARMS:
                port = self.servers[name].port
                run = serving.benchmark(
                    f"{pair}-{name}", o.rate, seconds, 100 + seed, port, o.model, load
                )
                # The first of a pair begins only if there is time for both.
                run["expected_s"] *= 2.0 if name == ARMS[0] else 0.9
                whole = {} if name == ARMS[0] else {"only_with": f"{pair}-{ARMS[0]}"}
                runs.append({**run, "port": port, **whole})
        spec = {"go": str(self.go), "deadline": self.end - 3.0, "runs": runs}
        self.client, self.events = serving.start_client(
            self.work, spec, environment(False, o.env, o.cache / "client")
        )

    def wait_ready(self) -> None:
        """Until both serve, one has died, or time is up; goes on with whatever serves."""
        until = min(self.end - 20.0, time.time() + self.o.ready_s)
        while time.time() < until:
            for server in self.servers.values():
                server.look()
            states = [(s.ready_after_s, s.child.returncode) for s in self.servers.values()]
            if all(ready is not None or status is not None for ready, status in states):
                break
            time.sleep(0.1)
        for name, server in self.servers.items():
            if not server.usable:
                status = server.child.returncode
                self.note(
                    f"{name}: ended with status {status} at start"
                    if status is not None
                    else f"{name}: not ready in time; it goes on starting beside the load"
                )
        if any(server.usable for server in self.servers.values()):
            time.sleep(0.5)
            self.mark("ready", ask=True)

    def compare_tokens(self) -> None:
        """The same requests to both; stock a second time while the elastic one answers."""
        usable = {name: s for name, s in self.servers.items() if s.usable}
        if self.o.reseed:
            for name, server in usable.items():
                self.attempt(
                    f"{name}: reseed",
                    lambda server=server: server.found.update(reseeded=server.call("kvc_reseed")),
                )
        if "off" in usable:
            self.attempt("off: tokens", lambda: self.one_pass(usable["off"], "off"))
        self.save()
        with ThreadPoolExecutor(2) as both:
            if "on" in usable:
                both.submit(self.attempt, "on: tokens", lambda: self.one_pass(usable["on"], "on"))
            if "off" in self.answers and self.o.reseed:
                both.submit(self.attempt, "control", self.control)
        for server in usable.values():
            self.attempt(f"{server.name}: warm-up", lambda server=server: self.warm_up(server))
        self.summarise_tokens()

    def control(self) -> None:
        self.servers["off"].forget(10.0)
        self.one_pass(self.servers["off"], "control")

    def one_pass(self, server: Server, name: str) -> None:
        o = self.o
        until = min(self.end, time.time() + o.pass_s)
        vocab = min(json.loads((Path(o.model) / "config.json").read_text())["vocab_size"], 120_000)
        requests = [
            Request(request.prompt, o.answer)
            for request in workload.staggered(o.requests, o.longest, o.answer, vocab, seed=7)
        ]

        def ask(request: Request) -> Answer:
            return server.complete(o.model, request, BEST, max(0.1, until - time.time()))

        begin = time.time()
        if name == ARMS[0]:
            pair = [ask(r) for r in workload.context_pair(min(256, o.longest), vocab, seed=3)]
            self.tokens["early_tokens_change_answers"] = pair[0].tokens != pair[1].tokens
        answers = [ask(request) for request in requests[: o.alone]]
        alone_s = time.time() - begin
        self.answers[f"{name}:alone"] = list(answers)
        with ThreadPoolExecutor(8) as several:
            answers += several.map(ask, requests[o.alone :])
        self.answers[name] = answers
        self.tokens[f"{name}_s"] = [round(alone_s, 2), round(time.time() - begin, 2)]

    def warm_up(self, server: Server) -> None:
        o = self.o
        requests = workload.uniform(o.warmups, o.load["prompt_len"], 32, 7000, seed=9)
        with ThreadPoolExecutor(max(1, o.warmups)) as several:
            list(several.map(lambda r: server.complete(o.model, r, None, 10.0), requests))

    def summarise_tokens(self) -> None:
        alone = self.o.alone
        for one, two in (("off", "on"), ("off", "control")):
            for part, cut in (("alone", slice(None, alone)), ("concurrent", slice(alone, None))):
                end = ":alone" if part == "alone" else ""
                first, second = (self.answers.get(name + end) for name in (one, two))
                if first and second:
                    self.tokens[f"{one}/{two}:{part}"] = workload.compare(first[cut], second[cut])
        self.tokens["distinct_tokens"] = {
            name: len({t for answer in answers for t in answer.tokens})
            for name, answers in self.answers.items()
        }
        tokens = {name: [a.tokens for a in answers] for name, answers in self.answers.items()}
        write_json(self.o.out / "paired-tokens.json", tokens)

    def run_load(self) -> None:
        if not any(server.usable for server in self.servers.values()):
            return
        self.go.touch()
        status = self.client.wait(self.end - 2.5, self.follow)
        self.follow()
        if status != 0:
            self.note("the load was cut short" if status is None else f"the load ended: {status}")

    def follow(self) -> None:
        """Note memory as runs begin, near the end of arrivals, and as they end; write results."""
        known = self.events.read()
        fresh, self._seen = known[self._seen :], len(known)
        now = time.time()
        for server in self.servers.values():
            if server.ready_after_s is None and server.child.returncode is None:
                server.look()
        for event in fresh:
            kind, label = event["event"], event.get("label", "")
            if kind == "run_begin":
                self.mark(f"begin:{label}")
                seconds = self.o.short_s if label.startswith("short") else self.o.seconds
                self._due.append((now + 0.8 * seconds, f"load:{label}"))
            elif kind in ("run_end", "run_failed"):
                self._due.clear()
                self.mark(f"end:{label}")
                if self.o.reset and label.endswith(f"-{ARMS[1]}"):
                    self.reset()
                self.save()
        while self._due and self._due[0][0] <= now:
            self.mark(self._due.pop(0)[1])

    def drop_caches(self) -> None:
        """The end of it: memory with the prefix caches that the load left, and without."""
        self.mark("drained", ask=True)
        self.reset()
        time.sleep(max(0.0, min(1.5, self.end - time.time())))
        self.mark("emptied", ask=True)

    def reset(self) -> None:
        """Both servers forget what they have cached, and ours gives its memory back."""
        for name, server in self.servers.items():
            if server.usable and self.o.reseed:
                self.attempt(f"{name}: reset", server.forget)

    def mark(self, name: str, ask: bool = False) -> None:
        """What memory is used now. ``ask`` asks the servers too, who should be idle then."""
        now = time.time()
        entry: Json = {"at": name, "s": round(now - self.o.started, 2)}
        with contextlib.suppress(Exception):
            entry["device_gib"] = round(self.sampler.used_bytes() / GIB, 3)
        groups = {server.child._process.pid: arm for arm, server in self.servers.items()}
        processes = gpu_processes()
        if isinstance(processes, list):
            for process in processes:
                with contextlib.suppress(OSError):
                    process["arm"] = groups.get(os.getpgid(process["pid"]))
        entry["processes"] = processes
        entry["ledger"] = ledger_snapshot(self.servers["on"].folder / "ledger", self.device)
        if ask and self.o.reseed:
            for arm, server in self.servers.items():
                if server.usable:
                    with contextlib.suppress(Exception):
                        entry[f"{arm}_worker"] = server.call("kvc_memory", 1.0)
        self.marks.append(entry)

    def attempt(self, what: str, action: Any) -> None:
        try:
            action()
        except Exception as error:
            self.note(f"{what}: {type(error).__name__}: {error}"[:300])

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End everything at once, within about three seconds."""

        def end(name: str, child: Child) -> None:
            self.statuses[name] = child.stop(grace_s=1.5)

        children = {name: server.child for name, server in self.servers.items()}
        if hasattr(self, "client"):
            children["client"] = self.client
        threads = [
            threading.Thread(target=end, args=item, daemon=True) for item in children.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(3.0)

    def runs(self) -> Json:
        """Figures of each finished run, in the order in which they ran."""
        found: Json = {}
        for event in self.events.read():
            path = self.results / f"{event.get('label')}.json"
            if event["event"] == "run_end" and path.exists():
                found[event["label"]] = serving.figures(path, KEPT)
        return found

    def summary(self, runs: Json) -> Json:
        """On over off: for each pair, and of the medians of the full-length runs."""
        pairs = [str(k + 1) for k in range(self.o.pairs)]
        whole = [p for p in pairs if all(f"{p}-{arm}" in runs for arm in ARMS)]
        figures: Json = {"pairs": {}, "median": {}, "on_over_off_of_medians": {}}
        for pair in [*whole, "short"]:
            off, on = (runs.get(f"{pair}-{arm}", {}) for arm in ARMS)
            if ratio := serving.over(off, on, KEPT):
                figures["pairs"][pair] = ratio
        if not whole:
            return figures
        for arm in ARMS:
            figures["median"][arm] = {
                name: statistics.median(runs[f"{p}-{arm}"][name] for p in whole)
                for name in KEPT
                if all(name in runs[f"{p}-{arm}"] for p in whole)
            }
        off, on = (figures["median"][arm] for arm in ARMS)
        figures["on_over_off_of_medians"] = serving.over(off, on, KEPT)
        figures["same_arm_last_over_first"] = {
            arm: serving.over(
                runs[f"{whole[0]}-{arm}"], runs[f"{whole[-1]}-{arm}"], serving.COMPARED
            )
            for arm in ARMS
            if len(whole) > 1
        }
        return figures

    def save(self) -> None:
        o = self.o
        runs = self.runs()
        events = self.events.read()
        for event in events:
            if event["event"] == "run_begin":
                self.sampled(event["label"], events, runs)
        result = {
            **self.facts,
            "parameters": {name: str(value) for name, value in vars(o).items()},
            "kv_bytes": o.kv_bytes,
            "caveats": CAVEATS,
            "notes": self.notes,
            "servers": {n: s.describe(self.statuses.get(n)) for n, s in self.servers.items()},
            "tokens": self.tokens,
            "summary": self.summary(runs),
            "runs": runs,
            "memory": self.marks,
            "device_gib_before": round(self.before_bytes / GIB, 3),
            "device_series_gib": self.sampler.series(o.started, time.time()),
            "load_events": events,
            "ended_after_s": round(time.time() - o.started, 1),
        }
        write_json(o.out / "paired.json", result)
        write_tails(o.out / "paired-logs.txt", self.work)

    def sampled(self, label: str, events: list[Json], runs: Json) -> None:
        """Add the device memory during a run to its figures."""
        times = {event["event"]: event["t"] for event in events if event.get("label") == label}
        if label in runs and "run_end" in times:
            runs[label]["device_gib"] = self.sampler.window(times["run_begin"], times["run_end"])


def main() -> int:
    options = parse_paired(sys.argv[1:], __doc__)
    exit_on_signals()
    session = Session(options)
    try:
        session.start()
        session.wait_ready()
        session.save()
        if time.time() < session.end - 15.0:
            session.compare_tokens()
            session.save()
        session.run_load()
        session.drop_caches()
    except Exception as error:
        session.note(f"{type(error).__name__}: {error}")
    finally:
        session.attempt("before the end", session.save)
        session.stop()
        session.attempt("at the end", session.save)
        stop_all()
        session.sampler.stop()
        print(json.dumps({"tokens": session.tokens, "notes": session.notes}, indent=1))
        print(json.dumps(session.summary(session.runs()), indent=1))
        print(f"ended after {time.time() - options.started:.1f} s, logs in {session.work}")
    return 1 if session.notes else 0


if __name__ == "__main__":
    sys.exit(main())
