"""What driver calls cost the work that runs beside them: kernels first, then calls, on one GPU.

    integration/gpu/run.sh beside

A step is a run of large copies and small kernels, launched ahead as an engine launches its own.
While it runs, extents are committed or released by the same process, or by another one. The figure
is how much longer the device takes for such steps than for those beside which nothing happens, step
by step in turns. And how much longer a prompt's extents take to commit while another process gives
memory back, as neighbours do that rest. Writes beside.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from integration.gpu.bursts import spread_ms
from integration.gpu.floor import open_driver
from integration.gpu.record import Json, MemorySampler, facts, write_json
from integration.gpu.vmm_cost import MIB, make_arena

SIZES = (2 * MIB, 16 * MIB, 32 * MIB, 64 * MIB)
EACH_BYTES = 128 * MIB
"""Committed beside a step: KV of a prompt of 1,024 tokens of Llama-3.1-8B."""
STEP_MS = 10.0
GIVEN_BYTES = 1 << 30
"""Given back elsewhere while a prompt's extents are committed here."""
KERNELS = 200
BLOCKS, BLOCK_BYTES, PART_BYTES = 4096, 2 * MIB, MIB // 16
"""8 GiB of blocks of that model, and one layer's part of a block."""


class Step:
    """Work of about STEP_MS, a part of it a chain of small kernels."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._big = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
        self._other = torch.empty_like(self._big)
        self._small = torch.zeros(1 << 14, device="cuda")
        self._copies = 1
        for _ in range(3):
            self.time(lambda: None)
        while self.time(lambda: None) < STEP_MS:
            self._copies += 1

    def time(self, beside: Callable[[], None]) -> float:
        """Milliseconds of one step on the device, with ``beside`` called once it is launched."""
        torch = self._torch
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self._copies):
            self._other.copy_(self._big)
        for _ in range(KERNELS):
            self._small.add_(1.0)
        for _ in range(self._copies):
            self._big.copy_(self._other)
        end.record()
        beside()
        end.synchronize()
        return float(begin.elapsed_time(end))


def cost(step: Step, beside: Callable[[], None], after: Callable[[], None], rounds: int) -> Json:
    """Of ``rounds`` steps with and without: medians and means in ms."""
    without, during = [], []
    for _ in range(rounds):
        without.append(step.time(lambda: None))
        during.append(step.time(beside))
        after()
    return {
        "without_ms": round(statistics.median(without), 4),
        "beside_ms": round(statistics.median(during), 4),
        "added_ms": round(statistics.median(during) - statistics.median(without), 4),
        "added_mean_ms": round(statistics.fmean(during) - statistics.fmean(without), 4),
    }


class Extents:
    """An arena in extents of one size; all of it comes or goes at once."""

    def __init__(self, size: int, total: int = EACH_BYTES, cpu: bool = False) -> None:
        self._arena = make_arena(open_driver(cpu), size, total)
        self._all = range(total // size)
        self.calls_s: list[float] = []

    def commit(self) -> None:
        self._timed(self._arena.commit)

    def release(self) -> None:
        self._timed(self._arena.decommit)

    def _timed(self, action: Callable[[range], object]) -> None:
        began = time.perf_counter()
        action(self._all)
        self.calls_s.append(time.perf_counter() - began)


class Elsewhere:
    """The same in another process; what is begun here ends there while the caller goes on."""

    def __init__(self, size: int, total: int = EACH_BYTES, cpu: bool = False) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._child = context.Process(target=_obey, args=(theirs, size, total, cpu), daemon=True)
        self._child.start()
        self._pipe.recv()

    def begin(self, word: str) -> None:
        """``commit`` or ``release``."""
        self._pipe.send(word)

    def end(self) -> None:
        """What was begun is done."""
        self._pipe.recv()

    def undo(self, word: str) -> None:
        """What was begun is done, and so is ``word`` then."""
        self.end()
        self.begin(word)
        self.end()

    def close(self) -> None:
        self._pipe.send("")
        self._child.join(10.0)


def _obey(pipe: Connection, size: int, total: int, cpu: bool) -> None:
    extents = Extents(size, total, cpu)
    pipe.send("ready")
    while word := pipe.recv():
        getattr(extents, word)()
        pipe.send("done")


def contended(size: int, rounds: int, cpu: bool = False) -> Json:
    """How long EACH_BYTES take to commit here, alone and while GIVEN_BYTES go elsewhere."""
    here, there = Extents(size, EACH_BYTES, cpu), Elsewhere(size, GIVEN_BYTES, cpu)
    for number in range(2 * rounds):
        there.begin("commit")
        there.end()
        if number % 2:
            there.begin("release")
        here.commit()
        if not number % 2:
            there.begin("release")
        there.end()
        here.release()
    there.close()
    alone, beside = here.calls_s[0::4], here.calls_s[2::4]
    return {"alone_ms": spread_ms(alone), "while_others_release_ms": spread_ms(beside)}


def measure(rounds: int) -> Json:
    step, found = Step(), {}
    for size in SIZES:
        extents = Extents(size)
        told: Json = {"extents": EACH_BYTES // size}
        told["commit"] = cost(step, extents.commit, extents.release, rounds)
        told["commit"]["call_ms"] = round(1e3 * statistics.median(extents.calls_s[::2]), 4)
        extents.commit()
        extents.calls_s.clear()
        told["release"] = cost(step, extents.release, extents.commit, rounds)
        told["release"]["call_ms"] = round(1e3 * statistics.median(extents.calls_s[::2]), 4)
        other = Elsewhere(size)
        for word, back in (("commit", "release"), ("release", "commit")):
            begin, undo = functools.partial(other.begin, word), functools.partial(other.undo, back)
            told[f"{word}_elsewhere"] = cost(step, begin, undo, rounds)
            begin()
            other.end()
        other.close()
        told["contended"] = contended(size, rounds)
        found[f"{size // MIB} MiB"] = told
        print(f"{size // MIB} MiB", json.dumps(told), flush=True)
    return found


def layout(rounds: int) -> Json:
    """Reading blocks in random order, as attention does: a layer's part of each block lies in one
    tensor per layer, as stock, or a block's layers lie one after the other, in plain memory and in
    extents. Milliseconds for BLOCKS parts of PART_BYTES."""
    import torch

    from kvcached_vmm.tensors import arena_tensor

    device = torch.device("cuda", torch.cuda.current_device())
    order = torch.randperm(BLOCKS, device=device)
    out = torch.empty(BLOCKS, PART_BYTES // 8, dtype=torch.int64, device=device)

    def read_ms(blocks: torch.Tensor) -> float:
        times = []
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            torch.index_select(blocks, 0, order, out=out)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return round(statistics.median(times), 4)

    def parts(whole: torch.Tensor) -> torch.Tensor:
        return whole.view(torch.int64).view(BLOCKS, -1)[:, : PART_BYTES // 8]

    found = {"stock": read_ms(torch.zeros_like(out))}
    found["blocks in plain memory"] = read_ms(
        parts(torch.zeros(BLOCKS * BLOCK_BYTES, dtype=torch.int8, device=device))
    )
    torch.cuda.empty_cache()
    for size in SIZES[1:]:
        arena = make_arena(open_driver(False), size, BLOCKS * BLOCK_BYTES)
        arena.commit(range(BLOCKS * BLOCK_BYTES // size))
        whole = arena_tensor(arena, arena.size_bytes, device)
        found[f"blocks in extents of {size // MIB} MiB"] = read_ms(parts(whole))
        del whole
        arena.close()
    print("layout", json.dumps(found), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="beside.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = {**facts(MemorySampler()), "each_bytes": EACH_BYTES}
    found |= {"figures": measure(options.rounds), "read_ms": layout(options.rounds)}
    write_json(options.out / "beside.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
