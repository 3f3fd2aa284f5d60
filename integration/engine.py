"""Stock vLLM engines for the tests: started, driven, measured and always stopped.

Run as a program, `engine.py SPEC OUT`, it generates with `LLM(...)` inside one process and writes
the tokens down: an engine core without a server starts in seconds.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

MIB = 1 << 20
START_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 15.0
REQUEST_TIMEOUT_S = 120.0
MAX_MODEL_LEN = 2048
BLOCK_TOKENS = 128

ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""`LLM(...)` keeps its engine core to itself."""

# By its metadata: the shim that SGLang needs on a CPU has a module of that name.
needs_vllm = pytest.mark.skipif(
    "vllm" not in importlib.metadata.packages_distributions(),
    reason="vLLM is not installed in this environment; `make test` sets one up",
)

# One thread and eager mode: with more, stock vLLM on a CPU differs from itself.
_ENGINE_ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
}
_ARENA = "memfd:kvcached"


class Request(NamedTuple):
    """A prompt as token ids, and how many tokens to generate."""

    prompt: list[int]
    max_tokens: int


class Generated(NamedTuple):
    """What one engine of `generate` produced."""

    tokens: list[list[int]]
    preemptions: int
    peak_bytes: int


def engine_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without anything that steers an engine or us, plus `extra`."""
    ours = ("KVCACHED_", "ENABLE_KVCACHED", "VLLM_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return {**kept, **_ENGINE_ENV, **(extra or {})}


def serve_command(model: Path) -> list[str]:
    """`vllm serve MODEL` with the arguments that every server of these tests gets."""
    # Not at the top: this file also runs as a program, in which vLLM must be stock.
    from kvcached_plugins.demo.engines import vllm_command

    return [
        *(*vllm_command(), str(model), "--served-model-name", "model"),
        *("--max-model-len", str(MAX_MODEL_LEN), "--dtype", "float32", "--enforce-eager"),
    ]


def tail(log: Path, lines: int = 60) -> str:
    """The end of a log, for an assertion message."""
    if not log.exists():
        return f"{log} was not written"
    return f"the end of {log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def wait_until(condition: Callable[[], bool], timeout_s: float, step_s: float = 0.1) -> bool:
    """Poll `condition` until it holds; False when `timeout_s` has gone by."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(step_s)
    return True


