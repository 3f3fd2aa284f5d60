"""Stock servers: started, watched until they answer, and always stopped."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx

from kvcached_plugins.demo.engines import Engine
from kvcached_vmm.errors import KVCachedError

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 15.0
_CAUSE = re.compile(r"^kvcached: |\b\w*(Error|Exception): \S")


class Server(NamedTuple):
    """One running engine."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    engine: Engine


class ServerSpec(NamedTuple):
    """What to start. `env` is laid over this process's own environment."""

    name: str
    engine: Engine
    model: Path
    arguments: Sequence[str]
    env: Mapping[str, str]


class ServerError(KVCachedError):
    """An engine of the demo did not start, or died."""


@contextlib.contextmanager
def running(
    specs: Sequence[ServerSpec], logs: Path, waiting: Callable[[float], None]
) -> Iterator[list[Server]]:
    """Start all of `specs` together and stop them at the end, whatever happens in between.

    `waiting` is called about once a second until all answer, with the seconds gone by.
    Raises ServerError, with the end of the log, when one of them does not come up.
    """
    servers: list[Server] = []
    try:
        for spec in specs:
            servers.append(_start(spec, logs / f"{spec.name}.log"))
        _wait_until_ready(servers, waiting)
        yield servers
    finally:
        _stop(servers)


def check_alive(servers: Sequence[Server]) -> None:
    """Raises ServerError when one of `servers` has ended."""
    for server in servers:
        code = server.process.poll()
        if code is not None:
            raise ServerError(f"{server.name} ended with exit code {code}.{_tail(server.log)}")


def _start(spec: ServerSpec, log: Path) -> Server:
    port = free_port()
    command = [*spec.engine.command(spec.model), *spec.arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        # A session of its own, so that the engine's children can be stopped with it, and Ctrl-C
        # in the terminal reaches only the demo.
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **spec.env},
            start_new_session=True,
        )
    return Server(spec.name, f"http://127.0.0.1:{port}", process, log, spec.engine)


def _wait_until_ready(servers: Sequence[Server], waiting: Callable[[float], None]) -> None:
    started = time.monotonic()
    pending = list(servers)
    while pending:
        check_alive(servers)
        pending = [server for server in pending if not _answers(server)]
        gone_s = time.monotonic() - started
        if pending and gone_s > START_TIMEOUT_S:
            slow = pending[0]
            raise ServerError(
                f"{slow.name} did not answer within {START_TIMEOUT_S:.0f} s.{_tail(slow.log)}"
            )
        waiting(gone_s)
        time.sleep(0.5)


def _answers(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def _stop(servers: Sequence[Server]) -> None:
    for server in servers:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for server in servers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(max(0.1, deadline - time.monotonic()))
        # What the engine itself has left behind, or the engine if it did not listen.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to connections; some SGLang
    releases also want the one 10,000 above."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _tail(log: Path, lines: int = 12) -> str:
    """The first error in a log and its last lines: engines end with what follows from a failure."""
    text = log.read_text(errors="replace").splitlines()
    causes = (line for line in text if " WARNING " not in line and _CAUSE.search(line))
    first = next(causes, None)
    shown = text[-lines:] if first is None or first in text[-lines:] else [first, *text[-lines:]]
    return f" From {log}:\n" + "\n".join(shown)
