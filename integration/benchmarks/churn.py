"""Committed against live bytes in a churn of requests with staggered lengths. Needs no GPU.

    python -m integration.benchmarks.churn [--json FILE]

Simulates an engine without a prefix cache over the real pool and a real extent map: prompts take
their blocks at once, decoding takes one block every 16 tokens, and neighbours in an extent end at
different times. Time is simulated; extents and policy are those that such an engine has by default.

Loads that last come in bursts and lulls, with log-normal lengths: committed over live blocks, both
summed over all steps. A load that ends is that of ``integration/gpu/footprint.py``, whose answers
differ by two orders of magnitude: the same from its last request to its last answer. Beside each
figure is what it would be if requests shared extents of the size that engines with a cache have.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from integration.gpu import footprint, traffic
from integration.gpu.record import MemorySampler, facts, write_json
from kvcached_vmm.extents import (
    EXTENT_BYTES,
    OWN_EXTENT_BYTES,
    ExtentMap,
    Region,
    blocks_per_extent,
)
from kvcached_vmm.fence import StepClock
from kvcached_vmm.policy import Policy
from kvcached_vmm.pool import ElasticPool
from kvcached_vmm.units import MIB

BLOCK_TOKENS = 16
BLOCK_BYTES = 2 * MIB
"""Llama-3.1-8B in bf16: 16 tokens of 32 layers, 8 KV heads of 128."""
GOAL = 1.15
FOOTPRINT_STEP_S = 0.022
"""Of that load on an H200, with stock launches (``footprint-h200.json``)."""


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


class Moment(NamedTuple):
    """Blocks at the end of a step."""

    committed: int
    live: int


class Setting(NamedTuple):
    """How an engine's pool is made."""

    extent_bytes: int
    policy: Policy


OWN = Setting(OWN_EXTENT_BYTES, Policy(own_extents=True))
SHARED = Setting(EXTENT_BYTES, Policy())
RESERVE_BYTES = 512 * MIB
"""What an engine with a large limit keeps ready (``KVCACHED_RESERVE``), which counts after a load;
loads that last are told without."""


def simulate(
    loads: Iterable[list[_Request]], step_seconds: float, concurrency: int, setting: Setting
) -> Iterator[Moment]:
    """Run the requests that arrive at each step, as many beside each other as may be."""
    count = 65536
    region = Region(0, BLOCK_BYTES)
    span = blocks_per_extent([region], 2 * MIB, setting.extent_bytes)
    clock = StepClock()
    seconds = 0.0
    pool = ElasticPool(
        [Block(index) for index in range(count)],
        ExtentMap(count, [region], 2 * MIB, span),
        Plenty(),
        clock,
        lambda blocks: None,
        setting.policy,
        now=lambda: seconds,
    )
    running: list[_Request] = []
    waiting: deque[_Request] = deque()
    for new in loads:
        seconds += step_seconds
        waiting += new
        for request in running:
            request.tokens += 1
            if request.tokens > len(request.blocks) * BLOCK_TOKENS:
                pool.prepare(1, held=request.blocks)
                request.blocks += pool.take(1)
        while waiting and len(running) < concurrency:
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
        yield Moment(pool.committed_bytes // BLOCK_BYTES, pool.live_blocks)


def ratio(moments: Iterable[Moment]) -> float:
    """Committed over live blocks, both summed."""
    committed = live = 0
    for moment in moments:
        committed += moment.committed
        live += moment.live
    return committed / live


def churn(scenario: Scenario, setting: Setting = OWN) -> float:
    """Committed over live blocks of a load that lasts."""
    return ratio(simulate(arrivals(scenario), scenario.step_seconds, scenario.concurrency, setting))


def footprint_load(seed: int = 0) -> list[traffic.Ask]:
    """The requests of ``integration/gpu/footprint.py``."""
    return footprint.load(footprint.parse(["--out", ".", "--model", "."]), seed)


def after_load(seed: int = 0, setting: Setting = OWN) -> float:
    """Committed over live blocks from the last request of a load to its last answer."""
    asks = footprint_load(seed)
    setting = setting._replace(policy=replace(setting.policy, reserve_bytes=RESERVE_BYTES))
    moments = simulate(arriving(asks), FOOTPRINT_STEP_S, len(asks), setting)
    last = int(asks[-1].at_s / FOOTPRINT_STEP_S)
    tail = itertools.takewhile(lambda moment: moment.live, itertools.islice(moments, last, None))
    return ratio(tail)


def arriving(asks: Sequence[traffic.Ask]) -> Iterator[list[_Request]]:
    """The requests that arrive at each step, and for ever after none."""
    waiting = deque(asks)
    for step in itertools.count():
        new = []
        while waiting and waiting[0].at_s <= step * FOOTPRINT_STEP_S:
            ask = waiting.popleft()
            new.append(_Request(ask.prompt_tokens + ask.output_tokens, ask.prompt_tokens))
        yield new


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures = []

    def tell(name: str, told: object, figure: Callable[[Setting], float]) -> None:
        own, shared = (round(figure(setting), 4) for setting in (OWN, SHARED))
        found = {"scenario": told, "committed_over_live": own, "where_requests_share": shared}
        figures.append(found)
        print(f"{name:24s} committed/live {own:.3f}, shared {shared:.3f} (goal: at most {GOAL})")

    for scenario in SCENARIOS:
        tell(scenario.name, asdict(scenario), lambda setting, of=scenario: churn(of, setting))
    for seed in range(3):
        name = f"after a load, seed {seed}"
        tell(name, {"name": name}, lambda setting, seed=seed: after_load(seed, setting))
    if options.json:
        write_json(options.json, {**facts(MemorySampler()), "goal": GOAL, "figures": figures})
    return 0 if all(figure["committed_over_live"] <= GOAL for figure in figures) else 1


if __name__ == "__main__":
    raise SystemExit(main())
