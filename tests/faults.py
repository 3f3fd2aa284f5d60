"""Things that go wrong on purpose: driver calls that fail, and accesses that would."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from kvcached_vmm.driver import DeviceMemory, Driver
from kvcached_vmm.errors import DriverError, OutOfMemory

PAGE = 4096
"""Bytes of the smallest mapping in most tests."""

Fault = Callable[[str, int], bool]
"""Whether a call fails, from its kind and its number; calls are numbered from 1."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.write.argtypes = _libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_libc.write.restype = _libc.read.restype = ctypes.c_ssize_t


def nth_call(number: int, times: int = 1) -> Fault:
    """Call ``number`` fails, and those after it up to ``times`` in all."""
    return lambda _, at: number <= at < number + times


def every(*kinds: str) -> Fault:
    """All calls of ``kinds`` fail."""
    return lambda kind, _: kind in kinds


def at_random(seed: int, share: float, kinds: Iterable[str]) -> Fault:
    """A ``share`` of the calls of ``kinds`` fails."""
    chance, chosen = random.Random(seed), frozenset(kinds)
    return lambda kind, _: kind in chosen and chance.random() < share


class FaultyDriver:
    """A driver whose calls can be made to fail. A call that fails on purpose changes nothing.

    Keeps its own account of mappings and handles, and refuses overlapping mappings as a GPU does.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.device = driver.device
        self.granularity = driver.granularity
        self.calls: list[str] = []
        """The kinds of calls since the last ``fail``."""
        self.failed: list[str] = []
        """The kinds of calls that failed on purpose since the last ``fail``."""
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        """Size of the mapping at an address."""
        self.handles: set[int] = set()
        self._faults: tuple[Fault, ...] = ()

    def fail(self, *faults: Fault) -> None:
        """From now on fail the calls that one of ``faults`` names; count calls from 1 again."""
        self.calls, self.failed, self._faults = [], [], faults

    def heal(self) -> None:
        """Fail no more."""
        self.fail()

    def reserve(self, size: int) -> int:
        self._maybe_fail("reserve")
        address = self.driver.reserve(size)
        self.reserved[address] = size
        return address

    def free(self, address: int, size: int) -> None:
        self._maybe_fail("free")
        self.driver.free(address, size)
        del self.reserved[address]

    def create(self, size: int) -> int:
        self._maybe_fail("create")
        handle = self.driver.create(size)
        self.handles.add(handle)
        return handle

    def map(self, address: int, size: int, handle: int) -> None:
        self._maybe_fail("map")
        for start, length in self.mapped.items():
            assert address + size <= start or start + length <= address, "memory mapped twice"
        self.driver.map(address, size, handle)
        self.mapped[address] = size

    def allow(self, address: int, size: int) -> None:
        self._maybe_fail("allow")
        self.driver.allow(address, size)

    def unmap(self, address: int, size: int) -> None:
        self._maybe_fail("unmap")
        self.driver.unmap(address, size)
        del self.mapped[address]

    def release(self, handle: int) -> None:
        self._maybe_fail("release")
        self.driver.release(handle)
        self.handles.remove(handle)

    def memory(self) -> DeviceMemory:
        return self.driver.memory()

    def _maybe_fail(self, kind: str) -> None:
        self.calls.append(kind)
        if any(fault(kind, len(self.calls)) for fault in self._faults):
            self.failed.append(kind)
            if kind == "create":
                raise OutOfMemory(kind, "a fault made on purpose")
            raise DriverError(kind, "a fault made on purpose")


class AccessProbe:
    """Tells whether an access to an address would fault, without making it.

    The kernel copies a byte from there into a pipe and the same byte back: EFAULT says no. Contents
    do not change.
    """

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe2(os.O_CLOEXEC)

    def __call__(self, address: int) -> bool:
        """Whether the byte at ``address`` can be read and written; either both or neither can."""
        if _libc.write(self._write_end, address, 1) == 1:
            assert _libc.read(self._read_end, address, 1) == 1, "memory that can only be read"
            return True
        return False

    def pages(self, address: int, size: int, step: int) -> set[int]:
        """Those multiples of ``step`` in ``range(size)`` at which an access works."""
        return {offset for offset in range(0, size, step) if self(address + offset)}

    def close(self) -> None:
        os.close(self._read_end)
        os.close(self._write_end)


def fill(address: int, size: int, value: int) -> None:
    """Set ``size`` bytes to ``value``."""
    ctypes.memset(address, value, size)


def content(address: int, size: int) -> bytes:
    """The bytes at ``address``."""
    return ctypes.string_at(address, size)


def open_files() -> int:
    """How many files this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))
