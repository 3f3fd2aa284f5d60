"""What mapping memory costs here, call by call, and what follows for extents and for offloading.

Times are in seconds of wall-clock time, rates in bytes per second.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from kvcached_vmm.driver import Driver
from kvcached_vmm.errors import DriverError, KVCachedError
from kvcached_vmm.units import GIB, KIB, MIB, floor_to, format_size

CUDA_EXTENTS = tuple(2 * MIB << power for power in range(7))
HOST_EXTENTS = tuple(64 * KIB << power for power in range(0, 9, 2))
CALLS = ("create", "map", "allow", "unmap", "release")
REPETITIONS = 2
"""The better one counts: other work on the machine only adds."""
ENOUGH = 1.5
"""An extent is large enough if 1 GiB of it costs at most so many times the cheapest."""

PROMPT_TOKENS = 1000
TOKEN_BYTES = 131072
"""KV cache of one token of Llama-3.1-8B: 32 layers, 8 heads of 128 elements, two of 16 bit each."""
TOKEN_FLOP = 2 * 8.0e9
PREFILL_EFFICIENCY = 0.5
"""Part of the rate of a large matrix product that prefill reaches: an assumption."""
SLOW_LINK = 8e9


class BenchError(KVCachedError):
    """Nothing can be measured here."""


@dataclass(frozen=True)
class Costs:
    """What extents of one size cost.

    Attributes:
        extent_bytes: their size.
        extents: how many were committed and released.
        reserve_s: reserving addresses for all of them.
        calls_s: median time of each driver call, by its name.
        commit_s: committing all of them: create, map, allow.
        touch_s: writing to all of it once; 0 where that costs nothing that matters.
        return_s: releasing all of them: unmap, release.
    """

    extent_bytes: int
    extents: int
    reserve_s: float
    calls_s: dict[str, float]
    commit_s: float
    touch_s: float
    return_s: float

    @property
    def size_bytes(self) -> int:
        return self.extents * self.extent_bytes

    @property
    def both_s_per_gib(self) -> float:
        """Committing and releasing 1 GiB."""
        return (self.commit_s + self.return_s) * GIB / self.size_bytes


@dataclass(frozen=True)
class Link:
    """How fast pinned host memory and a GPU copy to each other, and the GPU multiplies."""

    to_device: float
    to_host: float
    flop_per_s: float


def measure(driver: Driver, extents_bytes: Sequence[int], size_bytes: int) -> list[Costs]:
    """The costs of each size of extents that fits in a quarter of the free memory.

    Raises:
        BenchError: none does.
        DriverError: a call failed; everything has been given back.
    """
    size_bytes = min(size_bytes, driver.memory().free_bytes // 4)
    fitting = [
        each for each in extents_bytes if each <= size_bytes and not each % driver.granularity
    ]
    if not fitting:
        raise BenchError(
            f"Too little memory is free to measure anything: {format_size(size_bytes)} may be "
            f"used, a quarter of what is free, and an extent has "
            f"{format_size(max(min(extents_bytes), driver.granularity))}."
        )
    measure_size(driver, fitting[-1], fitting[-1])  # the first calls of all take longer
    return [
        min(
            (measure_size(driver, each, floor_to(size_bytes, each)) for _ in range(REPETITIONS)),
            key=lambda costs: costs.both_s_per_gib,
        )
        for each in fitting
    ]


def measure_size(driver: Driver, extent_bytes: int, size_bytes: int) -> Costs:
    """The costs of committing and releasing ``size_bytes`` in extents of ``extent_bytes``."""
    now = time.perf_counter
    times: dict[str, list[float]] = {call: [] for call in CALLS}

    def timed(call: str, function: Callable[..., Any], *arguments: Any) -> Any:
        begin = now()
        answer = function(*arguments)
        times[call].append(now() - begin)
        return answer

    begin = now()
    base = driver.reserve(size_bytes)
    reserve_s = now() - begin
    with contextlib.ExitStack() as undo:
        undo.callback(driver.free, base, size_bytes)
        begin = now()
        mapped: list[tuple[int, Any]] = []
        undo.callback(_give_back, driver, mapped, extent_bytes)
        for address in range(base, base + size_bytes, extent_bytes):
            handle = timed("create", driver.create, extent_bytes)
            try:
                timed("map", driver.map, address, extent_bytes, handle)
            except DriverError:
                driver.release(handle)
                raise
            mapped.append((address, handle))
            timed("allow", driver.allow, address, extent_bytes)
        commit_s = now() - begin
        begin = now()
        if driver.device == "host":
            ctypes.memset(base, 1, size_bytes)
        touch_s = now() - begin
        begin = now()
        while mapped:
            address, handle = mapped[-1]
            timed("unmap", driver.unmap, address, extent_bytes)
            mapped.pop()
            timed("release", driver.release, handle)
        return_s = now() - begin
    return Costs(
        extent_bytes,
        size_bytes // extent_bytes,
        reserve_s,
        {call: median(found) for call, found in times.items()},
        commit_s,
        touch_s,
        return_s,
    )


def _give_back(driver: Driver, mapped: list[tuple[int, Any]], extent_bytes: int) -> None:
    """Release what is still mapped after a call that failed, as far as the driver lets us."""
    for address, handle in mapped:
        with contextlib.suppress(DriverError):
            driver.unmap(address, extent_bytes)
        with contextlib.suppress(DriverError):
            driver.release(handle)
    mapped.clear()


def best_extent(costs: Sequence[Costs]) -> int:
    """The smallest size that costs little more than the cheapest: smaller extents leave less
    memory in gaps and come free sooner."""
    cheapest = min(each.both_s_per_gib for each in costs)
    return min(each.extent_bytes for each in costs if each.both_s_per_gib <= ENOUGH * cheapest)


def measure_link(ordinal: int, size_bytes: int = 256 * MIB, repetitions: int = 5) -> Link | None:
    """The link of a GPU; None where torch cannot use it."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available() or ordinal >= torch.cuda.device_count():
        return None
    gpu = torch.device("cuda", ordinal)
    host = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size_bytes, dtype=torch.uint8, device=gpu)
    matrix = torch.randn(8192, 8192, device=gpu, dtype=torch.bfloat16)

    def fastest(work: Callable[[], object]) -> float:
        times = []
        for _ in range(repetitions + 1):
            torch.cuda.synchronize(gpu)
            begin = time.perf_counter()
            work()
            torch.cuda.synchronize(gpu)
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    return Link(
        size_bytes / fastest(lambda: there.copy_(host, non_blocking=True)),
        size_bytes / fastest(lambda: host.copy_(there, non_blocking=True)),
        2 * 8192**3 / fastest(lambda: matrix @ matrix),
    )


