"""The seam between an arena and memory: seven calls that a GPU driver or a kernel answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class DeviceMemory:
    """Physical memory of a device, in bytes, as its driver reports it for all processes."""

    free_bytes: int
    total_bytes: int


class Driver(Protocol):
    """Virtual memory management of one device.

    Addresses and sizes are bytes and multiples of ``granularity``. Physical memory stays allocated
    while a handle or a mapping refers to it. Every call raises ``DriverError``; ``create`` raises
    its child ``OutOfMemory``. A call that raises has changed nothing. Safe to call from any thread.
    """

    @property
    def device(self) -> str:
        """What the memory belongs to: a GPU's UUID, or ``host``. Names the ledger."""
        ...

    @property
    def granularity(self) -> int:
        """Bytes of the smallest mapping."""
        ...

    def reserve(self, size: int) -> int:
        """Reserve ``size`` bytes of addresses with nothing behind them; return the first."""
        ...

    def free(self, address: int, size: int) -> None:
        """Give a reservation back. Nothing may be mapped in it."""
        ...

    def create(self, size: int) -> Any:
        """Allocate physical memory; return its handle, of whatever type the driver likes."""
        ...

    def map(self, address: int, size: int, handle: Any) -> None:
        """Put the memory of ``handle`` at ``address``; not yet accessible (see ``allow``)."""
        ...

    def allow(self, address: int, size: int) -> None:
        """Make a run of adjacent mappings readable and writable."""
        ...

    def unmap(self, address: int, size: int) -> None:
        """Take a mapping away. An access to it afterwards is a fault. Waits for nothing."""
        ...

    def release(self, handle: Any) -> None:
        """Drop a handle; its memory lives on while it is mapped."""
        ...

    def memory(self) -> DeviceMemory:
        """What the device has, now."""
        ...
