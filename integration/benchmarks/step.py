"""What an elastic cache costs a step of vLLM beside its kernels, by the number of running requests.

    python -m integration.benchmarks.step [--json FILE] [--repetitions N]

vLLM's own scheduler runs with results made up and no model, stock and with our plugin, each in a
process of its own and by turns. Requests decode; each takes a block every 16 steps. Our side is all
there: the steward, the ledger on disk, and a worker's memory on the host driver. Two figures for a
step: its time, the shortest of each step over all repetitions; and calls of Python functions and
into C, the same on any machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

from integration.benchmarks.traces import BLOCK_TOKENS, make_scheduler, take_step
from integration.gpu.record import MemorySampler, facts, write_json
from kvcached_vmm.units import KIB

RUNNING = (8, 64, 200)
BLOCKS = 16384
BLOCK_BYTES = 64 * KIB
"""A granule of the host driver; sixteen make an extent, as for Llama-3.1-8B."""
PROMPT_TOKENS = 256
WARM_STEPS = 64
STEPS = 160


class UniProcExecutor:
    """A worker in this process, as far as a steward looks. vLLM's own has this name."""

    def __init__(self, worker: Any) -> None:
        self.driver_worker = SimpleNamespace(worker=worker)

    def collective_rpc(self, method: str, args: tuple[object, ...] = ()) -> list[Any]:
        """Call one of the methods that our workers gain."""
        memory = self.driver_worker.worker.kvcached
        return [getattr(memory, method.removeprefix("kvcached_"))(*args)]


def scheduler_of(model: Path, blocks: int, prefix_caching: bool = False) -> Any:
    """vLLM's scheduler over so many blocks of ``BLOCK_BYTES``, one after the other."""
    tensor = SimpleNamespace(
        size=blocks * BLOCK_BYTES, block_stride=BLOCK_BYTES, offset=0, layers=["layer"]
    )
    return make_scheduler(model, blocks, [tensor], prefix_caching)


def make_elastic(scheduler: Any, blocks_per_extent: int = 16) -> Callable[[Any], None]:
    """Give a scheduler what our plugin gives it in an engine; returns what stands in for a step of
    the worker."""
    import torch

    from kvcached_plugins.settings import Settings
    from kvcached_plugins.vllm.geometry import ATTRIBUTE, Plan
    from kvcached_plugins.vllm.memory import WorkerMemory
    from kvcached_plugins.vllm.steward import Steward

    config = scheduler.kv_cache_config
    setattr(config, ATTRIBUTE, Plan(blocks_per_extent))
    worker = SimpleNamespace(device=torch.device("cpu"))
    worker.kvcached = memory = WorkerMemory(worker, config, Settings.read())
    core = SimpleNamespace(
        vllm_config=scheduler.vllm_config, model_executor=UniProcExecutor(worker)
    )
    scheduler.kvcached = steward = Steward(core, scheduler, Settings.read())

    def run(scheduled: Any) -> None:
        memory.before_step(scheduled)
        memory.launch_is_over()
        steward.stepped()

    return run


def measure(model: Path, running: int, elastic: bool) -> tuple[list[int], list[int]]:
    """Nanoseconds of each of ``STEPS`` steps, and calls in each of as many more."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    scheduler = scheduler_of(model, BLOCKS)
    run = make_elastic(scheduler) if elastic else id
    for number in range(running):
        prompt = [number] * (PROMPT_TOKENS + number % BLOCK_TOKENS)
        params = SamplingParams(max_tokens=4096, ignore_eos=True)
        scheduler.add_request(Request(str(number), prompt, params, None))
    for _ in range(WARM_STEPS):
        take_step(scheduler, run)
    gc.collect()
    gc.disable()
    times, counts = [], []
    for _ in range(STEPS):
        began = time.perf_counter_ns()
        take_step(scheduler, run)
        times.append(time.perf_counter_ns() - began)
    for _ in range(STEPS):
        counts.append(_calls(lambda: take_step(scheduler, run)))
    return times, counts


def _calls(action: Callable[[], object]) -> int:
    made = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal made
        made += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(before)
    return made


def arm(model: Path, elastic: bool) -> None:
    """Measure in this process and print what was found, for the process that compares."""
    if elastic:
        from kvcached_plugins.vllm.plugin import register

        register()
    print(json.dumps({running: measure(model, running, elastic) for running in RUNNING}))


def _started(model: Path, elastic: bool, folder: Path) -> dict[str, list[list[int]]]:
    command = [sys.executable, "-m", "integration.benchmarks.step", "--arm", str(model)]
    env = {**os.environ, "ENABLE_KVCACHED": str(int(elastic)), "KVCACHED_DIR": str(folder)}
    env |= {"KVCACHED_BUDGET": str(BLOCKS * BLOCK_BYTES), "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    answer: dict[str, list[list[int]]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def compare(model: Path, repetitions: int) -> list[dict[str, float]]:
    """What a step costs stock vLLM, and how much more with an elastic cache."""
    found: dict[bool, list[dict[str, list[list[int]]]]] = {False: [], True: []}
    for number in range(repetitions):
        for elastic in (False, True):
            with tempfile.TemporaryDirectory() as name:
                found[elastic].append(_started(model, elastic, Path(name) / f"ledger-{number}"))
    figures = []
    for running in map(str, RUNNING):
        stock, ours = (
            mean(map(min, zip(*(each[running][0] for each in found[arm]), strict=True))) / 1e3
            for arm in (False, True)
        )
        calls = mean(found[True][0][running][1]) - mean(found[False][0][running][1])
        figures.append(
            {
                "running": int(running),
                "stock_us": round(stock, 1),
                "added_us": round(ours - stock, 1),
                "added_calls": round(calls, 1),
            }
        )
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--arm", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        arm(options.arm, os.environ["ENABLE_KVCACHED"] == "1")
        return 0
    from integration.models import write_model

    with tempfile.TemporaryDirectory() as name:
        figures = compare(write_model(Path(name) / "model"), options.repetitions)
    for each in figures:
        print(
            f"{each['running']:4d} running: stock {each['stock_us']:8.1f} us a step, ours"
            f" {each['added_us']:+7.1f} us and {each['added_calls']:+7.1f} calls"
        )
    if options.json:
        setup = {"repetitions": options.repetitions, "steps": STEPS, "block_bytes": BLOCK_BYTES}
        report = {"facts": facts(MemorySampler()), "setup": setup, "figures": figures}
        write_json(options.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
