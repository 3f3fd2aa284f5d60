"""Stock servers, vLLM or SGLang, with a client each, started together and stopped together."""

from __future__ import annotations

import argparse
import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from integration.gpu import peer, sglang, traffic
from integration.gpu.bench_client import healthy
from integration.gpu.burst_client import LEAD_S, BurstClient
from integration.gpu.bursts import Load, Reply
from integration.gpu.harness import Run
from integration.gpu.onoff import serve_command
from integration.gpu.process import Child, environment
from integration.gpu.record import Json, plugin_lines
from integration.gpu.traffic import Ask

STOCK, OURS, PEER = "static", "ours", "kvcached"
"""Who looks after an engine's KV memory: vLLM as it is, we, or the published system."""
VLLM, SGLANG = "vllm", "sglang"
CALLED_OFF_S = 3.0
"""How long a client may take to report what it has called off."""
LOAD_S = 0.1
"""How often it is looked whether servers are ready."""
COUNTED = (
    *("num_preemptions_total", "prefix_cache_hits_total", "request_success_total"),
    *("request_queue_time_seconds_sum", "request_prefill_time_seconds_sum"),
    "request_prefill_time_seconds_count",
)


@dataclass(frozen=True)
class Seat:
    """What one server is given.

    Attributes:
        kv_bytes: what ``--kv-cache-memory-bytes`` says; where memory is elastic, only addresses.
        kind: one of ``STOCK``, ``OURS`` and ``PEER``.
        engine_args: more arguments than all servers of the run have.
        env: more environment.
        model: another model than the run's.
        engine: ``VLLM``, or ``SGLANG``, which gets its cache size in tokens and its own defaults.
    """

    kv_bytes: int
    kind: str = STOCK
    engine_args: Json = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    engine: str = VLLM


