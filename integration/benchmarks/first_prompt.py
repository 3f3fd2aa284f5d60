"""How long a first prompt waits for memory that two engines that rest hold as cache.

    python -m integration.benchmarks.first_prompt [--json FILE] [--prompts N]

The budget is full when each prompt comes, so every extent of it has to come from a neighbour, whose
device may be late: what is given back counts as in use until then, as on a GPU that runs another
process's kernels. vLLM's own schedulers with made-up results and no model, each engine in a process
of its own, all of our plugin on the host driver.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from integration.benchmarks.growth import BLOCKS, request, rest, started, two_that_rest
from integration.benchmarks.step import make_elastic, scheduler_of
from integration.benchmarks.traces import finish_step, take_step
from integration.gpu.record import MemorySampler, facts, write_json
from kvcached_vmm.units import MIB

LATE_S = (0.0, 0.0005, 0.003)
"""From the mark that follows an engine's last work to the moment at which its device passes it."""
GOAL_MS = 20.0
"""At most, in the median: three decoding steps of Llama-3.1-8B on an H200."""
PROMPT_TOKENS = 1024
REST_S = 1.5
"""Between prompts: memory without content has gone by then, and nobody is about to ask."""
ASKING = "asking"
MODULE = "integration.benchmarks.first_prompt"


class Late:
    """A mark that passes so many seconds after it was set."""

    def __init__(self, seconds: float) -> None:
        self._passed_at = time.monotonic() + seconds

    def query(self) -> bool:
        return time.monotonic() >= self._passed_at

    def synchronize(self) -> None:
        time.sleep(max(0.0, self._passed_at - time.monotonic()))


def ask(model: Path, folder: Path, prompts: int) -> list[float]:
    """Milliseconds from each prompt's arrival to the round that schedules it."""
    from kvcached_vmm.ledger import Ledger

    scheduler = scheduler_of(model, BLOCKS, prefix_caching=True)
    run = make_elastic(scheduler)
    rival = Ledger.open(folder, "host").join("rival", None)
    waits = []
    for number in range(prompts):
        scheduler.kvcached.pool.forget_all()
        time.sleep(REST_S)
        taken = rival.reserve(rival.view().free_bytes, MIB)
        rival.commit(taken, taken)
        scheduler.add_request(request(str(number), 1 << 22 | number, PROMPT_TOKENS, 4))
        began = time.perf_counter()
        while not (scheduled := scheduler.schedule()).total_num_scheduled_tokens:
            finish_step(scheduler, scheduled, run)
            time.sleep(0.001)  # as vLLM's engine core when it can run nothing
        waits.append(1e3 * (time.perf_counter() - began))
        finish_step(scheduler, scheduled, run)
        while scheduler.has_requests():
            take_step(scheduler, run)
    return waits


def arm(part: str, model: Path, late_s: float, prompts: int) -> None:
    """One engine, in this process."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash

    from kvcached_plugins.vllm.plugin import register

    register()
    init_none_hash(sha256)
    if part == ASKING:
        print(json.dumps(ask(model, Path(os.environ["KVCACHED_DIR"]), prompts)))
        return
    if late_s:
        from kvcached_plugins.vllm import memory

        memory.Passed = functools.partial(Late, late_s)  # type: ignore[assignment,misc]
    rest(model)


def measure(folder: Path, late_s: float, prompts: int) -> dict[str, float]:
    """Waits of so many prompts beside two engines whose device is that late."""
    from integration.models import write_model

    ledger, model = folder / "ledger", str(write_model(folder / "model"))
    words = [model, str(late_s), "--prompts", str(prompts)]
    with two_that_rest(MODULE, ledger, words):
        output, _ = started(MODULE, ASKING, ledger, words).communicate()
    waits = json.loads(output.splitlines()[-1])
    return {
        "late_ms": 1e3 * late_s,
        "prompts": len(waits),
        "median_ms": round(statistics.median(waits), 2),
        "longest_ms": round(max(waits), 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--prompts", type=int, default=15, help="beside each lateness")
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        part, model, late_s = options.arm
        arm(part, Path(model), float(late_s), options.prompts)
        return 0
    figures = []
    for late_s in LATE_S:
        with tempfile.TemporaryDirectory() as name:
            figures.append(measure(Path(name), late_s, options.prompts))
        print(figures[-1], flush=True)
    if options.json:
        found = {"facts": facts(MemorySampler()), "goal_ms": GOAL_MS, "figures": figures}
        write_json(options.json, found)
    return 0 if all(each["median_ms"] <= GOAL_MS for each in figures) else 1


if __name__ == "__main__":
    raise SystemExit(main())
