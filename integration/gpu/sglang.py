"""Stock SGLang with the plugin off and on, on one GPU in one run.

    integration/gpu/run.sh exec bash integration/gpu/sglang.sh --out "$OUT"

Each arm is one `python -m sglang.launch_server` with the same arguments and, on, the plugin: tokens
of mixed requests, saturated throughput (several times, the first one grows from nothing), open-loop
latency at half of it, and memory after start, under load, and up to 10 s after the last request.
The client is this program, over /generate: `sglang.bench_serving` needs packages that the machine
lacks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from integration.gpu import workload
from integration.gpu.lane import first_port, root, sglang_site
from integration.gpu.process import Child, environment, exit_on_signals, python, stop_all
from integration.gpu.record import (
    Json,
    MemorySampler,
    facts,
    ledger_snapshot,
    plugin_lines,
    write_json,
)

ORDER = ("off", "on")
DRAIN_S = (0.0, 1.0, 2.0, 5.0, 10.0)
VOCABULARY = 32000
READY_S = 240.0
BESIDE = 0.8
"""Of the device: as much as SGLang may take beside others; its size is given in tokens."""
HALF = 0.5
"""Load of the latency run, as a share of the requests per second that the off arm saturated at."""


class Timed(NamedTuple):
    """One request: seconds to its first token and to its last, and its tokens."""

    first_s: float
    last_s: float
    tokens: list[int]


class Arm:
    """One server, plugin on or off, from its start to its end."""

    def __init__(self, name: str, options: argparse.Namespace, sampler: MemorySampler) -> None:
        self.name = name
        self.options = options
        self.sampler = sampler
        self.folder = Path(tempfile.mkdtemp(prefix=f"sglang-{name}-", dir=options.work))
        self.log = self.folder / "server.log"
        self.result: Json = {"arm": name, "memory_gib": {}, "ledger": {}}

    def run(self, half_rate: float | None) -> Json:
        """Serve and load; returns what is known, also when something failed on the way."""
        options, result = self.options, self.result
        before = self.sampler.used_bytes()
        env = environment(self.name == "on", {}, self.folder / "cache")
        if self.name == "on":
            env["KVCACHED_DIR"] = str(self.folder / "ledger")
        server = Child(arm_command(options), self.log, env)
        result["command"] = server.command
        begin = time.time()
        try:
            while not self._healthy():
                if server.returncode is not None or time.time() - begin > READY_S:
                    result["error"] = f"not ready, exit status {server.returncode}"
                    return result
                time.sleep(0.2)
            result["startup_s"] = round(time.time() - begin, 1)
            self._mark("started")
            mixed = workload.mixed(64, 2048, 128, VOCABULARY, seed=1)
            result["tokens"] = [answer.tokens for answer in self._at_once(mixed)]
            for repetition in range(options.repetitions):
                result[f"saturated-{repetition}"] = self._saturate(seed=10 + repetition)
                self._mark(f"saturated-{repetition}")
            rate = half_rate or HALF * result["saturated-0"]["requests_per_s"]
            result["half"] = self._paced(rate, seed=20)
            ended = time.time()
            for after in DRAIN_S:
                time.sleep(max(0.0, ended + after - time.time()))
                self._mark(f"drained+{after:g}s")
        finally:
            result["exit_status"] = server.stop()
            self.sampler.wait_below(before + (1 << 30), timeout_s=20.0)
            result["plugin_log"] = plugin_lines(self.log)
        return result

    def _saturate(self, seed: int) -> Json:
        o = self.options
        requests = workload.uniform(o.count, o.prompt_len, o.max_tokens, VOCABULARY, seed)
        began = time.time()
        answers = self._at_once(requests)
        seconds = time.time() - began
        return {
            "seconds": round(seconds, 2),
            "requests_per_s": round(len(answers) / seconds, 3),
            "output_tokens_per_s": round(sum(len(a.tokens) for a in answers) / seconds, 1),
        }

    def _paced(self, rate: float, seed: int) -> Json:
        """Requests at random moments, ``rate`` a second on average."""
        o = self.options
        rng = random.Random(seed)
        requests = workload.uniform(
            max(8, round(rate * o.seconds)), o.prompt_len, o.max_tokens, VOCABULARY, seed
        )
        due, moments = 0.0, []
        for _ in requests:
            due += rng.expovariate(rate)
            moments.append(due)
        began = time.time()

        def later(moment: float, request: workload.Request) -> Timed:
            time.sleep(max(0.0, began + moment - time.time()))
            return self._generate(request)

        with ThreadPoolExecutor(len(requests)) as threads:
            answers = list(threads.map(later, moments, requests))
        each_ms = [1e3 * (a.last_s - a.first_s) / max(1, len(a.tokens) - 1) for a in answers]
        return {
            "rate": round(rate, 3),
            "ttft_ms": spread([1e3 * answer.first_s for answer in answers]),
            "tpot_ms": spread(each_ms),
        }

    def _at_once(self, requests: list[workload.Request]) -> list[Timed]:
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(self._generate, requests))

    def _generate(self, request: workload.Request) -> Timed:
        sampling = {"temperature": 0, "max_new_tokens": request.max_tokens, "ignore_eos": True}
        body = {"input_ids": request.prompt, "sampling_params": sampling, "stream": True}
        began = time.time()
        first, tokens = 0.0, []
        with self._open("/generate", body) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    first = first or time.time() - began
                    tokens = json.loads(line[6:])["output_ids"]
        return Timed(first, time.time() - began, tokens)

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError), self._open("/health") as answer:
            return bool(answer.status == 200)
        return False

    def _open(self, path: str, body: Json | None = None) -> contextlib.AbstractContextManager:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.options.port}{path}",
            json.dumps(body).encode() if body else None,
            {"content-type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=300)

    def _mark(self, name: str) -> None:
        now = time.time()
        self.result["memory_gib"][name] = self.sampler.window(now - 1.0, now)
        if self.name == "on":
            device = facts(self.sampler)["gpu"].get("uuid", "host")
            self.result["ledger"][name] = ledger_snapshot(self.folder / "ledger", device)


def arm_command(options: argparse.Namespace) -> list[str]:
    """The server of both arms."""
    return [
        *python("sglang.launch_server", "--model-path", options.model, "--skip-tokenizer-init"),
        *(() if options.weights else ("--load-format", "dummy")),
        *("--port", str(options.port), "--context-length", str(options.context)),
        *("--mem-fraction-static", str(options.share), *options.server_args.split()),
    ]


def command(o: argparse.Namespace, tokens: int) -> list[str]:
    """A server beside others, as tenants.py starts them: eager, ``tokens`` of KV cache."""
    words = {
        "--model-path": o.model,
        "--load-format": "dummy",
        "--port": o.port,
        "--context-length": o.max_model_len,
        "--max-running-requests": o.max_num_seqs,
        "--max-total-tokens": tokens,
        "--mem-fraction-static": BESIDE,
        "--attention-backend": "fa3",
        "--sampling-backend": "pytorch",
    }
    pairs = (str(word) for pair in words.items() for word in pair)
    return python("sglang.launch_server", *pairs, "--disable-cuda-graph")


def site_environment() -> dict[str, str]:
    """What SGLang's archive needs (sglang-env.sh of the kit), for a child of a vLLM program."""
    site = sglang_site()
    repository = Path(__file__).resolve().parents[2]
    return {
        "PYTHONPATH": f"{root() / 'plug'}:{site}:{repository}",
        "TVM_FFI_CACHE_DIR": str(site / "jit-cache" / "tvm-ffi"),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_HOME": os.environ.get("CUDA_HOME", "/usr/local/cuda"),
    }


