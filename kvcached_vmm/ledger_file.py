"""The file of a ledger: whether it is one of ours, whole, and still the one that others find.

Engines of a file that was deleted and of a new one under its name do not see each other, so
together they could take more than the budget. Who begins a new file looks for processes that use
an old one, as far as ``/proc`` shows them; who uses an old file notices when there is a new one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvcached_vmm import records
from kvcached_vmm.errors import LedgerError
from kvcached_vmm.locks import is_locked


def is_replaced(path: Path, fd: int) -> bool:
    """Whether another file than ``fd`` is at ``path`` now. No file at all is not another one."""
    try:
        there, ours = os.stat(path), os.fstat(fd)
    except OSError:
        return False
    return (there.st_ino, there.st_dev) != (ours.st_ino, ours.st_dev)


def replaced(path: Path) -> LedgerError:
    return LedgerError(
        f"The ledger {path} was replaced by another file, whose engines do not know of this one; "
        "restart this engine to use it."
    )


def refuse_if_deleted(path: Path, is_in_use: Callable[[int], bool]) -> None:
    """Refuse to begin a new ledger at ``path`` while engines use an old one.

    Args:
        is_in_use: whether engines that live are in the ledger that a descriptor is of.

    Raises:
        LedgerError: there are such engines.
    """
    name = f"{path.resolve()} (deleted)"
    pids = sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    users = [pid for pid in pids if pid != os.getpid() and _uses(pid, name, is_in_use)]
    if users:
        raise LedgerError(
            f"The ledger {path} was deleted while engines use it, and what they hold is not known "
            f"here: stop them first (process {', '.join(map(str, users))}), or set KVCACHED_DIR to "
            "another folder."
        )


def _uses(pid: int, name: str, is_in_use: Callable[[int], bool]) -> bool:
    """Whether a process has the deleted file ``name`` open, and engines are in it."""
    with contextlib.suppress(OSError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            link = f"/proc/{pid}/fd/{entry}"
            with contextlib.suppress(OSError):
                if os.readlink(link) == name:
                    fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
                    try:
                        if is_in_use(fd):
                            return True
                    finally:
                        os.close(fd)
    return False


def is_in_use(fd: int) -> bool:
    """Whether engines that live are in the ledger that ``fd`` is of."""
    return any(is_locked(fd, 1 + slot) for slot in range(records.SLOTS))


def is_whole(fd: int) -> bool:
    """Whether a file is a ledger of ours that has all its memory: a write into a page that a full
    disk cannot give would end the process."""
    status = os.fstat(fd)
    if status.st_size != records.FILE_BYTES or status.st_blocks * 512 < records.FILE_BYTES:
        return False
    head = records.HEADER.unpack(os.pread(fd, records.HEADER.size, 0))
    return _is_ours(head, status.st_size)


def _is_ours(head: tuple[Any, ...], size: int) -> bool:
    magic, version, slots, budget, _, used = head
    known = (records.MAGIC, records.VERSION, records.SLOTS, records.FILE_BYTES)
    return (magic, version, slots, size) == known and used <= records.SLOTS and budget >= 0


def make_or_check(path: Path, fd: int) -> None:
    size = os.fstat(fd).st_size
    head = os.pread(fd, records.HEADER.size, 0).ljust(records.HEADER.size, b"\0")
    if size in (0, records.FILE_BYTES) and not any(head):
        os.posix_fallocate(fd, 0, records.FILE_BYTES)
        first = records.HEADER.pack(records.MAGIC, records.VERSION, records.SLOTS, 0, 0, 0)
        os.pwrite(fd, first, 0)
        return
    if _is_ours(records.HEADER.unpack(head), size):
        os.posix_fallocate(fd, 0, records.FILE_BYTES)
    else:
        raise LedgerError(
            f"{path} is not a ledger that this version understands; stop the engines that use it "
            "and delete it, or set KVCACHED_DIR to another folder."
        )
