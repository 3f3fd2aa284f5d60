"""A memory cgroup of our own, in which the kernel kills processes that run out of memory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A group below the one that this process is in, in either version of cgroups.

    Raises:
        OSError: none can be made here: not root, or memory is not handed down to groups.
    """

    def __init__(self, name: str) -> None:
        self._parent, limit, killed = _own_group()
        self._folder = self._parent / name
        self._folder.mkdir()
        self._limit, self._killed = self._folder / limit, self._folder / killed
        try:
            self._limit.stat()  # version 2 has it only where memory is handed down
        except OSError:
            self._folder.rmdir()
            raise

    def add(self, pids: Iterable[int]) -> None:
        """What the processes take from now on is counted here; what they have is not."""
        for pid in pids:
            (self._folder / "cgroup.procs").write_text(str(pid))

    def allow(self, size_bytes: int) -> None:
        """The kernel kills rather than give more than that to all in the group together."""
        self._limit.write_text(str(size_bytes))

    def kills(self) -> int:
        """How many processes the kernel has killed here."""
        words = self._killed.read_text().split()
        return int(words[words.index("oom_kill") + 1])

    def remove(self) -> None:
        """Move who is left out, and remove the group. What it had counted is counted above."""
        for _ in range(100):
            for pid in (self._folder / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):
                    (self._parent / "cgroup.procs").write_text(pid)
            try:
                return self._folder.rmdir()
            except OSError:
                time.sleep(0.1)
        raise TimeoutError(f"{self._folder} is still in use")


@contextlib.contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    group = MemoryGroup(f"kvcached-test-{os.getpid()}")
    try:
        yield group
    finally:
        group.remove()


def _own_group() -> tuple[Path, str, str]:
    """Our own group, and what its files for the limit and for kills are called."""
    groups = dict[str, str]()
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path.lstrip("/"))
    if "memory" in groups:
        return _ROOT / "memory" / groups["memory"], "memory.limit_in_bytes", "memory.oom_control"
    if "" in groups:
        return _ROOT / groups[""], "memory.max", "memory.events"
    raise OSError("this process is in no memory cgroup")
