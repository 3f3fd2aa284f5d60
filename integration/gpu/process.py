"""Child processes that cannot outlive this one, and the environment of an arm."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
_running: set[Child] = set()


class Child:
    """A command in a process group of its own; output goes to a file.

    The kernel kills the first process when this one dies, whatever the reason; ``stop`` ends the
    whole group.
    """

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self.command = list(command)
        self.log = log
        self.launched = time.time()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=dict(env),
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        _running.add(self)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def wait(self, until: float, each: Callable[[], None] = lambda: None) -> int | None:
        """The exit status, or None if the process still runs at the epoch time ``until``."""
        while self.returncode is None and time.time() < until:
            each()
            time.sleep(0.1)
        each()
        return self.returncode

    def stop(self, grace_s: float = 8.0) -> int | None:
        """End the group: a request first, then force. Safe to call again."""
        for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)
        _running.discard(self)
        return self.returncode


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def stop_all() -> None:
    for child in list(_running):
        child.stop(grace_s=2.0)


def exit_on_signals() -> None:
    """Turn a request to end into SystemExit, so that children are stopped and results written."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


def python(module: str, *arguments: str) -> list[str]:
    """A command that runs a module without putting the working directory on the path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment(elastic: bool, extra: Mapping[str, str], cache: Path) -> dict[str, str]:
    """This process's environment with the plugin on or off and a compile cache per arm."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("KVC_")}
    env.pop("ENABLE_KVCACHED", None)
    if elastic:
        env["ENABLE_KVCACHED"] = "1"
    return {
        **env,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_CACHE_ROOT": str(cache),
        "PYTHONUNBUFFERED": "1",
        **extra,
    }