def offload_advice(link: Link) -> list[str]:
    """Whether KV in host memory would pay, in sentences."""
    size = PROMPT_TOKENS * TOKEN_BYTES
    back_s = size / link.to_device
    again_s = PROMPT_TOKENS * TOKEN_FLOP / (link.flop_per_s * PREFILL_EFFICIENCY)
    said = [
        f"Fetching the KV cache of a {PROMPT_TOKENS:,}-token prompt of an 8B model "
        f"({format_size(size)}) from host memory takes {back_s * 1e3:.1f} ms; computing it again "
        f"takes about {again_s * 1e3:.0f} ms (8B parameters at half of the measured "
        f"{link.flop_per_s / 1e12:.0f} TFLOP/s: an estimate, long prompts take more)."
    ]
    if back_s < again_s / 2:
        said.append("Offloading to host memory would pay where prompts come again.")
    elif back_s < again_s:
        said.append("Offloading to host memory would gain little, and nothing for small models.")
    else:
        said.append("Offloading to host memory would not pay: computing again is faster.")
    slowest = min(link.to_device, link.to_host)
    if slowest < SLOW_LINK:
        said.append(
            f"The link is slow ({slowest / 1e9:.1f} GB/s; PCIe 4.0 x16 reaches about 25): see "
            "`nvidia-smi -q -d PCIE` for its generation and width, and whether a virtual machine "
            "or container stands between."
        )
    return said
