"""Places of a soak, in which one engine runs after another, and what an engine holds over time."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median

import psutil

from integration.engine import STOP_TIMEOUT_S, ArenaFiles, Server, family, wait_until

START_TIMEOUT_S = 600.0
"""An engine that starts beside busy ones on two cores takes minutes at worst."""

WARM_SAMPLES = 1800
"""Seconds; before that processes touch pages for the first time, each at its own pace: two workers
of one age under one load differ by some 60 MiB after 20 minutes."""

FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
"""For engines whose growth is judged. oneDNN keeps 1,024 kernels, one for each shape that it has
met: a worker of stock vLLM gains 600 MiB by that in ten minutes of random shapes, and nothing with
16. So what grows is a leak."""

KILLS = ("all of it killed", "worker killed", "terminated")
STOPS = ("all of it stopped", "worker stopped")


class Life:
    """One server from its start on: what its processes hold, once a second."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.began = time.monotonic()
        self.samples: list[dict[str, float]] = []

    def look(self) -> None:
        """Note anonymous memory of the largest process of each kind, and how many descriptors,
        threads and processes all have. Pages of files and of KV caches are not anonymous."""
        total: Counter[str] = Counter()
        for process in family(self.server.process.pid):
            with contextlib.suppress(psutil.Error, OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                if "RssAnon:" not in status:  # it has ended, and nobody has asked how
                    continue
                kib = int(status.partition("RssAnon:")[2].split()[0])
                name = f"memory_mib {process.name().partition('_')[0]}"
                total[name] = max(total[name], kib / 1024)
                total["descriptors"] += process.num_fds()
                total["threads"] += process.num_threads()
                total["processes"] += 1
        self.samples.append(dict(total))

    @property
    def minutes(self) -> float:
        return len(self.samples) / 60

    @property
    def is_warm(self) -> bool:
        """Whether growth of memory tells anything."""
        return len(self.samples) > WARM_SAMPLES

    def first_and_last(self) -> dict[str, tuple[float, float]]:
        """Medians of the second quarter and of the last one, half of the life apart."""
        samples = self.samples[:-1] or self.samples  # the last one may be of an engine that ends
        part = max(1, len(samples) // 4)
        return {
            name: (
                median(each.get(name, 0) for each in samples[part : 2 * part] or samples),
                median(each.get(name, 0) for each in samples[-part:]),
            )
            for name in (samples[-1] if samples else ())
        }

    def grown(self, spare: Mapping[str, float]) -> list[str]:
        """What holds more than it did: a twentieth and 16 MiB of memory, or ``spare`` of others."""
        found = []
        for name, (first, last) in self.first_and_last().items():
            if name.startswith("memory_mib"):
                if not self.is_warm:
                    continue
                bound = 1.05 * first + 16
            else:
                bound = first + spare.get(name, 0)
            if last > bound:
                found.append(f"{name}: {first:.1f} -> {last:.1f} in {self.minutes / 2:.0f} min")
        return found


class Place:
    """Where one engine runs after another, under one name.

    Args:
        name: what tools call the engine.
        start: starts a server, given a number for its log.
    """

    def __init__(self, name: str, start: Callable[[int], Server]) -> None:
        self.name = name
        self._start = start
        self.falls = 0
        """How often the engine here was ended: a request that saw this number change is excused."""
        self.disturbed_until = 0.0
        """Monotonic seconds; a request that began before that may have waited for a stop."""
        self.up = threading.Event()
        self.running = 0
        """Requests that have not been answered."""
        self.lives = [Life(start(0))]
        self.files: ArenaFiles | None = None

    @property
    def server(self) -> Server:
        return self.lives[-1].server

    def wait_ready(self) -> None:
        self.server.wait_ready(START_TIMEOUT_S)
        self.files = ArenaFiles(self.server.process.pid)
        self.up.set()

    def kv_bytes(self) -> int:
        """What the kernel has in KV caches here; 0 while there is no engine that serves."""
        files = self.files
        try:
            return files.size_bytes() if files is not None else 0
        except OSError:
            return 0

    def end(self, how: str) -> tuple[set[int], bool]:
        """End the engine as ``how`` of KILLS says. Returns the processes that it had, and whether
        all of them ended by themselves."""
        self.falls += 1
        self.up.clear()
        self.files = None
        server = self.server
        processes = family(server.process.pid)
        if how == "terminated":
            server.process.terminate()
        elif how == "worker killed":
            os.kill(random.choice(server.arena_pids()), signal.SIGKILL)
        else:
            os.killpg(server.process.pid, signal.SIGKILL)
        alone = wait_until(lambda: all(map(has_ended, processes)), 2 * STOP_TIMEOUT_S, 0.002)
        return {process.pid for process in processes}, alone

    def begin(self) -> None:
        """Start another engine where one has ended."""
        self.server.stop()
        self.lives.append(Life(self._start(len(self.lives))))
        self.wait_ready()

    def hold_up(self, how: str, seconds: float) -> None:
        """Stop the engine, or one of its workers, for some time."""
        self.disturbed_until = time.monotonic() + seconds + STOP_TIMEOUT_S
        pids = {process.pid for process in family(self.server.process.pid)}
        if how == "worker stopped":
            pids = {random.choice(self.server.arena_pids())}
        try:
            _send(signal.SIGSTOP, pids)
            time.sleep(seconds)
        finally:
            _send(signal.SIGCONT, pids)


def _send(number: signal.Signals, pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def has_ended(process: psutil.Process) -> bool:
    """Whether no thread of it is left: its first may have ended while others still hold files."""
    try:
        is_zombie = bool(process.status() == psutil.STATUS_ZOMBIE)
        return is_zombie and len(os.listdir(f"/proc/{process.pid}/task")) == 1
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return True
