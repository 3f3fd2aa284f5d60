"""Virtual memory management over host memory: memfd and mmap with a GPU driver's semantics.

A reservation is a PROT_NONE range beside a sparse memfd of the same size. Mapping puts the memfd's
pages at their own offset into the range, so that neighbours merge into one kernel mapping
(``vm.max_map_count`` is 65,530 by default). Memory goes back to the kernel by punching a hole.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import itertools
import mmap
import os
import threading
from dataclasses import dataclass

import psutil

from kvcached_vmm.driver import DeviceMemory
from kvcached_vmm.errors import DriverError, OutOfMemory
from kvcached_vmm.units import KIB, ceil_to

GRANULARITY = 64 * KIB
"""Bytes of the smallest mapping: a page would do, but extents of single pages help nobody."""

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0
_FALLOC_KEEP_SIZE_PUNCH_HOLE = 0x1 | 0x2
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


@dataclass
class _Range:
    address: int
    size: int
    fd: int


@dataclass
class _Memory:
    size: int
    held: bool = True
    address: int | None = None


class HostDriver:
    """Driver of host memory.

    Args:
        capacity_bytes: physical memory to pretend there is; by default what the machine and the
            process's cgroup allow. Memory is taken from the kernel when it is first touched.
        granularity: bytes of the smallest mapping, a power of two and at least a page.
    """

    device = "host"

    def __init__(self, capacity_bytes: int | None = None, granularity: int = GRANULARITY) -> None:
        if granularity <= 0 or granularity % mmap.PAGESIZE or granularity & (granularity - 1):
            raise ValueError(f"granularity {granularity} is not a power of two of whole pages")
        self.granularity = granularity
        self._capacity = capacity_bytes
        self._ranges: dict[int, _Range] = {}
        self._memories: dict[int, _Memory] = {}
        self._mapped: dict[int, _Memory] = {}
        self._starts: list[int] = []
        self._numbers = itertools.count(1)
        self._allocated = 0
        self._lock = threading.Lock()

    @property
    def allocated_bytes(self) -> int:
        """Physical memory that handles and mappings hold."""
        return self._allocated

    def reserve(self, size: int) -> int:
        self._aligned("reserve", size)
        spare = size + self.granularity
        raw = self._mmap(None, spare, _PROT_NONE, -1, 0, fixed=False)
        address = ceil_to(raw, self.granularity)
        for start, end in ((raw, address), (address + size, raw + spare)):
            if end > start:
                _libc.munmap(start, end - start)
        fd = -1
        try:
            fd = os.memfd_create("kvcached-arena", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            _libc.munmap(address, size)
            raise DriverError("memfd", str(error)) from error
        with self._lock:
            self._ranges[address] = _Range(address, size, fd)
        return address

    def free(self, address: int, size: int) -> None:
        with self._lock:
            found = self._ranges.get(address)
            if found is None or found.size != size:
                raise DriverError("free", "no such reservation")
            if any(address <= at < address + size for at in self._mapped):
                raise DriverError("free", "memory is still mapped in the reservation")
            del self._ranges[address]
            os.close(found.fd)
            _libc.munmap(address, size)

    def create(self, size: int) -> int:
        self._aligned("create", size)
        with self._lock:
            if self.memory().free_bytes < size:
                raise OutOfMemory("create", f"no {size} bytes of host memory are free")
            handle = next(self._numbers)
            self._memories[handle] = _Memory(size)
            self._allocated += size
            return handle

    def map(self, address: int, size: int, handle: int) -> None:
        self._aligned("map", address, size)
        with self._lock:
            memory = self._memories.get(handle)
            if memory is None or memory.size != size:
                raise DriverError("map", "no handle of this size")
            if memory.address is not None or self._overlaps(address, size):
                raise DriverError("map", "the handle or the address is mapped already")
            where = self._range(address, size)
            self._mmap(address, size, _PROT_NONE, where.fd, address - where.address)
            memory.address = address
            self._mapped[address] = memory
            bisect.insort(self._starts, address)

    def allow(self, address: int, size: int) -> None:
        self._aligned("allow", address, size)
        with self._lock:
            at = address
            while at < address + size:
                if at not in self._mapped:
                    raise DriverError("allow", "a part of the range is not mapped")
                at += self._mapped[at].size
            if _libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE):
                raise DriverError("mprotect", os.strerror(ctypes.get_errno()))

    def unmap(self, address: int, size: int) -> None:
        with self._lock:
            memory = self._mapped.get(address)
            if memory is None or memory.size != size:
                raise DriverError("unmap", "not one whole mapping")
            where = self._range(address, size)
            offset = address - where.address
            if _libc.fallocate(where.fd, _FALLOC_KEEP_SIZE_PUNCH_HOLE, offset, size):
                raise DriverError("fallocate", os.strerror(ctypes.get_errno()))
            self._mmap(address, size, _PROT_NONE, -1, 0)
            memory.address = None
            del self._mapped[address]
            del self._starts[bisect.bisect_left(self._starts, address)]
            self._forget_if_unused(memory)

    def release(self, handle: int) -> None:
        with self._lock:
            memory = self._memories.pop(handle, None)
            if memory is None:
                raise DriverError("release", "no such handle")
            memory.held = False
            self._forget_if_unused(memory)

    def memory(self) -> DeviceMemory:
        if self._capacity is not None:
            return DeviceMemory(self._capacity - self._allocated, self._capacity)
        try:
            machine = psutil.virtual_memory()
        except OSError as error:
            raise DriverError("memory", str(error)) from error
        free, total = machine.available, machine.total
        with contextlib.suppress(OSError, ValueError):
            limit = int(_read("/sys/fs/cgroup/memory.max"))
            used = int(_read("/sys/fs/cgroup/memory.current"))
            free, total = min(free, limit - used), min(total, limit)
        return DeviceMemory(max(0, free), total)

    def _forget_if_unused(self, memory: _Memory) -> None:
        if not memory.held and memory.address is None:
            self._allocated -= memory.size

    def _overlaps(self, address: int, size: int) -> bool:
        after = bisect.bisect_left(self._starts, address + size)
        if not after:
            return False
        before = self._starts[after - 1]
        return before + self._mapped[before].size > address

    def _range(self, address: int, size: int) -> _Range:
        for found in self._ranges.values():
            if found.address <= address and address + size <= found.address + found.size:
                return found
        raise DriverError("map", "the address is not reserved")

    def _aligned(self, call: str, *values: int) -> None:
        if any(value <= 0 or value % self.granularity for value in values):
            raise DriverError(call, f"not a multiple of {self.granularity} bytes")

    def _mmap(
        self,
        address: int | None,
        size: int,
        protection: int,
        fd: int,
        offset: int,
        fixed: bool = True,
    ) -> int:
        flags = (
            mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        )
        where = _libc.mmap(
            address, size, protection, flags | (_MAP_FIXED if fixed else 0), fd, offset
        )
        if where is None or where == _FAILED:
            raise DriverError("mmap", os.strerror(ctypes.get_errno()))
        return int(where)


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()
