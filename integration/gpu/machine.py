"""What the machine did meanwhile: the GPU's clock and the processors, once a second.

Machines are shared: without this, a second in which everything was slow looks like an arm's fault.
No oftener, for NVML and the driver's memory calls may wait for each other, and only an elastic
engine makes such calls while it serves: ``python -m integration.gpu.machine`` asks as often as once
was done, until its standard input ends, for ``vmm_cost`` to look at what that costs.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

from integration.gpu.record import Json, MemorySampler, nvml_gpu

INTERVAL_S = 1.0
OFTEN_S = 0.05
IDLE, IO_WAIT, STEAL = 3, 4, 7
"""Columns of the first line of /proc/stat (proc_stat(5)), after its name."""


class Look(NamedTuple):
    """At a moment in epoch seconds: MHz of the GPU's processors and NVML's bits for why it is not
    faster, 0 where no GPU answers, and processor time so far by kind, in ticks."""

    at: float
    sm_mhz: int
    reasons: int
    ticks: tuple[int, ...]


def ticks() -> tuple[int, ...]:
    """Processor time of the whole machine since it started, by kind."""
    line = Path("/proc/stat").read_text().splitlines()[0]
    return tuple(map(int, line.split()[1:9]))


def _clock_reader() -> Callable[[], tuple[int, int]]:
    """A call that returns the GPU's clock and why it is not higher."""
    with contextlib.suppress(Exception):
        nvml, gpu = nvml_gpu()

        def read() -> tuple[int, int]:
            mhz = nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)
            return int(mhz), int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu))

        read()
        return read
    return lambda: (0, 0)


class MachineSampler(threading.Thread):
    """Looks from ``start`` to ``stop``."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="machine-sampler")
        self._clock = _clock_reader()
        self._looks: list[Look] = []
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            with contextlib.suppress(Exception):
                self._looks.append(Look(time.time(), *self._clock(), ticks()))

    def stop(self) -> None:
        self._stopped.set()

    def window(self, begin: float, end: float) -> Json:
        return summary([each for each in list(self._looks) if begin <= each.at <= end])


def summary(looks: list[Look]) -> Json:
    """Clocks, and how much of the processors' time was used and was taken by other machines."""
    if len(looks) < 2:
        return {}
    spent = [last - first for first, last in zip(looks[0].ticks, looks[-1].ticks, strict=True)]
    total = max(1, sum(spent))
    reasons = 0
    for each in looks:
        reasons |= each.reasons
    clocks = [each.sm_mhz for each in looks]
    return {
        "sm_mhz": {"least": min(clocks), "median": statistics.median(clocks)},
        "clock_reasons": f"{reasons:#x}",
        "processors_busy": round(1 - (spent[IDLE] + spent[IO_WAIT]) / total, 4),
        "processors_stolen": round(spent[STEAL] / total, 4),
    }


def spent(pid: int) -> dict[str, float]:
    """What a process and those below it have used so far: processor seconds, and how often they had
    to leave a processor to others. What has ended counts no more."""
    found = {"cpu_s": 0.0, "switches": 0.0}
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for each in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = each.cpu_times()
                found["cpu_s"] += times.user + times.system
                found["switches"] += each.num_ctx_switches().involuntary
    return found


def main() -> int:
    """Ask for the GPU's memory, clock and reasons every ``OFTEN_S`` until nobody listens."""
    clock, memory = _clock_reader(), MemorySampler()
    ended = threading.Event()

    def ask() -> None:
        while not ended.wait(OFTEN_S):
            clock()
            memory.used_bytes()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    print("asking", flush=True)
    sys.stdin.read()
    ended.set()
    return 0


if __name__ == "__main__":
    sys.exit(main())
