"""Stock ``vllm serve`` processes with a client each, started together and stopped together."""

from __future__ import annotations

import argparse
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from integration.gpu.bench_client import healthy
from integration.gpu.burst_client import LEAD_S, BurstClient
from integration.gpu.bursts import Load, Reply
from integration.gpu.harness import Run
from integration.gpu.onoff import serve_command
from integration.gpu.process import Child, environment
from integration.gpu.record import Json, plugin_lines

LOAD_S = 0.1
"""How often it is looked whether servers are ready."""
COUNTED = ("num_preemptions_total", "prefix_cache_hits_total", "request_success_total")


class Tenant:
    """A server, and the client that talks to it.

    Args:
        ledger: the folder of the ledger, for an elastic server; None: stock, plugin off.
        kv_bytes: what ``--kv-cache-memory-bytes`` says; with the plugin, no more than addresses.
    """

    def __init__(
        self, run: Run, folder: Path, name: str, number: int, kv_bytes: int, ledger: Path | None
    ) -> None:
        o = run.o
        self.name = name
        self.port = o.port + number
        self.log = folder / f"server-{name}.log"
        self.ready_after_s: float | None = None
        arguments = argparse.Namespace(**vars(o))
        arguments.port, arguments.kv_bytes = self.port, kv_bytes
        arguments.engine_args = {
            "max_num_seqs": o.max_num_seqs,
            "max_num_batched_tokens": o.batched_tokens,
            "gpu_memory_utilization": 0.1,  # what must be free at start: the size is given
            **o.engine_args,
        }
        extra = dict(o.env)
        if ledger is not None:
            extra |= {"KVCACHED_DIR": str(ledger), "KVCACHED_NAME": name, **o.plugin_env}
        env = environment(ledger is not None, extra, o.cache / "shared")
        self.child = Child(serve_command(arguments), self.log, env)
        self.client = BurstClient(
            name, folder / f"client-{name}", self.port, o.model, run.vocabulary, o
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
        """Some of vLLM's own counters."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return counters(answer.read().decode())

    def describe(self) -> Json:
        return {
            "command": self.child.command,
            "startup_s": self.ready_after_s,
            "exit_status": self.child.returncode,
            "plugin_log": plugin_lines(self.log),
        }


class House:
    """All tenants of one moment."""

    def __init__(self, run: Run, folder: Path, kv_bytes: Mapping[str, int], elastic: bool) -> None:
        folder.mkdir()
        self.run = run
        self.ledger = folder / "ledger" if elastic else None
        self.tenants = {
            name: Tenant(run, folder, name, number, size, self.ledger)
            for number, (name, size) in enumerate(kv_bytes.items())
        }

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
        clients = {name: self.tenants[name].client for name in seeds}
        for name, client in clients.items():
            client.order(label, at, load, seeds[name])
        while time.time() < until and not all(c.done(label) for c in clients.values()):
            each()
            if any(self.tenants[name].child.returncode is not None for name in seeds):
                self.run.note(f"{label}: a server has died")
                break
            time.sleep(0.005)
        return at, {name: client.replies(label) for name, client in clients.items()}

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


def counters(text: str, names: Sequence[str] = COUNTED) -> Json:
    """Sums over the labels of vLLM's counters in the text of ``/metrics``."""
    found: Json = {}
    for name in names:
        values = re.findall(rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        if values:
            found[name.removesuffix("_total")] = sum(map(float, values))
    return found
