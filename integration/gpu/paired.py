"""Two ``vllm serve`` on one GPU at once, plugin off and on, loaded in turns.

One start-up pays for both arms, and what drifts between runs hits both: for a machine that is lent
for four minutes. First the same greedy requests to both, then vLLM's benchmark, off, on, off, on,
as long as time allows. Writes paired.json, paired-tokens.json and paired-logs.txt, again after each
run.
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
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from integration.gpu import options as sizes
from integration.gpu import serving, workload
from integration.gpu.bench_client import healthy
from integration.gpu.onoff import serve_command
from integration.gpu.process import Child, environment, exit_on_signals, python, stop_all
from integration.gpu.record import (
    GIB,
    EventLog,
    Json,
    MemorySampler,
    facts,
    ledger_snapshot,
    plugin_lines,
    tail,
    write_json,
)
from integration.gpu.workload import Answer, Request

ARMS = ("off", "on")
MARGIN_S = 6.0
"""From the end of all work to the deadline: stop two servers, write results."""
BESIDE_KV = 24 * GIB
"""Weights, activations, graphs and context of one 8B server, generously."""
BEST = 5
KEPT = [*serving.KEPT, "mean_itl_ms", "p99_itl_ms"]
GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256],
}
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

SELFTEST = {
    "kv_bytes": 64 << 20,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "utilization": 0.1,
    "longest": 200,
    "requests": 12,
    "alone": 4,
    "load": {"prompt_len": 64, "max_tokens": 16},
    "warmups": 4,
    "rate": 3.0,
    "seconds": 4.0,
    "short_s": 3.0,
    "pairs": 2,
    "tail_s": 5.0,
    "pass_s": 120.0,
    "ready_s": 300.0,
    "deadline_s": 600.0,
    "compilation": {},
    "engine_args": {"enforce_eager": True},
    "env": {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
}


class Reseed:
    """What both servers' workers can do besides (vLLM's ``--worker-extension-cls``)."""

    def kvc_reseed(self) -> str:
        from integration.gpu.arm import reseed

        return str(reseed(self))

    def kvc_memory(self) -> Json:
        """Bytes that this process knows of: torch's, and what the arena has committed."""
        import torch

        found: Json = {}
        if torch.cuda.is_available():
            found["torch_reserved"] = torch.cuda.memory_reserved()
        elastic = getattr(self, "kvcached", None)
        if elastic is not None:
            found["extents_committed"] = len(elastic.arena.committed)
        return found


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="paired.py", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for results")
    add("--model", default="/tmp/k/models/llama8b", help="folder with config and tokenizer")
    add("--selftest", action="store_true", help="the flow on a CPU with vllm-cpu")
    add("--deadline-s", type=float, default=235.0, help="whole run, counted from KVC_START")
    add("--ready-s", type=float, default=130.0, help="how long servers may take to start")
    add("--kv-bytes", type=sizes._size, default=30 * GIB, help="of each server; less if need be")
    add("--utilization", type=float, default=0.3, help="must be free when a server starts, no more")
    add("--max-model-len", type=int, default=8192)
    add("--max-num-seqs", type=int, default=256)
    add("--compilation", type=sizes._json, default=GRAPHS, help="{} for vLLM's default")
    add("--engine-args", type=sizes._json, default={}, help="more arguments for both")
    add("--env", type=sizes._json, default={}, help="more environment for both")
    add("--plugin-env", type=sizes._json, default={}, help="more environment with the plugin on")
    add(
        "--no-reseed",
        dest="reseed",
        action="store_false",
        help="dummy weights as they are, no dev mode",
    )
    add("--requests", type=int, default=48, help="requests whose tokens are compared")
    add("--alone", type=int, default=12, help="of these, how many go one by one")
    add("--longest", type=int, default=1500)
    add("--answer", type=int, default=48, help="tokens of each answer that is compared")
    add("--pass-s", type=float, default=25.0, help="limit for one pass of these requests")
    add("--load", type=sizes._json, default={"prompt_len": 1024, "max_tokens": 256})
    add("--warmups", type=int, default=16, help="concurrent requests before the load")
    add("--rate", type=float, default=11.0, help="requests/s")
    add("--seconds", type=float, default=18.0, help="arrivals of one run")
    add("--short-s", type=float, default=8.0, help="arrivals of a last pair, if no other fits")
    add("--tail-s", type=float, default=6.0, help="what a run takes besides its arrivals")
    add("--pairs", type=int, default=3, help="at most")
    add("--port", type=int, default=18080, help="off; the next one is on")
    add("--work", type=Path, default=Path("/tmp"), help="logs and intermediate files")
    add("--cache", type=Path, default=Path("/tmp/k/cache"), help="compile caches")
    chosen = parser.parse_args(words)
    if chosen.selftest:
        parser.set_defaults(**SELFTEST)
        chosen = parser.parse_args(words)
    chosen.started = float(os.environ.get("KVC_START", time.time()))
    return chosen