def family(pid: int) -> list[psutil.Process]:
    """The process and all its descendants that still live."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def arenas(pid: int) -> dict[int, int]:
    """The KV ranges that a process holds: bytes in memory of each, by the memfd's inode.

    The kernel's count for the file, which is one number: smaps is read in parts, and memory that
    moves meanwhile is in it twice.
    """
    held: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if _ARENA in str(entry.readlink()):
                    found = entry.stat()
                    held[found.st_ino] = found.st_blocks * 512
    return held


def kv_bytes(pid: int) -> int:
    """Bytes behind the KV ranges of a process and its descendants; shared ranges count once."""
    held: dict[int, int] = {}
    for process in family(pid):
        held |= arenas(process.pid)
    return sum(held.values())


class ArenaFiles:
    """The memfds behind the KV ranges of a process and its descendants, for readings that follow
    one another within microseconds."""

    def __init__(self, pid: int) -> None:
        found: dict[int, str] = {}
        for process in family(pid):
            for entry in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if _ARENA in str(entry.readlink()):
                        found[entry.stat().st_ino] = str(entry)
        self._paths = tuple(found.values())

    def size_bytes(self) -> int:
        """Bytes of memory that the files have now."""
        return sum(os.stat(path).st_blocks * 512 for path in self._paths)


class Server:
    """One API server with its engine core and worker processes, in a session of its own."""

    def __init__(
        self, model: Path, log: Path, *, env: Mapping[str, str], arguments: Sequence[str] = ()
    ) -> None:
        from kvcached_plugins.demo.servers import free_port  # as in serve_command

        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [*self.command(model), "--host", "127.0.0.1", "--port", str(port)]
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=engine_env(env),
                start_new_session=True,
            )
        # The server drops a connection after 5 idle seconds, maybe just as it is used again; one
        # that was stopped for so long does so first of all when it goes on.
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=0)
        self._http = httpx.Client(base_url=self.url, timeout=REQUEST_TIMEOUT_S, limits=limits)

    def command(self, model: Path) -> list[str]:
        """What serves ``model`` and takes ``--host`` and ``--port``."""
        return serve_command(model)

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns when the server answers; fails the test when it ends or takes too long."""
        in_time = wait_until(
            lambda: self.process.poll() is not None or self._healthy(), timeout_s, 0.3
        )
        code = self.process.poll()
        if code is not None or not in_time:
            self.stop()
            what = f"did not answer in {timeout_s:.0f} s" if code is None else f"ended: {code}"
            pytest.fail(f"the engine {what}; {tail(self.log)}", pytrace=False)

    def stop(self) -> None:
        """End the server and every process it started, and wait for them."""
        left = family(self.process.pid)
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(left, timeout=5)
        self._http.close()

    def kv_bytes(self) -> int:
        """Bytes behind the engine's KV ranges, as the kernel counts them."""
        return kv_bytes(self.process.pid)

    def arena_pids(self) -> list[int]:
        """The processes that hold a KV range: the workers."""
        return [each.pid for each in family(self.process.pid) if arenas(each.pid)]

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric over its labels, from /metrics."""
        lines = self._http.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        values = [float(line.rpartition(" ")[2]) for line in found]
        assert values, f"/metrics has no {name}"
        return sum(values)

    def post(self, path: str) -> dict[str, Any]:
        """POST without a body; the JSON answer. Fails the test on an error status."""
        answer = self._http.post(path)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}\n{self}"
        return dict(answer.json()) if answer.text else {}

    def complete(self, request: Request) -> list[int]:
        """The token ids that the server generates greedily for one request."""
        answer = self._http.post(
            "/v1/completions",
            json={
                "model": "model",
                "prompt": request.prompt,
                "max_tokens": request.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            },
        )
        assert answer.status_code == 200, f"{answer.status_code} {answer.text}\n{self}"
        return [int(token) for token in answer.json()["choices"][0]["token_ids"]]

    def complete_all(self, requests: Sequence[Request], concurrency: int = 64) -> list[list[int]]:
        """All of `requests` with up to `concurrency` of them at a time, in their order."""
        with ThreadPoolExecutor(concurrency) as threads:
            return list(threads.map(self.complete, requests))

    def __str__(self) -> str:
        return tail(self.log)

    def _healthy(self) -> bool:
        try:
            return self._http.get("/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False


class Ran(NamedTuple):
    """How a program ended: its exit code and its whole output."""

    code: int
    output: str

    def end(self) -> str:
        """What to show of it when a test fails."""
        last = "\n".join(self.output.splitlines()[-60:])
        return f"exit code {self.code}, after:\n{last}"


def run_script(
    command: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 240.0,
    watch: Callable[[int], None] = lambda pid: None,
) -> Ran:
    """Run `command` in a session of its own; nothing of it is left running.

    `watch` is called with the process id about ten times a second.
    """
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=engine_env(env),
            start_new_session=True,
        )
    try:

        def ended() -> bool:
            watch(process.pid)
            return process.poll() is not None

        if not wait_until(ended, timeout_s):
            pytest.fail(f"no end after {timeout_s:.0f} s; {tail(log)}", pytrace=False)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Ran(process.returncode, log.read_text(errors="replace"))


def engine_spec(model: Path, requests: Sequence[Request], folder: Path, **engine: Any) -> list[str]:
    """The command that serves `requests` with `LLM(**engine)` and writes folder/out.json."""
    defaults = {"max_model_len": MAX_MODEL_LEN, "dtype": "float32", "enforce_eager": True}
    spec = folder / "spec.json"
    spec.write_text(json.dumps([{"model": str(model), **defaults, **engine}, requests]))
    return [sys.executable, __file__, str(spec), str(folder / "out.json")]


def generate(
    model: Path,
    requests: Sequence[Request],
    folder: Path,
    *,
    env: Mapping[str, str] | None = None,
    **engine: Any,
) -> Generated:
    """Serve `requests`, all at once, with `LLM(**engine)` in a process of its own."""
    samples = [0]
    ran = run_script(
        engine_spec(model, requests, folder, **engine),
        folder / "log",
        env={**ONE_PROCESS, **(env or {})},
        watch=lambda pid: samples.append(kv_bytes(pid)),
    )
    assert ran.code == 0, ran.end()
    found = json.loads((folder / "out.json").read_text())
    return Generated(found["tokens"], found["preemptions"], max(samples))


def _generate_here(spec: Path, out: Path) -> None:
    from vllm import LLM, SamplingParams

    engine, requests = json.loads(spec.read_text())
    llm = LLM(**engine, disable_log_stats=False)
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        [SamplingParams(temperature=0, max_tokens=size, ignore_eos=True) for _, size in requests],
        use_tqdm=False,
    )
    metrics = [each for each in llm.get_metrics() if each.name == "vllm:num_preemptions"]
    found = {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "preemptions": sum(int(each.value) for each in metrics),
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    _generate_here(Path(sys.argv[1]), Path(sys.argv[2]))
