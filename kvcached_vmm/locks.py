"""Files that only their owner can use, and locks that the kernel drops when their holder dies.

The locks are open-file-description locks on single bytes of a file: they belong to an open file,
not to a process, work across containers that share the folder, and outlive no holder.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from pathlib import Path

from kvcached_vmm.errors import LedgerError

_FLOCK = struct.Struct("hhqqi4x")
_ADVICE = "point KVCACHED_DIR at a folder of your own."


def private_directory(directory: str | Path) -> Path:
    """``directory``, made if need be, which nobody but its owner can enter.

    Raises:
        LedgerError: it cannot be made, or it belongs to somebody else or is open to others.
    """
    path = Path(directory)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.stat(path, follow_symlinks=False)
    except OSError as error:
        raise LedgerError(
            f"The folder {path} cannot be used for the ledger: {error.strerror}; {_ADVICE}"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or _open_to_others(status):
        raise LedgerError(
            f"The folder {path} is not private: it must be a folder, not a link, of the user who "
            f"runs the engine, with mode 0700; mend it or {_ADVICE}"
        )
    return path


def open_private(path: Path) -> int:
    """A descriptor of the file at ``path``, made empty if need be, which only its owner can use.

    Raises:
        LedgerError: it cannot be opened, or it is a link or open to others.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        raise LedgerError(
            f"The file {path} cannot be opened: {error.strerror}; {_ADVICE}"
        ) from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or _open_to_others(status) or status.st_nlink != 1:
        os.close(fd)
        raise LedgerError(
            f"The file {path} is not private: it must be a plain file of the user who runs the "
            f"engine, with mode 0600 and no other name; mend it or {_ADVICE}"
        )
    return fd


def try_lock(fd: int, byte: int) -> bool:
    """Take the lock on a byte unless another open file holds it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _record(fcntl.F_WRLCK, byte))
    except BlockingIOError:
        return False
    return True


def unlock(fd: int, byte: int) -> None:
    """Drop the lock on a byte."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _record(fcntl.F_UNLCK, byte))


def is_locked(fd: int, byte: int) -> bool:
    """Whether another open file holds the lock on a byte."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _record(fcntl.F_WRLCK, byte))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


class FileMutex:
    """The lock on byte 0, to be held in a ``with``. Made for the hot path."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW, _LOCK_0)

    def __exit__(self, *_: object) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _UNLOCK_0)


def _open_to_others(status: os.stat_result) -> bool:
    return status.st_uid != os.geteuid() or bool(status.st_mode & 0o077)


def _record(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


_LOCK_0 = _record(fcntl.F_WRLCK, 0)
_UNLOCK_0 = _record(fcntl.F_UNLCK, 0)
