"""An engine that grows into the caches of two that rest: who is preempted, and who waits how long.

    python -m integration.benchmarks.growth [--json FILE] [--rate N]

Three engines share a budget that the caches of two fill. The third gets a peak of requests, and has
to have every extent from them. Then the same peak on a stock engine with a third of that memory.
vLLM's own scheduler runs with results made up and no model, each engine in a process of its own,
ours with all of our plugin on the host driver. A step takes the time that a model would. vLLM
preempts a running request that lacks a single block, and computes it again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from integration.benchmarks.step import BLOCK_BYTES, make_elastic, scheduler_of
from integration.benchmarks.traces import BLOCK_TOKENS, take_step
from integration.gpu import traffic
from integration.gpu.record import MemorySampler, facts, write_json
from kvcached_vmm.units import MIB

BLOCKS = 12288
"""As many as 24 GiB hold for Llama-3.1-8B."""
STEP_S = 0.009
"""A decoding step of such a model with 60 requests on an H200 (colocation)."""
PROMPT_TOKENS = ANSWER_TOKENS = 1024
SECONDS = 10.0
PATIENCE_S = 90.0
RESTING = ("resting-a", "resting-b")
MODULE = "integration.benchmarks.growth"


def request(name: str, seed: int, prompt: int, answer: int) -> Any:
    """A request whose blocks are cached once they are full, with a prompt of its own."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    dice = random.Random(seed)
    return Request(
        name,
        [dice.randrange(10, 1000) for _ in range(prompt)],
        SamplingParams(max_tokens=answer, ignore_eos=True),
        None,
        block_hasher=get_request_block_hasher(BLOCK_TOKENS, sha256),
    )


def rest(model: Path) -> None:
    """Serve until half of the budget is cache, say so, and rest until standard input is closed."""
    scheduler = scheduler_of(model, BLOCKS, prefix_caching=True)
    run = make_elastic(scheduler)
    pool = scheduler.kvcached.pool
    for number in range(BLOCKS // 2 * BLOCK_TOKENS // 2048 + 2):
        scheduler.add_request(request(str(number), os.getpid() + number, 2040, 4))
    while scheduler.has_requests():
        take_step(scheduler, run)
    print(pool.committed_bytes, flush=True)
    sys.stdin.read()


def peak(model: Path, elastic: bool, rate: float) -> dict[str, Any]:
    """Requests that come faster and then slower again, until all are answered."""
    scheduler = scheduler_of(model, BLOCKS if elastic else BLOCKS // 3, prefix_caching=True)
    run = make_elastic(scheduler) if elastic else id
    asks = traffic.ramp(rate, SECONDS, PROMPT_TOKENS, ANSWER_TOKENS, seed=3)
    requests = [
        request(f"{n}", 1 << 20 | n, PROMPT_TOKENS, ANSWER_TOKENS) for n in range(len(asks))
    ]
    first: dict[str, float] = {}
    steps, sent, began = 0, 0, time.perf_counter()
    while sent < len(asks) or scheduler.has_requests():
        now = time.perf_counter() - began
        if now > PATIENCE_S:
            break
        while sent < len(asks) and asks[sent].at_s <= now:
            scheduler.add_request(requests[sent])
            sent += 1
        if scheduler.has_requests():
            take_step(scheduler, run)
            steps += 1
        time.sleep(max(0.0, now + STEP_S - (time.perf_counter() - began)))
        for each in scheduler.running:
            if each.num_output_tokens and each.request_id not in first:
                at = asks[int(each.request_id)].at_s
                first[each.request_id] = time.perf_counter() - began - at
    waits = sorted(first.values())
    return {
        "requests": len(asks),
        "answered": sum(each.is_finished() for each in requests),
        "preempted": sum(each.num_preemptions for each in requests),
        "steps": steps,
        "first_token_ms": {
            "mean": round(1e3 * sum(waits) / len(waits), 1),
            "p99": round(1e3 * waits[int(0.99 * (len(waits) - 1))], 1),
        },
    }


def arm(part: str, model: Path, rate: float) -> None:
    """One engine, in this process."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash

    if part != "static":
        from kvcached_plugins.vllm.plugin import register

        register()
    init_none_hash(sha256)
    if part in RESTING:
        rest(model)
    else:
        print(json.dumps(peak(model, part == "elastic", rate)))


def started(
    module: str, part: str, folder: Path, words: Sequence[str], elastic: bool = True
) -> subprocess.Popen[str]:
    """An engine in a process of its own: ``module`` with ``--arm part`` and ``words``."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("KVCACHED_")}
    env |= {"ENABLE_KVCACHED": str(int(elastic)), "VLLM_LOGGING_LEVEL": "ERROR"}
    env |= {"KVCACHED_DIR": str(folder), "KVCACHED_NAME": part}
    # What the default is for 24 GiB of blocks of 2 MiB: 512 MiB.
    env |= {"KVCACHED_BUDGET": str(BLOCKS * BLOCK_BYTES), "KVCACHED_RESERVE": str(16 * MIB)}
    return subprocess.Popen(
        [sys.executable, "-m", module, "--arm", part, *words],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def two_that_rest(module: str, folder: Path, words: Sequence[str]) -> Iterator[list[int]]:
    """Two engines of ``module`` whose caches fill the budget; yields the bytes of each."""
    engines = [started(module, part, folder, words) for part in RESTING]
    try:
        held = []
        for engine in engines:
            assert engine.stdout is not None
            held.append(int(engine.stdout.readline()))
        yield held
    finally:
        for engine in engines:
            engine.communicate()


def compare(folder: Path, rate: float) -> dict[str, Any]:
    """The peak beside two that rest, and on an engine with a third for itself."""
    from integration.models import write_model

    ledger, words = folder / "ledger", [str(write_model(folder / "model")), "--rate", str(rate)]
    with two_that_rest(MODULE, ledger, words) as held:
        found: dict[str, Any] = {"cached_before_bytes": sum(held)}
        for part in ("elastic", "static"):
            engine = started(MODULE, part, ledger, words, elastic=part == "elastic")
            output, _ = engine.communicate()
            found[part] = json.loads(output.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rate", type=float, default=18.0, help="peak, requests/s")
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        arm(options.arm[0], Path(options.arm[1]), options.rate)
        return 0
    with tempfile.TemporaryDirectory() as name:
        found = compare(Path(name), options.rate)
    for part in ("elastic", "static"):
        print(f"{part}: {found[part]}")
    if options.json:
        write_json(options.json, {"facts": facts(MemorySampler()), "rate": options.rate, **found})
    return 0 if found["elastic"]["preempted"] == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
