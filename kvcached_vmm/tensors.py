"""A torch view over an arena. The only module of the core that imports torch."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from kvcached_vmm.arena import Arena
from kvcached_vmm.driver import Driver
from kvcached_vmm.extents import ExtentMap
from kvcached_vmm.fence import Mark, Passed
from kvcached_vmm.host_driver import HostDriver
from kvcached_vmm.poison import Fill, Poison, PoisonedArena


def device_driver(device: torch.device) -> Driver:
    """The driver of a torch device."""
    if device.type == "cuda":
        from kvcached_vmm.cuda_driver import CudaDriver

        index = device.index if device.index is not None else torch.cuda.current_device()
        return CudaDriver(index)
    return HostDriver()


def arena_tensor(arena: Arena, size_bytes: int, device: torch.device) -> torch.Tensor:
    """The first ``size_bytes`` of ``arena`` as a one-dimensional int8 tensor on ``device``.

    The extent at offset 0 must be committed: CUDA refuses to look at an address with nothing behind
    it. The arena must outlive the tensor. Nothing is read or written.
    """
    if size_bytes > arena.size_bytes:
        raise ValueError(f"the arena has {arena.size_bytes} bytes, not {size_bytes}")
    if device.type == "cpu":
        buffer = (ctypes.c_byte * size_bytes).from_address(arena.base)
        return torch.frombuffer(buffer, dtype=torch.int8)
    return torch.as_tensor(_Exported(arena.base, size_bytes), device=device)


def make_arena(
    driver: Driver, extents: ExtentMap, device: torch.device, poison: Poison | None
) -> Arena:
    """An arena on ``device``; one that fills what comes and goes if there is a ``poison``."""
    if poison is None:
        return Arena(driver, extents)
    return PoisonedArena(driver, extents, poison, filler(device))


def filler(device: torch.device) -> Fill:
    """How memory of ``device`` is filled: in the order of the stream that is current now, which is
    waited for."""
    if device.type == "cpu":
        return _fill_host
    stream = torch.cuda.current_stream(device)

    def fill(address: int, size: int, byte: int) -> None:
        with torch.cuda.stream(stream):
            torch.as_tensor(_Exported(address, size), device=device).view(torch.uint8).fill_(byte)
        stream.synchronize()

    return fill


def _fill_host(address: int, size: int, byte: int) -> None:
    ctypes.memset(address, byte, size)


class _Exported:
    """Memory in the form in which CUDA libraries hand it to each other."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size_bytes,),
            "typestr": "|i1",
            "data": (address, False),
            "version": 3,
        }


class StreamMarks:
    """Marks on a stream, by default on the one that an engine launches its steps on.

    A stream that has done all its work gets no event: to record one is work as well, for which the
    device would turn from the kernels of another process to an engine that rests.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream or torch.cuda.current_stream(device)

    def __call__(self) -> Mark:
        if self._stream.query():
            return Passed()
        event = torch.cuda.Event()
        event.record(self._stream)
        mark: Mark = event
        return mark