def spread(values: list[float]) -> Json:
    ordered = sorted(values)
    return {
        "mean": round(statistics.fmean(ordered), 3),
        "median": round(statistics.median(ordered), 3),
        "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
    }


def compared(off: Json, on: Json) -> Json:
    """On over off; tokens are equal or not, request by request."""
    pairs = list(zip(off["tokens"], on["tokens"], strict=True))
    rates = [
        [each["output_tokens_per_s"] for name, each in arm.items() if name.startswith("saturated")]
        for arm in (off, on)
    ]
    stock, ours = (statistics.median(each) for each in rates)
    return {
        "equal_answers": sum(one == two for one, two in pairs),
        "answers": len(pairs),
        "throughput": round(ours / stock, 4),
        "throughput_of_each": [round(on / off, 4) for off, on in zip(*rates, strict=True)],
        "noise_off": [round(each / stock, 4) for each in rates[0]],
        **{
            f"{what}_{which}": round(on["half"][what][which] / off["half"][what][which], 4)
            for what in ("ttft_ms", "tpot_ms")
            for which in ("mean", "median", "p99")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=str(root() / "models" / "llama8b"))
    parser.add_argument(
        "--no-weights",
        dest="weights",
        action="store_false",
        help="SGLang's own dummy weights, with which no token depends on the KV cache",
    )
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--port", type=int, default=first_port())
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--share", type=float, default=0.8, help="--mem-fraction-static")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=5, help="saturated, each arm")
    parser.add_argument("--seconds", type=float, default=40.0, help="length of the paced load")
    parser.add_argument(
        "--server-args", default="--attention-backend fa3 --sampling-backend pytorch"
    )
    options = parser.parse_args()
    exit_on_signals()
    options.out.mkdir(parents=True, exist_ok=True)
    sampler = MemorySampler()
    sampler.start()
    record: Json = {**facts(sampler), "parameters": {k: str(v) for k, v in vars(options).items()}}
    arms: Json = {}
    if options.weights:
        folder = options.work / "checkpoint"
        words = python("integration.gpu.checkpoint", options.model, str(folder))
        subprocess.run(words, check=True)  # a process of its own: it uses the GPU
        options.model = str(folder)
    try:
        for name in ORDER:
            rate = arms["off"].get("half", {}).get("rate") if arms else None
            arms[name] = Arm(name, options, sampler).run(rate)
            record["arms"] = arms
            write_json(options.out / "sglang.json", record)
        if not any("error" in arm for arm in arms.values()):
            record["compared"] = compared(arms["off"], arms["on"])
            print(json.dumps(record["compared"], indent=1))
    finally:
        stop_all()
        write_json(options.out / "sglang.json", record)


if __name__ == "__main__":
    main()
