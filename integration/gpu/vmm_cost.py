"""What our own core costs on this GPU: committing and releasing 1 GiB, per extent size.

    python3 -P -m integration.gpu.vmm_cost --out FOLDER

Runs on the host driver where ``--host`` is given, to try the program without a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from integration.gpu.record import GIB, Json, MemorySampler, facts, write_json
from kvcached_vmm.arena import Arena
from kvcached_vmm.driver import Driver
from kvcached_vmm.extents import ExtentMap, Region

MIB = 2**20
GOAL_MS = 3.0
"""Committing 1 GiB should take no longer (median, 32 MiB extents)."""
PROMPT_BYTES = 128 * MIB
"""1,024 tokens of Llama-3.1-8B."""
RESTS_S = (0.0, 0.1, 2.0)


def make_arena(driver: Driver, extent_bytes: int, total_bytes: int) -> Arena:
    """An arena of 2 MiB blocks: Llama-3.1-8B with 16-token blocks, all layers together."""
    stride = 2 * MIB
    blocks = ExtentMap(
        total_bytes // stride, [Region(0, stride)], driver.granularity, extent_bytes // stride
    )
    return Arena(driver, blocks)


def spread(times_s: list[float]) -> Json:
    """Median, 99th percentile (nearest rank) and largest, in milliseconds."""
    ordered = sorted(times_s)
    rank = max(0, -(-99 * len(ordered) // 100) - 1)
    return {
        "median_ms": round(statistics.median(ordered) * 1e3, 4),
        "p99_ms": round(ordered[rank] * 1e3, 4),
        "max_ms": round(ordered[-1] * 1e3, 4),
        "repetitions": len(ordered),
    }


def cycle(arena: Arena, repetitions: int, one_by_one: bool) -> Json:
    """Commit and release the whole arena, in one call or in one call per extent."""
    everything = range(arena.extents.num_extents)
    commits, releases, singles = [], [], []
    for _ in range(repetitions):
        begin = time.perf_counter()
        if one_by_one:
            for extent in everything:
                before = time.perf_counter()
                arena.commit([extent])
                singles.append(time.perf_counter() - before)
        else:
            arena.commit(everything)
        committed = time.perf_counter()
        arena.decommit(everything)
        commits.append(committed - begin)
        releases.append(time.perf_counter() - committed)
    found = {"commit": spread(commits), "release": spread(releases)}
    if singles:
        found["commit_one_extent"] = spread(singles)
    return found


def beside_busy_thread(work: Callable[[], Json]) -> Json:
    """Do ``work`` while another Python thread computes without pause."""
    stopped = threading.Event()

    def spin() -> None:
        value = 0
        while not stopped.is_set():
            for _ in range(1000):
                value = (value * 31 + 7) % 1_000_003

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        return work()
    finally:
        stopped.set()
        thread.join()


def beside_nvml(work: Callable[[], Json]) -> Json:
    """Do ``work`` while another process asks NVML for memory and clocks, 20 times a second."""
    command = [sys.executable, "-P", "-m", "integration.gpu.machine"]
    asking = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    try:
        assert asking.stdout is not None
        asking.stdout.readline()
        return work()
    finally:
        asking.communicate()


def after_rest(arena: Arena, repetitions: int) -> Json:
    """Commit what a prompt of 1,024 tokens needs, after a rest: what a first request waits for."""
    extents = range(-(-PROMPT_BYTES // arena.extents.largest_bytes))
    found: Json = {}
    for rest_s in RESTS_S:
        times = []
        for _ in range(repetitions):
            arena.decommit(extents)
            time.sleep(rest_s)
            begin = time.perf_counter()
            arena.commit(extents)
            times.append(time.perf_counter() - begin)
        found[f"{rest_s:g}s"] = spread(times)
    arena.decommit(extents)
    return found


def contents(driver: Driver, device_name: str) -> Json:
    """Fresh memory is zero; what is written through a view is read back; neighbours stay."""
    import torch

    from kvcached_vmm.tensors import arena_tensor

    device = torch.device(device_name)
    extent_bytes, count = 32 * MIB, 16
    arena = make_arena(driver, extent_bytes, count * extent_bytes)
    arena.commit([0])
    view = arena_tensor(arena, arena.size_bytes, device)
    nonzero, wrong, looked_at = 0, 0, 0
    for round_number in range(4):
        arena.commit(range(count))
        for extent in range(1 if round_number else 0, count):
            part = view[extent * extent_bytes : (extent + 1) * extent_bytes]
            nonzero += int(torch.count_nonzero(part))
            looked_at += 1
            part.fill_(extent + 1 + round_number)
        for extent in range(1, count):
            part = view[extent * extent_bytes : (extent + 1) * extent_bytes]
            wrong += int(torch.count_nonzero(part != extent + 1 + round_number))
        if device.type == "cuda":
            torch.cuda.synchronize()
        arena.decommit(range(1, count))
        arena.check()
    kept = int(torch.count_nonzero(view[:extent_bytes] != 1))
    committed = arena.committed_bytes
    del view
    arena.close()
    return {
        "fresh_extents_looked_at": looked_at,
        "fresh_bytes_not_zero": nonzero,
        "bytes_read_back_wrong": wrong,
        "bytes_changed_in_the_extent_that_stayed": kept,
        "committed_after_release_bytes": committed,
        "ok": not (nonzero or wrong or kept) and committed == extent_bytes,
    }


def attempt(work: Callable[[], Json]) -> Json:
    try:
        return work()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=50)
    parser.add_argument("--rests", type=int, default=8, help="of each length")
    parser.add_argument("--total-mib", type=int, default=1024)
    parser.add_argument("--host", action="store_true", help="the host driver: no GPU needed")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sampler = MemorySampler()
    driver: Driver
    if options.host:
        from kvcached_vmm.host_driver import HostDriver

        driver, device = HostDriver(granularity=2 * MIB), "cpu"
    else:
        import torch

        from kvcached_vmm.cuda_driver import CudaDriver

        torch.zeros(1, device="cuda")
        driver, device = CudaDriver(0), "cuda"
    total = options.total_mib * MIB
    result: Json = {**facts(sampler), "total_gib": total / GIB, "switch_s": sys.getswitchinterval()}
    result |= {"driver": type(driver).__name__, "pid": os.getpid(), "extents": {}}

    def save() -> None:
        write_json(options.out / "vmm_cost.json", result)

    result["contents"] = attempt(lambda: contents(driver, device))
    save()
    for mib in (8, 16, 32, 64):
        arena = make_arena(driver, mib * MIB, total)
        n = options.repetitions
        cycle(arena, 3, one_by_one=False)
        found = {"one_call": attempt(lambda: cycle(arena, n, one_by_one=False))}  # noqa: B023
        found["a_call_per_extent"] = attempt(lambda: cycle(arena, n, one_by_one=True))  # noqa: B023
        found["one_call_beside_busy_thread"] = attempt(
            lambda: beside_busy_thread(lambda: cycle(arena, min(n, 3), one_by_one=False))  # noqa: B023
        )
        found["a_call_per_extent_beside_nvml"] = attempt(
            lambda: beside_nvml(lambda: cycle(arena, n, one_by_one=True))  # noqa: B023
        )
        arena.close()
        result["extents"][f"{mib}MiB"] = found
        save()
    arena = make_arena(driver, 32 * MIB, total)
    result["after_rest"] = {
        "quiet": attempt(lambda: after_rest(arena, options.rests)),
        "beside_nvml": attempt(lambda: beside_nvml(lambda: after_rest(arena, options.rests))),
    }
    arena.close()
    median = result["extents"]["32MiB"]["one_call"].get("commit", {}).get("median_ms")
    result["goal"] = {"commit_ms_at_most": GOAL_MS, "commit_ms": median}
    result["goal"]["met"] = median is not None and median * GIB / total <= GOAL_MS
    save()
    for size, found in result["extents"].items():
        for how, figures in found.items():
            print(f"{size:>6} {how:28} {figures}")
    for how, figures in result["after_rest"].items():
        print(f"a prompt's extents after a rest, {how}: {figures}")
    print("contents", result["contents"])
    return 0 if result["contents"].get("ok") else 1


if __name__ == "__main__":
    sys.exit(main())