class Server:
    """One arm: its process, what it said of itself, and its answers."""

    def __init__(self, name: str, port: int, work: Path, o: argparse.Namespace) -> None:
        self.name = name
        self.port = port
        self.folder = work / name
        self.folder.mkdir()
        self.log = self.folder / "server.log"
        self.ready_after_s: float | None = None
        self.found: Json = {}
        arguments = argparse.Namespace(**vars(o))
        arguments.port = port
        arguments.engine_args = {
            "max_num_seqs": o.max_num_seqs,
            "max_num_batched_tokens": 8192,
            "gpu_memory_utilization": o.utilization,
            **({"compilation_config": o.compilation} if o.compilation else {}),
            **({"worker_extension_cls": "integration.gpu.paired.Reseed"} if o.reseed else {}),
            **o.engine_args,
        }
        extra = {**o.env, **({"VLLM_SERVER_DEV_MODE": "1"} if o.reseed else {})}
        if name == "on":
            extra |= {"KVCACHED_DIR": str(self.folder / "ledger"), **o.plugin_env}
        env = environment(name == "on", extra, o.cache / "shared")
        env.pop("VLLM_KV_CACHE_LAYOUT", None)
        self.child = Child(serve_command(arguments), self.log, env)

    @property
    def usable(self) -> bool:
        return self.ready_after_s is not None and self.child.returncode is None

    def look(self) -> None:
        if self.ready_after_s is None and healthy(self.port):
            self.ready_after_s = round(time.time() - self.child.launched, 2)

    def post(self, path: str, body: Json, timeout_s: float) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def call(self, method: str, timeout_s: float = 20.0) -> Any:
        answer = self.post("/collective_rpc", {"method": method}, timeout_s)
        return answer["results"][0]

    def complete(self, model: str, request: Request, best: int | None, timeout_s: float) -> Answer:
        body = {
            "model": model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "logprobs": best,
            "return_tokens_as_token_ids": best is not None,
            "return_token_ids": True,
        }
        choice = self.post("/v1/completions", body, timeout_s)["choices"][0]
        tops = [
            [(int(token.removeprefix("token_id:")), value) for token, value in top.items()]
            for top in ((choice.get("logprobs") or {}).get("top_logprobs") or [])
        ]
        return Answer(list(choice["token_ids"]), tops)

    def describe(self, status: int | None) -> Json:
        return {
            "command": self.child.command,
            "plugin": self.name,
            "startup_s": self.ready_after_s,
            **self.found,
            "exit_status": status,
            "plugin_log": plugin_lines(self.log),
        }


def gpu_processes() -> list[Json] | str:
    """Compute processes on the first GPU and their memory, or why there is no telling."""
    try:
        import pynvml

        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
        return [{"pid": p.pid, "used_bytes": p.usedGpuMemory} for p in processes]
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


