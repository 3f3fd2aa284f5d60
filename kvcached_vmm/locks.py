"""Files that only their owner can use, and locks that the kernel drops when their holder dies.

The locks are open-file-description locks on single bytes of a file: they belong to an open file,
not to a process, work across containers that share the folder, and outlive no holder.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

from kvcached_vmm.errors import LedgerBusy, LedgerError

BRIEF_SECONDS = 0.02
"""How long an engine waits for a writer that makes no progress. One needs some 10 us, unless it
loses its core."""

PATIENT_SECONDS = 5.0
"""The same for somebody who starts an engine or changes limits."""

UNLUCKY = 5
"""Waiting ends after so many times the patience, though one after the other gets the lock."""

SPIN_SECONDS = 0.0001
PAUSE_SECONDS = 0.005
"""Who waits tries again and again for a moment: a writer that runs needs no longer. One that has
lost its core gets it back the sooner the less often others try: with 8 writers on 2 cores, pauses
of 0.5 ms made 1 in 100 wait for 3 ms, and pauses of 5 ms for 0.1 ms."""

_LARGEST_COUNT = (1 << 64) - 1
"""What is there may be anything: the count goes on from 0 then."""

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


class Writing:
    """The lock on byte 0: alone among writers, in a ``with``. Made for the hot path.

    Readers notice by the count, which is odd meanwhile and is mended if a dead writer left it so;
    it is written as one word, for ``pack_into`` would make it 0 first. ``epoch`` changes when
    anybody else has written in between.

    The kernel drops the lock of a holder that dies, and keeps that of one that is stopped. Nobody
    waits for that one for long, and nobody twice: it is the same as long as the count is.
    """

    def __init__(self, path: Path, fd: int, count: memoryview) -> None:
        self.fd = fd
        self.epoch = 0
        self._path = path
        self._count = count
        self._changes = -1
        self._patience_s = BRIEF_SECONDS
        self._given_up_at = -1

    @property
    def is_held_up(self) -> bool:
        """Whether somebody was waited for in vain and has done nothing since."""
        return bool(self._count[0] == self._given_up_at)

    @property
    def news(self) -> int:
        """As long as it stays the same, nobody else has written; -1 if somebody has since our last
        time. Reads without the lock."""
        return self.epoch if self._count[0] == self._changes else -1

    def patiently(self) -> Writing:
        """For a ``with`` whose lock may be waited for as long as a person would."""
        self._patience_s = PATIENT_SECONDS
        return self

    def __enter__(self) -> None:
        if self.fd < 0:
            raise LedgerError(f"The ledger {self._path} is closed.")
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _LOCK_0)
        except BlockingIOError:
            self._wait()
        changes = self._count[0]
        if changes != self._changes:
            self.epoch += 1
        self._changes = ((changes | 1) + 1) & _LARGEST_COUNT
        self._count[0] = changes | 1

    def __exit__(self, *_: object) -> None:
        self._count[0] = self._changes
        self._patience_s = BRIEF_SECONDS
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _UNLOCK_0)

    def _wait(self) -> None:
        patience_s, self._patience_s = self._patience_s, BRIEF_SECONDS
        if (patience_s == BRIEF_SECONDS and self.is_held_up) or not wait_for_lock(
            self.fd, patience_s, lambda: int(self._count[0])
        ):
            self._given_up_at = self._count[0]
            raise busy(self._path)
        self._given_up_at = -1


def wait_for_lock(fd: int, patience_s: float, progress: Callable[[], int] = int) -> bool:
    """Take the lock on byte 0; False if ``progress`` stays the same for ``patience_s``."""
    begun = seen_at = time.monotonic()
    seen = progress()
    while not try_lock(fd, 0):
        now = time.monotonic()
        if seen != progress():
            seen, seen_at = progress(), now
        if now - seen_at > patience_s or now - begun > UNLUCKY * patience_s:
            return False
        if now - begun < SPIN_SECONDS:
            os.sched_yield()
        else:
            time.sleep(PAUSE_SECONDS)
    return True


def busy(path: Path) -> LedgerBusy:
    return LedgerBusy(
        f"Another process does not let go of the ledger {path}; let it go on if it is stopped "
        "(kill -CONT), or end it."
    )


def _open_to_others(status: os.stat_result) -> bool:
    return status.st_uid != os.geteuid() or bool(status.st_mode & 0o077)


def _record(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


_LOCK_0 = _record(fcntl.F_WRLCK, 0)
_UNLOCK_0 = _record(fcntl.F_UNLCK, 0)
