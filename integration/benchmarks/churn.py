"""Committed against live bytes in a churn of requests with staggered lengths. Needs no GPU.

    python -m integration.benchmarks.churn [--json FILE]

Simulates an engine's steps over the real pool and a real extent map: requests arrive in bursts and
lulls, prompts take their blocks at once, decoding takes one block every 16 tokens, lengths are
log-normal, so that neighbours in an extent end at different times. Time is simulated; the policy is
the default one. The figure is the sum over all steps of committed blocks over that of live blocks.
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from integration.gpu.record import MemorySampler, facts, write_json
from kvcached_vmm.extents import EXTENT_BYTES, ExtentMap, Region, blocks_per_extent
from kvcached_vmm.fence import StepClock
from kvcached_vmm.policy import Policy
from kvcached_vmm.pool import ElasticPool
from kvcached_vmm.units import MIB

BLOCK_TOKENS = 16
BLOCK_BYTES = 2 * MIB
"""Llama-3.1-8B in bf16: 16 tokens of 32 layers, 8 KV heads of 128."""
GOAL = 1.15


@dataclass(frozen=True)
class Scenario:
    """A load: prompt lengths up to ``longest_prompt``, bursts and lulls of 20 s each."""

    name: str
    longest_prompt: int
    longest_output: int = 1024
    burst_per_second: float = 30.0
    lull_per_second: float = 2.5
    concurrency: int = 128
    step_seconds: float = 0.02
    steps: int = 6000
    seed: int = 0


SCENARIOS = (
    Scenario("prompts up to 2048", 2048),
    Scenario("prompts up to 512", 512),
    Scenario("prompts up to 8192", 8192, burst_per_second=10, lull_per_second=1),
)


@dataclass(slots=True)
class Block:
    block_id: int


@dataclass(slots=True)
class _Request:
    end: int
    tokens: int
    blocks: list[Block] = field(default_factory=list)


class Plenty:
    """A budget that never runs out."""

    def reserve(self, wanted_bytes: int, unit_bytes: int) -> int:
        return wanted_bytes // unit_bytes * unit_bytes

    def commit(self, granted_bytes: int, used_bytes: int, extents: int) -> None: ...

    def release(self, used_bytes: int) -> None: ...


def arrivals(scenario: Scenario) -> Iterator[list[_Request]]:
    """The requests that arrive at each step."""
    chance = random.Random(scenario.seed)
    for step in range(scenario.steps):
        bursting = step * scenario.step_seconds % 40 < 20
        rate = scenario.burst_per_second if bursting else scenario.lull_per_second
        new = []
        if chance.random() < rate * scenario.step_seconds:
            prompt = chance.randint(64, scenario.longest_prompt)
            output = max(16, min(scenario.longest_output, int(chance.lognormvariate(5.5, 1))))
            new.append(_Request(prompt + output, prompt))
        yield new


def churn(
    scenario: Scenario, extent_bytes: int = EXTENT_BYTES, policy: Policy | None = None
) -> float:
    """Committed over live blocks, summed over the run."""
    count = 32768
    region = Region(0, BLOCK_BYTES)
    span = blocks_per_extent([region], 2 * MIB, extent_bytes)
    clock = StepClock()
    seconds = 0.0
    pool = ElasticPool(
        [Block(index) for index in range(count)],
        ExtentMap(count, [region], 2 * MIB, span),
        Plenty(),
        clock,
        lambda blocks: None,
        policy or Policy(),
        now=lambda: seconds,
    )
    running: list[_Request] = []
    waiting: deque[_Request] = deque()
    committed = live = 0
    for new in arrivals(scenario):
        seconds += scenario.step_seconds
        waiting += new
        for request in running:
            request.tokens += 1
            if request.tokens > len(request.blocks) * BLOCK_TOKENS:
                pool.prepare(1)
                request.blocks += pool.take(1)
        while waiting and len(running) < scenario.concurrency:
            request = waiting.popleft()
            needed = -(-request.tokens // BLOCK_TOKENS)
            pool.prepare(needed)
            request.blocks = pool.take(needed)
            running.append(request)
        pool.settle()
        pool.released(pool.tick())
        clock.finish(clock.launch())
        for request in [request for request in running if request.tokens >= request.end]:
            running.remove(request)
            pool.put(request.blocks[::-1])
        committed += pool.committed_bytes // BLOCK_BYTES
        live += pool.live_blocks
    return committed / live


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures = []
    for scenario in SCENARIOS:
        ratio = churn(scenario)
        figures.append({"scenario": asdict(scenario), "committed_over_live": round(ratio, 4)})
        print(f"{scenario.name:20s} committed/live {ratio:.3f} (goal: at most {GOAL})")
    if options.json:
        write_json(options.json, {**facts(MemorySampler()), "goal": GOAL, "figures": figures})
    return 0 if all(figure["committed_over_live"] <= GOAL for figure in figures) else 1


if __name__ == "__main__":
    raise SystemExit(main())
