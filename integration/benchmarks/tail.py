"""What an engine without a prefix cache holds while a load's last answers end. Needs no GPU.

    python -m integration.benchmarks.tail [--json FILE] [--speed N]

The load of ``integration/gpu/footprint.py``: answers differ in length by two orders of magnitude,
so that a few long ones are left of many. vLLM's own scheduler runs with results made up and no
model, at the pace of an H200, under our plugin: steward, ledger, and a worker's memory on the host
driver, where blocks are 32 times smaller than those of Llama-3.1-8B. The figure is committed over
live bytes from the last request to the last answer, both summed over all steps.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from integration.benchmarks.churn import BLOCK_BYTES as REAL_BLOCK_BYTES
from integration.benchmarks.churn import (
    FOOTPRINT_STEP_S,
    GOAL,
    RESERVE_BYTES,
    Moment,
    footprint_load,
    ratio,
)
from integration.benchmarks.step import BLOCK_BYTES, BLOCKS, make_elastic, scheduler_of
from integration.benchmarks.traces import take_step
from integration.gpu.record import MemorySampler, facts, write_json
from integration.gpu.traffic import Ask
from kvcached_vmm.extents import OWN_EXTENT_BYTES
from kvcached_vmm.policy import Policy


def environment(folder: Path, speed: float) -> dict[str, str]:
    """Of the engine: everything as by default, but for the size of blocks and the pace."""
    return {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_DIR": str(folder),
        "KVCACHED_BUDGET": str(BLOCKS * BLOCK_BYTES),
        "KVCACHED_RESERVE": str(RESERVE_BYTES * BLOCK_BYTES // REAL_BLOCK_BYTES),
        "KVCACHED_DECAY": str(Policy().decay_seconds / speed),
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def play(model: Path, speed: float) -> tuple[list[Moment], list[Moment]]:
    """Run the load; bytes at the end of each step before its last request, and after it."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    scheduler = scheduler_of(model, BLOCKS)
    run = make_elastic(scheduler, OWN_EXTENT_BYTES // REAL_BLOCK_BYTES)
    pool = scheduler.kvcached.pool

    def add(number: int, ask: Ask) -> None:
        params = SamplingParams(max_tokens=ask.output_tokens, ignore_eos=True)
        scheduler.add_request(Request(str(number), [number] * ask.prompt_tokens, params, None))

    asks = list(enumerate(footprint_load()))
    under: list[Moment] = []
    after: list[Moment] = []
    began = time.monotonic()
    while asks or scheduler.has_requests():
        step_began = time.monotonic()
        while asks and asks[0][1].at_s <= (step_began - began) * speed:
            add(*asks.pop(0))
        take_step(scheduler, run)
        told = under if asks else after
        told.append(Moment(pool.committed_bytes, pool.live_blocks * BLOCK_BYTES))
        time.sleep(max(0.0, step_began + FOOTPRINT_STEP_S / speed - time.monotonic()))
    return under, after


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--speed", type=float, default=1.0, help="times the pace of an H200")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ.update(environment(Path(name) / "ledger", options.speed))
        from integration.models import write_model
        from kvcached_plugins.vllm.plugin import register

        register()
        under, after = play(write_model(Path(name) / "model"), options.speed)
    figures = {
        when: round(ratio(moments), 4)
        for when, moments in (("under_load", under), ("after_load", after))
    }
    told = f"under load {figures['under_load']}, after it {figures['after_load']}"
    print(f"committed/live: {told} (goal: at most {GOAL})")
    if options.json:
        setup = {"speed": options.speed, "step_s": FOOTPRINT_STEP_S, "block_bytes": BLOCK_BYTES}
        report = {"facts": facts(MemorySampler()), "setup": setup, "goal": GOAL, **figures}
        write_json(options.json, report)
    return 0 if figures["after_load"] <= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
