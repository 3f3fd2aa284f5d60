"""The ledger: one small mapped file per device, in which engines agree on who may use how much.

An engine joins with an ``Account``. It reserves bytes before it commits memory, so that the sum of
what is reserved and committed never exceeds the budget, whatever the interleaving. The kernel
arbitrates: a lock on the header serialises grants, a lock on each record shows that its owner is
alive, and both vanish with the process that held them. They are open-file-description locks: they
work across containers that share the folder, and a recycled process id cannot hold one.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvcached_vmm.errors import LedgerError
from kvcached_vmm.units import format_size

_MAGIC = b"KVLEDGER"
_VERSION = 1
_SLOTS = 256
_HEADER = struct.Struct("<8sIIqII")
"""Magic, version, slots, budget in bytes, whether a user set it, records ever used."""
_HEADER_SIZE = 256
_RECORD_SIZE = 256
_IDENTITY = struct.Struct("<qd64sqqd")
"""Process id, time of joining, name, minimum, maximum, weight. Process id 0: a free record."""
_IDENTITY_AT = 0
_USE = struct.Struct("<qqqqqqd")
"""Committed, reserved, fixed, live, cached, wanted bytes; waiting since (0: not waiting)."""
_USE_AT = 128
_SIZE = _HEADER_SIZE + _SLOTS * _RECORD_SIZE
_FLOCK = struct.Struct("hhqqi4x")
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class AccountView:
    """One engine in the ledger; sizes in bytes, ``waiting_since`` in seconds since the epoch."""

    name: str
    pid: int
    joined: float
    minimum_bytes: int
    maximum_bytes: int
    weight: float
    committed_bytes: int
    reserved_bytes: int
    fixed_bytes: int
    live_bytes: int
    cached_bytes: int
    wanted_bytes: int
    waiting_since: float


@dataclass(frozen=True)
class LedgerView:
    """The ledger at one moment."""

    device: str
    budget_bytes: int
    accounts: tuple[AccountView, ...]

    @property
    def used_bytes(self) -> int:
        """What is committed, reserved or fixed."""
        return sum(a.committed_bytes + a.reserved_bytes + a.fixed_bytes for a in self.accounts)


class _Identity(NamedTuple):
    pid: int
    joined: float
    name: bytes
    minimum: int
    maximum: int
    weight: float


class _Use(NamedTuple):
    committed: int
    reserved: int
    fixed: int
    live: int
    cached: int
    wanted: int
    waiting_since: float


class Ledger:
    """The ledger of one device. Open it once per account: locks belong to the open file.

    Safe to use from several threads.
    """

    def __init__(self, device: str, fd: int) -> None:
        self.device = device
        self._fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._mutex = threading.Lock()
        self._own: int | None = None
        _open_ledgers.add(self)

    @classmethod
    def open(cls, directory: str | Path, device: str) -> Ledger:
        """Open the ledger of ``device`` in ``directory``, making both if need be.

        Raises:
            LedgerError: the directory or file is not ours alone, or is not a ledger we understand.
        """
        path = private_directory(directory) / f"{device}.ledger"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise LedgerError(
                f"The ledger {path} cannot be opened: {error.strerror}; "
                "point KVCACHED_DIR at a folder of your own."
            ) from error
        try:
            _own(path, os.fstat(fd), 0o077, links=1)
            with _locked(fd):
                size = os.fstat(fd).st_size
                if size == 0:
                    os.ftruncate(fd, _SIZE)
                    os.pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, _SLOTS, 0, 0, 0), 0)
                head = os.pread(fd, _HEADER.size, 0)
                known = len(head) == _HEADER.size and _HEADER.unpack(head)[:3]
                if known != (_MAGIC, _VERSION, _SLOTS) or size not in (0, _SIZE):
                    raise LedgerError(
                        f"{path} is not a ledger that this version understands; stop the engines "
                        "that use it and delete it, or set KVCACHED_DIR to another folder."
                    )
            return cls(device, fd)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Close the file; an account that was opened on it ends, and its bytes are free."""
        with self._mutex:
            if self._fd >= 0:
                self._map.close()
                os.close(self._fd)
                self._fd = -1

    def snapshot(self) -> LedgerView:
        """Who is there and what they use. Records of dead processes are collected on the way."""
        with self._exclusive():
            self._collect()
            accounts = tuple(self._view(slot) for slot in self._used())
            return LedgerView(self.device, self._budget(), accounts)

    def join(
        self,
        name: str,
        budget_bytes: int | None,
        minimum_bytes: int = 0,
        maximum_bytes: int | None = None,
        weight: float = 1.0,
        default_budget_bytes: int = 0,
    ) -> Account:
        """Take a record for this process.

        Args:
            name: how people call the engine, at most 63 bytes.
            budget_bytes: what all engines on the device may use together; None: what is set.
            minimum_bytes: never granted to others.
            maximum_bytes: never granted to us beyond it; None: no limit but the budget.
            weight: share of the budget under pressure, against the others' weights.
            default_budget_bytes: the budget if no user sets one; fixed bytes count against it.

        Raises:
            LedgerError: full, another budget in use, or the minimum is not to be had.
        """
        maximum = _UNLIMITED if maximum_bytes is None else maximum_bytes
        if self._own is not None:
            raise ValueError("an open ledger serves one account")
        with self._exclusive():
            self._collect()
            used = list(self._used())
            budget = self._budget()
            if not used:
                budget = budget_bytes or default_budget_bytes
                self._set_budget(budget, budget_bytes is not None)
            elif budget_bytes is not None and budget_bytes != budget:
                raise LedgerError(
                    f"KVCACHED_BUDGET is {format_size(budget_bytes)}, but engines that run on "
                    f"{self.device} share {format_size(budget)}; use that value or stop them first."
                )
            promised = sum(self._identity(slot).minimum for slot in used)
            if promised + minimum_bytes > budget:
                raise LedgerError(
                    f"KVCACHED_MIN of {format_size(minimum_bytes)} cannot be guaranteed: "
                    f"{format_size(promised)} of the budget of {format_size(budget)} on "
                    f"{self.device} are promised to other engines; lower it."
                )
            slot = next((slot for slot in range(_SLOTS) if not self._identity(slot).pid), None)
            if slot is None:
                raise LedgerError(f"The ledger of {self.device} is full: {_SLOTS} engines use it.")
            if not _try_lock(self._fd, 1 + slot):
                raise LedgerError(
                    f"A record in the ledger of {self.device} is locked by a stranger."
                )
            at = self._at(slot)
            _USE.pack_into(self._map, at + _USE_AT, 0, 0, 0, 0, 0, 0, 0.0)
            label = name.encode()[:63]
            _IDENTITY.pack_into(
                self._map, at, os.getpid(), time.time(), label, minimum_bytes, maximum, weight
            )
            self._set_records(max(self._records(), slot + 1))
            self._own = slot
            return Account(self, slot)

    def _at(self, slot: int) -> int:
        return _HEADER_SIZE + slot * _RECORD_SIZE

    def _identity(self, slot: int) -> _Identity:
        return _Identity(*_IDENTITY.unpack_from(self._map, self._at(slot)))

    def _use(self, slot: int) -> _Use:
        return _Use(*_USE.unpack_from(self._map, self._at(slot) + _USE_AT))

    def _records(self) -> int:
        return int(_HEADER.unpack_from(self._map)[5])

    def _set_records(self, records: int) -> None:
        self._map[28:32] = struct.pack("<I", records)

    def _budget(self) -> int:
        return int(_HEADER.unpack_from(self._map)[3])

    def _set_budget(self, budget: int, by_user: bool) -> None:
        self._map[16:28] = struct.pack("<qI", budget, by_user)

    def _counts_fixed(self) -> bool:
        """A user's budget is for KV alone; the default one is the device, weights included."""
        return not _HEADER.unpack_from(self._map)[4]

    def _used(self) -> Iterator[int]:
        return (slot for slot in range(self._records()) if self._identity(slot).pid)

    def _collect(self) -> None:
        """Free the records whose owners are gone: nobody holds their lock."""
        for slot in self._used():
            if slot != self._own and not _is_locked(self._fd, 1 + slot):
                at = self._at(slot)
                self._map[at : at + _RECORD_SIZE] = bytes(_RECORD_SIZE)

    def _view(self, slot: int) -> AccountView:
        who, use = self._identity(slot), self._use(slot)
        return AccountView(
            name=who.name.rstrip(b"\0").decode(errors="replace"),
            pid=who.pid,
            joined=who.joined,
            minimum_bytes=who.minimum,
            maximum_bytes=who.maximum,
            weight=who.weight,
            committed_bytes=use.committed,
            reserved_bytes=use.reserved,
            fixed_bytes=use.fixed,
            live_bytes=use.live,
            cached_bytes=use.cached,
            wanted_bytes=use.wanted,
            waiting_since=use.waiting_since,
        )

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._mutex, _locked(self._fd):
            yield


