"""An arena: one range of virtual addresses whose extents come and go."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from kvcached_vmm.driver import Driver
from kvcached_vmm.errors import DriverError
from kvcached_vmm.extents import ExtentMap, Footprint, Piece

logger = logging.getLogger(__name__)


class Arena:
    """Reserves the addresses of ``extents`` and backs extents with memory on demand.

    Addresses never change. All methods may be called from any thread; none waits for the device,
    so the caller makes sure that nobody touches an extent before it releases it.
    """

    def __init__(self, driver: Driver, extents: ExtentMap) -> None:
        self.driver = driver
        self.extents = extents
        self.size_bytes = extents.size_bytes
        self._footprint = Footprint(extents)
        self._stray: dict[int, int] = {}
        self._unreleased: list[tuple[Any, int]] = []
        self._spare: list[tuple[Any, int]] = []
        """Handles that were not released and are mapped nowhere: good for another piece."""
        self._level = logging.WARNING
        self._lock = threading.RLock()
        self.base = driver.reserve(self.size_bytes)

    @property
    def committed_bytes(self) -> int:
        """Bytes that the driver holds for this arena, counting what it refused to take back."""
        return self._footprint.bytes + self.kept_bytes

    @property
    def needed_bytes(self) -> int:
        """Bytes of the extents that have memory, and of nothing else."""
        return self._footprint.bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes that the driver refused to take back so far."""
        with self._lock:
            held = sum(size for _, size in (*self._unreleased, *self._spare))
            return sum(self._stray.values()) + held

    @property
    def committed(self) -> frozenset[int]:
        """The extents that have memory."""
        with self._lock:
            return frozenset(self._footprint)

    def __contains__(self, extent: int) -> bool:
        return extent in self._footprint

    def missing(self, blocks: Iterable[int]) -> set[int]:
        """The extents that ``blocks`` lie in and that have no memory."""
        per_extent = self.extents.blocks_per_extent
        return self._footprint.lacks({block // per_extent for block in blocks})

    def commit(self, extents: Iterable[int]) -> int:
        """Back ``extents`` with memory; those that have it already are left alone.

        Returns:
            Bytes that were added.

        Raises:
            OutOfMemory: there is not enough memory; nothing has changed, the call may be repeated.
            DriverError: another call failed; nothing has changed.
        """
        with self._lock:
            self._sweep()
            added = [extent for extent in dict.fromkeys(extents) if extent not in self._footprint]
            wanted: list[Piece] = []
            for extent in added:
                wanted += self._footprint.add(extent)
            placed: list[Piece] = []
            try:
                for piece in wanted:
                    if self._stray.pop(piece.offset, None) is None:
                        self._place(piece)
                    placed.append(piece)
                for run in _runs(placed):
                    self.driver.allow(self.base + run.offset, run.size)
            except DriverError:
                for piece in reversed(placed):
                    self._take_away(piece)
                for extent in reversed(added):
                    self._footprint.remove(extent)
                raise
            return sum(piece.size for piece in placed)

    def decommit(self, extents: Iterable[int]) -> int:
        """Take the memory of ``extents`` away.

        A piece that the driver refuses to unmap is set aside and tried again by the next call of
        ``commit`` or ``decommit``; its extent counts as released, its bytes stay counted, and if
        the extent is committed again the piece is simply used again.

        Returns:
            Bytes that the driver has back.
        """
        with self._lock:
            before = self.committed_bytes
            self._sweep()
            for extent in extents:
                if extent in self._footprint:
                    for piece in self._footprint.remove(extent):
                        self._take_away(piece)
            return before - self.committed_bytes

    def retry(self) -> int:
        """Try again to give back what the driver refused to take; returns the bytes that it still
        keeps."""
        with self._lock:
            self._sweep()
            return self.kept_bytes

    def close(self) -> None:
        """Release everything, the addresses too."""
        self.decommit(self.committed)
        with self._lock:
            if self.kept_bytes:
                raise DriverError(
                    "close", f"{self.committed_bytes} bytes cannot be unmapped or released"
                )
            self.driver.free(self.base, self.size_bytes)

    def check(self) -> None:
        """Assert that the bytes counted are those that committed extents need."""
        with self._lock:
            needed = Footprint(self.extents)
            pieces = [piece for extent in self._footprint for piece in needed.add(extent)]
            assert needed.bytes == self._footprint.bytes == sum(piece.size for piece in pieces)
            assert not self._stray.keys() & {piece.offset for piece in pieces}

    def _place(self, piece: Piece) -> None:
        handle = self._handle(piece.size)
        try:
            self.driver.map(self.base + piece.offset, piece.size, handle)
        except DriverError:
            self._release(handle, piece.size, self._spare)
            raise
        if not self._release(handle, piece.size, self._unreleased):
            if self._take_away(piece):
                self._spare.append(self._unreleased.pop())
            raise DriverError("release", "the driver kept a handle; it will be released later")

    def _handle(self, size: int) -> Any:
        """Memory for a piece. What could not be released is used first: a driver that refuses for
        long would else hold more with every attempt."""
        for index, (handle, its_size) in enumerate(self._spare):
            if its_size == size:
                del self._spare[index]
                return handle
        return self.driver.create(size)

    def _release(self, handle: Any, size: int, kept: list[tuple[Any, int]]) -> bool:
        try:
            self.driver.release(handle)
        except DriverError as error:
            message = "kvcached: a handle could not be released, will try again: %s"
            logger.log(self._level, message, error)
            kept.append((handle, size))
            return False
        return True

    def _take_away(self, piece: Piece) -> bool:
        try:
            self.driver.unmap(self.base + piece.offset, piece.size)
        except DriverError as error:
            message = "kvcached: an extent could not be unmapped, will try again: %s"
            logger.log(self._level, message, error)
            self._stray[piece.offset] = piece.size
            return False
        return True

    def _sweep(self) -> None:
        if not (self._stray or self._unreleased or self._spare):
            return
        self._level = logging.DEBUG
        for kept in (self._unreleased, self._spare):
            held, kept[:] = kept[:], []
            for handle, size in held:
                self._release(handle, size, kept)
        strays, self._stray = self._stray, {}
        for piece in strays.items():
            self._take_away(Piece(*piece))
        self._level = logging.WARNING


def _runs(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Merge pieces that follow each other, so that one driver call covers them."""
    start = end = -1
    for offset, size in sorted(pieces):
        if offset != end:
            if end > start:
                yield Piece(start, end - start)
            start = offset
        end = offset + size
    if end > start:
        yield Piece(start, end - start)