class Tenant:
    """A server, and the client that talks to it.

    Args:
        ledger: the folder of the ledger that elastic servers of the house share.
    """

    def __init__(
        self, run: Run, folder: Path, name: str, number: int, seat: Seat, ledger: Path
    ) -> None:
        o = run.o
        self.name = name
        self.kind = seat.kind
        self.engine = seat.engine
        self.port = o.port + number
        self.log = folder / f"server-{name}.log"
        self.ready_after_s: float | None = None
        arguments = argparse.Namespace(**vars(o))
        arguments.port, arguments.kv_bytes = self.port, seat.kv_bytes
        arguments.model = seat.model or o.model
        arguments.engine_args = {
            "max_num_seqs": o.max_num_seqs,
            "max_num_batched_tokens": o.batched_tokens,
            "gpu_memory_utilization": 0.1,  # what must be free at start: the size is given
            **o.engine_args,
            **seat.engine_args,
        }
        extra = {**o.env, **seat.env}
        cache = o.cache / "shared"
        if seat.kind == PEER:
            env = peer.peer_environment(name, extra, cache, o.peer, folder)
        else:
            if seat.kind == OURS:
                ours = {"KVCACHED_DIR": str(ledger), "KVCACHED_NAME": name, **o.plugin_env}
                extra = {**o.env, **ours, **seat.env}
            env = environment(seat.kind == OURS, extra, cache)
        if seat.engine == SGLANG:
            command = sglang.command(arguments, seat.kv_bytes // run.token_bytes)
            env |= sglang.site_environment()
        else:
            command = serve_command(arguments)
        self.child = Child(command, self.log, env)
        self.client = BurstClient(
            name, folder / f"client-{name}", self.port, arguments.model, run.vocabulary, o
        )

    @property
    def usable(self) -> bool:
        return self.ready_after_s is not None and self.child.returncode is None

    @property
    def starting(self) -> bool:
        alive = self.child.returncode is None and self.client.child.returncode is None
        return alive and not (self.ready_after_s is not None and self.client.ready)

    def look(self) -> None:
        if self.ready_after_s is None and healthy(self.port):
            self.ready_after_s = round(time.time() - self.child.launched, 2)

    def metrics(self) -> Json:
        """Some of vLLM's own counters; SGLang's server is started without any."""
        if self.engine == SGLANG:
            return {}
        return scrape(self.port)

    def post(self, path: str, timeout_s: float) -> Json:
        """What a POST without a body answers, such as ``/sleep`` and ``/wake_up``."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method="POST")
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text = answer.read()
        found: Json = json.loads(text) if text else {}
        return found

    def describe(self) -> Json:
        return {
            "kind": self.kind,
            "engine": self.engine,
            "command": self.child.command,
            "startup_s": self.ready_after_s,
            "exit_status": self.child.returncode,
            "plugin_log": plugin_lines(self.log),
        }


class House:
    """All tenants of one moment."""

    def __init__(self, run: Run, folder: Path, seats: Mapping[str, Seat]) -> None:
        folder.mkdir()
        self.run = run
        self.folder = folder
        self.ledger = folder / "ledger"
        self.tenants: dict[str, Tenant] = {}
        self.add(seats)

    def add(self, seats: Mapping[str, Seat]) -> None:
        """Start more servers, all at once."""
        for name, seat in seats.items():
            number = len(self.tenants)
            self.tenants[name] = Tenant(self.run, self.folder, name, number, seat, self.ledger)

    def wait_ready(self, until: float) -> bool:
        """Whether all serve by the moment ``until``; says which do not."""
        while time.time() < until and any(each.starting for each in self.tenants.values()):
            for tenant in self.tenants.values():
                tenant.look()
            if any(each.child.returncode is not None for each in self.tenants.values()):
                break
            time.sleep(LOAD_S)
        for tenant in self.tenants.values():
            if not tenant.usable or not tenant.client.ready:
                states = tenant.child.returncode, tenant.client.child.returncode
                self.run.note(f"{tenant.name}: not ready; server and client ended with {states}")
        return all(each.usable and each.client.ready for each in self.tenants.values())

    def play(
        self,
        label: str,
        load: Load,
        seeds: Mapping[str, int],
        until: float,
        each: Callable[[], None] = lambda: None,
    ) -> tuple[float, dict[str, list[Reply]]]:
        """A burst on each tenant that ``seeds`` names, at one moment, which is returned; then what
        came back by the moment ``until``."""
        at = time.time() + LEAD_S
        for name, seed in seeds.items():
            self.tenants[name].client.order(label, at, load, seed)
        self._wait(label, list(seeds), until, each)
        return at, {name: self.tenants[name].client.replies(label) for name in seeds}

    def send(
        self,
        label: str,
        plan: Mapping[str, Sequence[Ask]],
        seed: int,
        tail_s: float,
        until: float,
        each: Callable[[], None] = lambda: None,
    ) -> tuple[float, float, dict[str, list[Reply]]]:
        """Open-loop traffic on each tenant that ``plan`` names, from one moment on; what still runs
        ``tail_s`` after its last request is called off. Returns when it began, when it was to be
        called off, and what came back."""
        at = time.time() + LEAD_S
        off = min(until - CALLED_OFF_S, at + traffic.ends_s(plan) + tail_s)
        for number, (name, asks) in enumerate(plan.items()):
            self.tenants[name].client.send(label, at, asks, seed + number, off)
        self._wait(label, list(plan), off + CALLED_OFF_S, each)
        return at, off, {name: self.tenants[name].client.replies(label) for name in plan}

    def _wait(
        self, label: str, names: Sequence[str], until: float, each: Callable[[], None]
    ) -> None:
        tenants = [self.tenants[name] for name in names]
        while time.time() < until and not all(t.client.done(label) for t in tenants):
            each()
            if any(tenant.child.returncode is not None for tenant in tenants):
                self.run.note(f"{label}: a server has died")
                break
            time.sleep(0.005)

    def stop(self) -> None:
        """End everything at once; within about ten seconds."""
        children = [c for t in self.tenants.values() for c in (t.client.child, t.child)]
        threads = [threading.Thread(target=child.stop) for child in children]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(15.0)

    def describe(self) -> Json:
        return {name: tenant.describe() for name, tenant in self.tenants.items()}


def scrape(port: int) -> Json:
    """Some of the counters of the vLLM server at ``port``."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return counters(answer.read().decode())


def counters(text: str, names: Sequence[str] = COUNTED) -> Json:
    """Sums over the labels of vLLM's counters in the text of ``/metrics``."""
    found: Json = {}
    for name in names:
        values = re.findall(rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        if values:
            found[name.removesuffix("_total")] = sum(map(float, values))
    return found
