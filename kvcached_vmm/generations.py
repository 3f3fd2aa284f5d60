"""A ledger's file that was deleted while engines use it, and another one under its name.

Engines of the old file and of the new one do not see each other, so together they could take more
than the budget. Who begins a new file looks for processes that still use an old one, as far as
``/proc`` shows them; who uses an old file notices when there is a new one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from kvcached_vmm.errors import LedgerError


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