class Account:
    """One engine's record. Made by ``Ledger.join``; gone when the process is, or by ``close``."""

    def __init__(self, ledger: Ledger, slot: int) -> None:
        self._ledger = ledger
        self._slot = slot
        self._at = ledger._at(slot) + _USE_AT

    @property
    def budget_bytes(self) -> int:
        """What all engines on the device may use together."""
        return self._ledger._budget()

    @property
    def limit_bytes(self) -> int:
        """What this engine may use when it is alone."""
        return min(self._ledger._identity(self._slot).maximum, self._ledger._budget())

    def reserve(self, wanted_bytes: int, unit_bytes: int = 1, free_bytes: int = _UNLIMITED) -> int:
        """Grant up to ``wanted_bytes``, in whole units, from what nobody uses or was promised.

        Args:
            wanted_bytes: how much is wanted.
            unit_bytes: grants are multiples of this.
            free_bytes: what the driver says is really free on the device.

        Returns:
            Bytes granted, maybe 0. They count as used until committed or cancelled.
        """
        ledger = self._ledger
        with ledger._exclusive():
            grant = self._grant(wanted_bytes, unit_bytes, free_bytes)
            if grant < wanted_bytes:
                ledger._collect()
                grant = self._grant(wanted_bytes, unit_bytes, free_bytes)
            use = ledger._use(self._slot)
            wanted = wanted_bytes - grant
            since = (use.waiting_since or time.time()) if wanted else 0.0
            self._write(
                use._replace(reserved=use.reserved + grant, wanted=wanted, waiting_since=since)
            )
            return grant

    def commit(self, granted_bytes: int, used_bytes: int) -> None:
        """Turn ``granted_bytes`` of grants into ``used_bytes`` of memory; give the rest back."""
        with self._ledger._exclusive():
            use = self._ledger._use(self._slot)
            assert used_bytes <= granted_bytes <= use.reserved
            self._write(
                use._replace(
                    committed=use.committed + used_bytes, reserved=use.reserved - granted_bytes
                )
            )

    def cancel(self, granted_bytes: int) -> None:
        """Give grants back unused."""
        self.commit(granted_bytes, 0)

    def release(self, used_bytes: int) -> None:
        """Memory is no longer in use."""
        with self._ledger._exclusive():
            use = self._ledger._use(self._slot)
            assert used_bytes <= use.committed
            self._write(use._replace(committed=use.committed - used_bytes))

    def report(self, live_bytes: int, cached_bytes: int) -> None:
        """Tell the others what the committed bytes are good for."""
        with self._ledger._exclusive():
            use = self._ledger._use(self._slot)
            self._write(use._replace(live=live_bytes, cached=cached_bytes))

    def fix(self, fixed_bytes: int) -> None:
        """Tell the others how much of the budget weights and activations take, for good."""
        with self._ledger._exclusive():
            self._write(self._ledger._use(self._slot)._replace(fixed=fixed_bytes))

    def view(self) -> LedgerView:
        """The whole ledger, now."""
        return self._ledger.snapshot()

    def close(self) -> None:
        """Leave the ledger."""
        ledger = self._ledger
        with ledger._exclusive():
            at = ledger._at(self._slot)
            ledger._map[at : at + _RECORD_SIZE] = bytes(_RECORD_SIZE)
        ledger.close()

    def _write(self, use: _Use) -> None:
        _USE.pack_into(self._ledger._map, self._at, *use)

    def _grant(self, wanted: int, unit: int, free: int) -> int:
        ledger = self._ledger
        others = own = reserved = 0
        counts_fixed = ledger._counts_fixed()
        for slot in ledger._used():
            use = ledger._use(slot)
            used = use.committed + use.reserved
            reserved += use.reserved
            if counts_fixed:
                others += use.fixed
            if slot == self._slot:
                own = used
            else:
                others += max(used, ledger._identity(slot).minimum)
        maximum = ledger._identity(self._slot).maximum
        room = min(ledger._budget() - others, maximum) - own
        room = min(room, wanted, free - reserved)
        return max(0, room // unit * unit)


def private_directory(directory: str | Path) -> Path:
    """``directory``, made if need be, which nobody but its owner can enter.

    Raises:
        LedgerError: it cannot be made, or it belongs to somebody else or is open to others.
    """
    path = Path(directory)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _own(path, os.stat(path, follow_symlinks=False), 0o077)
    except OSError as error:
        raise LedgerError(
            f"The folder {path} cannot be used for the ledger: {error.strerror}; "
            "point KVCACHED_DIR at a folder of your own."
        ) from error
    return path


def _own(path: Path, status: os.stat_result, forbidden: int, links: int | None = None) -> None:
    ours = status.st_uid == os.geteuid() and not status.st_mode & forbidden
    plain = stat.S_ISDIR(status.st_mode) if links is None else stat.S_ISREG(status.st_mode)
    if not (ours and plain and links in (None, status.st_nlink)):
        raise LedgerError(
            f"{path} is not private: it must be a {'plain file' if links else 'folder'} of the one "
            f"who runs the engine, with no rights for others (mode {'0600' if links else '0700'}); "
            "mend it or point KVCACHED_DIR at a folder of your own."
        )


def _flock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


_LOCK_HEADER = _flock(fcntl.F_WRLCK, 0)
_UNLOCK_HEADER = _flock(fcntl.F_UNLCK, 0)


@contextlib.contextmanager
def _locked(fd: int) -> Iterator[None]:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _LOCK_HEADER)
    try:
        yield
    finally:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _UNLOCK_HEADER)


def _try_lock(fd: int, byte: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, byte))
    except BlockingIOError:
        return False
    return True


def _is_locked(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


_open_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()


def _close_in_child() -> None:
    """A child that inherits the file would keep its parent's record alive."""
    for ledger in list(_open_ledgers):
        if ledger._fd >= 0:
            os.close(ledger._fd)
            ledger._fd = -1


os.register_at_fork(after_in_child=_close_in_child)
