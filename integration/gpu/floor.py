"""What the driver needs by itself to move memory from one process to another, no ledger between.

A process of its own maps memory; asked to, it unmaps and releases it, and this one creates, maps
and gets access. That is the least that any hand-over can take.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from multiprocessing.connection import Connection

from integration.gpu.bursts import spread_ms
from integration.gpu.record import Json
from integration.gpu.vmm_cost import MIB, make_arena
from kvcached_vmm.driver import Driver


def open_driver(cpu: bool) -> Driver:
    """The first GPU's, or the host's with the granularity of a GPU."""
    if cpu:
        from kvcached_vmm.host_driver import HostDriver

        return HostDriver(granularity=2 * MIB)
    from kvcached_vmm.cuda_driver import CudaDriver

    return CudaDriver(0)


class Holder:
    """Another process that holds memory until told to give it back."""

    def __init__(self, cpu: bool, extent_bytes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, cpu, extent_bytes)
        self._process = context.Process(target=_hold, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def hold(self, size_bytes: int) -> None:
        self._pipe.send(size_bytes)
        self._pipe.recv()

    def give(self) -> float:
        """Seconds that unmapping and releasing took, as the holder measured it."""
        self._pipe.send(0)
        return float(self._pipe.recv())

    def close(self) -> None:
        self._pipe.close()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()


def _hold(pipe: Connection, cpu: bool, extent_bytes: int) -> None:
    driver = open_driver(cpu)
    arena = None
    try:
        while True:
            size_bytes = pipe.recv()
            if size_bytes:
                arena = make_arena(driver, extent_bytes, size_bytes)
                arena.commit(range(arena.extents.num_extents))
                if cpu:  # there memory comes with the first write
                    ctypes.memset(arena.base, 1, size_bytes)
                pipe.send(0.0)
            elif arena is not None:
                began = time.perf_counter()
                arena.decommit(arena.committed)
                pipe.send(time.perf_counter() - began)
                arena.close()
    except EOFError:
        return


def measure(cpu: bool, size_bytes: int, extent_bytes: int, rounds: int) -> Json:
    """Release there, commit here, and both with the word between the processes."""
    driver = open_driver(cpu)
    holder = Holder(cpu, extent_bytes)
    arena = make_arena(driver, extent_bytes, size_bytes)
    released, committed, both = [], [], []
    try:
        for number in range(rounds + 1):
            holder.hold(size_bytes)
            began = time.perf_counter()
            seconds = holder.give()
            before = time.perf_counter()
            arena.commit(range(arena.extents.num_extents))
            ended = time.perf_counter()
            arena.decommit(arena.committed)
            if number:  # the first one is for warming up
                released.append(seconds)
                committed.append(ended - before)
                both.append(ended - began)
    finally:
        arena.close()
        holder.close()
    return {
        "release_there_ms": spread_ms(released),
        "commit_here_ms": spread_ms(committed),
        "hand_over_ms": spread_ms(both),
        "rounds": rounds,
    }