class Session:
    """The run: both servers, the load, and what is known so far."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.o = o
        o.out.mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix="paired-", dir=o.work))
        self.end = o.started + o.deadline_s - MARGIN_S
        self.sampler = MemorySampler()
        self.total_bytes = self.sampler.total_bytes
        if self.sampler.method != "host":
            o.kv_bytes = min(o.kv_bytes, (self.total_bytes // 2 - BESIDE_KV) >> 30 << 30)
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
        self.events = EventLog(self.work / "client.jsonl")
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
        spec = self.work / "client-spec.json"
        deadline = self.end - 3.0
        write_json(
            spec,
            {
                "events": str(self.events.path),
                "go": str(self.go),
                "deadline": deadline,
                "runs": runs,
            },
        )
        self.client = Child(
            python("integration.gpu.bench_client", str(spec)),
            self.work / "client.log",
            environment(False, o.env, o.cache / "client"),
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
        stock = self.servers["off"]
        stock.post("/reset_prefix_cache", {}, 10.0)
        self.one_pass(stock, "control")

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
        took = time.time() - begin
        self.tokens[f"{name}_s"] = [round(alone_s, 2), round(took, 2)]

    def warm_up(self, server: Server) -> None:
        o = self.o
        requests = workload.uniform(o.warmups, o.load["prompt_len"], 32, 7000, seed=9)
        with ThreadPoolExecutor(max(1, o.warmups)) as several:
            list(several.map(lambda r: server.complete(o.model, r, None, 10.0), requests))

    def summarise_tokens(self) -> None:
        alone = self.o.alone
        for one, two in (("off", "on"), ("off", "control")):
            for part, cut in (("alone", slice(None, alone)), ("concurrent", slice(alone, None))):
                names = [name if part == "concurrent" else f"{name}:alone" for name in (one, two)]
                found = [self.answers.get(name) for name in names]
                if found[0] and found[1]:
                    pair = [answers[cut] for answers in found if answers]
                    self.tokens[f"{one}/{two}:{part}"] = workload.compare(*pair)
        self.tokens["distinct_tokens"] = {
            name: len({t for answer in answers for t in answer.tokens})
            for name, answers in self.answers.items()
        }
        packed = {name: [a.tokens for a in answers] for name, answers in self.answers.items()}
        write_json(self.o.out / "paired-tokens.json", packed)

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
                self.save()
        while self._due and self._due[0][0] <= now:
            self.mark(self._due.pop(0)[1])

    def drop_caches(self) -> None:
        """The end of it: memory with the prefix caches that the load left, and without."""
        self.mark("drained", ask=True)
        for server in self.servers.values():
            if server.usable and self.o.reseed:
                self.attempt(
                    f"{server.name}: reset",
                    lambda server=server: server.post("/reset_prefix_cache", {}, 1.0),
                )
        time.sleep(max(0.0, min(1.5, self.end - time.time())))
        self.mark("emptied", ask=True)

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
                full = json.loads(path.read_text())
                found[event["label"]] = {name: full[name] for name in KEPT if name in full}
        return found

    def summary(self, runs: Json) -> Json:
        """On over off: for each pair, and of the medians of the full-length runs."""
        pairs = [str(k + 1) for k in range(self.o.pairs)]
        whole = [p for p in pairs if all(f"{p}-{arm}" in runs for arm in ARMS)]
        figures: Json = {"pairs": {}, "median": {}, "on_over_off_of_medians": {}}
        for pair in [*whole, "short"]:
            off, on = (runs.get(f"{pair}-{arm}", {}) for arm in ARMS)
            ratio = {n: round(on[n] / off[n], 4) for n in KEPT if off.get(n) and on.get(n)}
            if ratio:
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
        figures["on_over_off_of_medians"] = {
            name: round(on[name] / off[name], 4) for name in KEPT if off.get(name) and name in on
        }
        figures["same_arm_last_over_first"] = {
            arm: {
                name: round(runs[f"{whole[-1]}-{arm}"][name] / runs[f"{whole[0]}-{arm}"][name], 4)
                for name in serving.COMPARED
                if runs[f"{whole[0]}-{arm}"].get(name)
            }
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
        tails = (
            f"==> {path.relative_to(self.work)} <==\n{tail(path, 60_000)}\n"
            for path in sorted(self.work.rglob("*.log"))
        )
        (o.out / "paired-logs.txt").write_text("".join(tails))

    def sampled(self, label: str, events: list[Json], runs: Json) -> None:
        """Add the device memory during a run to its figures."""
        times = {e["event"]: e["t"] for e in events if e.get("label") == label}
        if label in runs and "run_end" in times:
            runs[label]["device_gib"] = self.sampler.window(times["run_begin"], times["run_end"])


def main() -> int:
    options = parse(sys.argv[1:])
    exit_on_signals()
    session = Session(options)
    failed = False
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
        failed = True
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
    return 1 if failed or session.notes else 0


if __name__ == "__main__":
    sys.exit(main())
