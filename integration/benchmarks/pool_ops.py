"""What taking and freeing blocks costs: our block pool against vLLM's own, on the same traces.

    python -m integration.benchmarks.pool_ops [--json FILE] [--repetitions N] [--no-scheduler]

Every extent is resident from the start and none decays, so no trace makes the pool grow. The two
pools take turns. Every step is timed by itself and its shortest time over all repetitions counts:
what another process does to a step in one repetition, it does not do in all of them. The figure is
the sum of these times for our pool over that for vLLM's; "with step hooks" adds ``settle`` and
``tick``, which an engine calls once a step. Simulated time passes at ``STEP_SECONDS`` a step.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from integration.benchmarks.churn import BLOCK_BYTES, Plenty
from integration.benchmarks.traces import BLOCK_TOKENS, LOADS, Trace, recorded, simulated
from integration.gpu.record import MemorySampler, facts, write_json
from kvcached_plugins.vllm.pool import ElasticBlockPool, ElasticFreeQueue
from kvcached_vmm.extents import (
    EXTENT_BYTES,
    OWN_EXTENT_BYTES,
    ExtentMap,
    Region,
    blocks_per_extent,
)
from kvcached_vmm.fence import StepClock
from kvcached_vmm.policy import Policy
from kvcached_vmm.units import MIB

POOL_BLOCKS = 32768
"""64 GiB of Llama-3.1-8B."""
STEP_SECONDS = 0.02
MEASURED_STEPS = 1000
GOAL = 1.2
FOREVER = 1e9


class Costs(NamedTuple):
    """Nanoseconds for each measured step."""

    takes: list[int]
    frees: list[int]
    hooks: list[int]

    def least(self, other: Costs) -> Costs:
        """The shorter time of every step."""
        return Costs(*(list(map(min, a, b)) for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Figure:
    """Microseconds per step, and our time over stock time."""

    trace: str
    prefix_caching: bool
    steps: int
    takes_per_step: float
    blocks_per_step: float
    stock_take_us: float
    stock_free_us: float
    take_us: float
    free_us: float
    hooks_us: float
    ratio: float
    ratio_with_hooks: float


class _HashedRequest:
    """As much of a request as a block pool looks at when it caches full blocks."""

    def __init__(self, block_hashes: list[bytes]) -> None:
        self.block_hashes = block_hashes


def stock_pool(num_blocks: int, prefix_caching: bool) -> tuple[BlockPool, Callable[[], None]]:
    return BlockPool(num_blocks, prefix_caching, BLOCK_TOKENS), lambda: None


def elastic_pool(num_blocks: int, prefix_caching: bool) -> tuple[BlockPool, Callable[[], None]]:
    """Our pool, bound and fully grown, and the calls that an engine makes once a step."""
    region = Region(0, BLOCK_BYTES)
    size = EXTENT_BYTES if prefix_caching else OWN_EXTENT_BYTES
    span = blocks_per_extent([region], 2 * MIB, size)
    clock = StepClock()
    seconds = 0.0
    pool = ElasticBlockPool(num_blocks, prefix_caching, BLOCK_TOKENS)
    elastic = ElasticFreeQueue(
        pool.blocks,
        ExtentMap(num_blocks, [region], 2 * MIB, span),
        Plenty(),
        clock,
        pool.evict,
        Policy(decay_seconds=FOREVER, cache_seconds=FOREVER, own_extents=not prefix_caching),
        now=lambda: seconds,
    )
    elastic.prepare(num_blocks - 1)
    elastic.put(elastic.take(num_blocks - 1))
    elastic.tick()
    pool.bind(elastic, 0)

    def step_hooks() -> None:
        nonlocal seconds
        seconds += STEP_SECONDS
        elastic.settle()
        released = elastic.tick()
        assert not released
        clock.finish(clock.launch())

    return pool, step_hooks


def replay(trace: Trace, pool: BlockPool, hooks: Callable[[], None]) -> Costs:
    """Play ``trace`` in the order of an engine: takes, hooks, then the frees of what has ended.

    Where the pool caches, all blocks of a request but the last have a hash when they come back.
    """
    costs = Costs([], [], [])
    taken: list[list[KVCacheBlock]] = []
    hashes = (number.to_bytes(32, "little") for number in count())
    take, free, now = pool.get_new_blocks, pool.free_blocks, time.perf_counter_ns
    for index, step in enumerate(trace.steps):
        begin = now()
        for size in step.takes:
            taken.append(take(size))
        took = now()
        hooks()
        hooked = now()
        requests = [[block for part in free for block in taken[part]] for free in step.frees]
        if pool.enable_caching:
            _hash(pool, requests, hashes)
        ordered = [reversed(blocks) for blocks in requests]
        freeing = now()
        for blocks in ordered:
            free(blocks)
        freed = now()
        if index >= trace.warm_steps:
            costs.takes.append(took - begin)
            costs.hooks.append(hooked - took)
            costs.frees.append(freed - freeing)
    return costs


def compare(trace: Trace, prefix_caching: bool, repetitions: int, num_blocks: int) -> Figure:
    """Replay ``trace`` on both pools in turn."""
    assert trace.blocks < num_blocks, "the trace asks for more blocks than the pool has"
    best: dict[str, Costs] = {}
    for _ in range(repetitions):
        for name, make in (("stock", stock_pool), ("ours", elastic_pool)):
            pool, hooks = make(num_blocks, prefix_caching)
            gc.collect()
            gc.disable()
            try:
                costs = replay(trace, pool, hooks)
            finally:
                gc.enable()
            best[name] = best[name].least(costs) if name in best else costs
    return _figure(trace, prefix_caching, best["stock"], best["ours"])


def _figure(trace: Trace, prefix_caching: bool, stock: Costs, ours: Costs) -> Figure:
    measured = trace.steps[trace.warm_steps :]
    steps = len(measured)
    stock_ns = sum(stock.takes) + sum(stock.frees)
    ours_ns = sum(ours.takes) + sum(ours.frees)

    def per_step_us(nanoseconds: list[int]) -> float:
        return round(sum(nanoseconds) / steps / 1000, 2)

    return Figure(
        trace=trace.name,
        prefix_caching=prefix_caching,
        steps=steps,
        takes_per_step=round(sum(len(step.takes) for step in measured) / steps, 2),
        blocks_per_step=round(sum(sum(step.takes) for step in measured) / steps, 1),
        stock_take_us=per_step_us(stock.takes),
        stock_free_us=per_step_us(stock.frees),
        take_us=per_step_us(ours.takes),
        free_us=per_step_us(ours.frees),
        hooks_us=per_step_us(ours.hooks),
        ratio=round(ours_ns / stock_ns, 3),
        ratio_with_hooks=round((ours_ns + sum(ours.hooks)) / stock_ns, 3),
    )


def _hash(pool: BlockPool, requests: list[list[KVCacheBlock]], hashes: Iterator[bytes]) -> None:
    for blocks in requests:
        full = len(blocks) - 1
        request = _HashedRequest([next(hashes) for _ in range(full)])
        pool.cache_full_blocks(request, blocks, 0, full, BLOCK_TOKENS, 0)


def _traces(scheduler: bool) -> Iterator[Trace]:
    for load in LOADS:
        yield simulated(load, POOL_BLOCKS, MEASURED_STEPS)
    if scheduler:
        from kvcached_plugins.demo.models import write_model

        with tempfile.TemporaryDirectory() as folder:
            yield recorded(write_model(Path(folder)), 1000, MEASURED_STEPS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--no-scheduler", action="store_true", help="leave out the recorded trace")
    options = parser.parse_args()
    figures = []
    for trace in _traces(not options.no_scheduler):
        for prefix_caching in (False, True):
            figure = compare(trace, prefix_caching, options.repetitions, POOL_BLOCKS)
            figures.append(figure)
            print(
                f"{figure.trace:28s} caching {'on ' if prefix_caching else 'off'}"
                f" stock {figure.stock_take_us:6.1f} + {figure.stock_free_us:6.1f} us/step"
                f" ours {figure.take_us:6.1f} + {figure.free_us:6.1f}"
                f" (hooks {figure.hooks_us:5.1f}) ratio {figure.ratio:.2f},"
                f" with step hooks {figure.ratio_with_hooks:.2f} (goal: at most {GOAL})",
                flush=True,
            )
    if options.json:
        setup = {
            "repetitions": options.repetitions,
            "pool_blocks": POOL_BLOCKS,
            "step_seconds": STEP_SECONDS,
        }
        report = {"facts": facts(MemorySampler()), "setup": setup, "goal": GOAL}
        write_json(options.json, {**report, "figures": [asdict(figure) for figure in figures]})
    return 0 if all(figure.ratio <= GOAL for figure in figures) else 1


if __name__ == "__main__":
    raise SystemExit(main())
