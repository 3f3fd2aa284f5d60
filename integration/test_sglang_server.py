"""A stock `python -m sglang.launch_server`: its KV memory as the kernel counts it, and neighbours.

The neighbours are not engines but small programs with a record in the same ledger: two engines at
once are more than a small machine can take.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from integration.conftest import elastic_env, holding, random_prompt
from integration.engine import MIB, Request, wait_until
from integration.sglang_engine import EXTENT_BYTES, TOKEN_BYTES, SGLangServer, needs_sglang
from kvcached_plugins.metrics import COUNTERS, GAUGES
from kvcached_vmm.ledger import Ledger

pytestmark = [pytest.mark.engine, needs_sglang]

BUDGET_BYTES = 12 * MIB
CACHE_TTL_S = 4.0
SETTLE_S = 8.0

NEIGHBOUR = """
import sys, time
from kvcached_plugins.metrics import COUNTERS, GAUGES
from kvcached_vmm.ledger import Ledger
account = Ledger.open(sys.argv[1], "host").join("neighbour", None)
wanted, got = int(sys.argv[2]), 0
while got < wanted:
    account.report(got, 0, wanted - got)
    granted = account.reserve(wanted - got, 1 << 20)
    account.commit(granted, granted)
    got += granted
    time.sleep(0.01)
account.report(got, 0, 0)
print("has it", flush=True)
time.sleep(600)
"""


class Serving(NamedTuple):
    server: SGLangServer
    folder: Path


@pytest.fixture(scope="module")
def serving(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("server")
    env = {
        **elastic_env(folder / "ledger"),
        "KVCACHED_BUDGET": f"{BUDGET_BYTES}",
        "KVCACHED_EXTENT": f"{EXTENT_BYTES}",
        "KVCACHED_CACHE_TTL": f"{CACHE_TTL_S}",
        "KVCACHED_NAME": "sglang",
    }
    server = SGLangServer(model, folder / "log", env=env, arguments=["--enable-metrics"])
    try:
        server.wait_ready()
        yield Serving(server, folder / "ledger")
    finally:
        server.stop()


@contextlib.contextmanager
def neighbour(folder: Path, size_bytes: int) -> Iterator[subprocess.Popen[str]]:
    """A process that takes ``size_bytes`` of the budget as soon as it can, and keeps it."""
    program = [sys.executable, "-c", NEIGHBOUR, str(folder), str(size_bytes)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def burst(count: int, *, seed: int, size: int = 200, output: int = 24) -> list[Request]:
    rng = random.Random(seed)
    return [Request(random_prompt(size, rng), output) for _ in range(count)]


def falls_to_one_extent(server: SGLangServer, within_s: float) -> bool:
    return wait_until(lambda: server.kv_bytes() <= EXTENT_BYTES, within_s)


def test_memory_rises_under_load_and_falls_when_idle(serving: Serving) -> None:
    server = serving.server
    assert holding(server, serving.folder).in_ledger == EXTENT_BYTES, "it has served nothing yet"

    server.complete_all(burst(10, seed=1), concurrency=10)

    assert server.kv_bytes() > 4 * EXTENT_BYTES
    # No request is sent any more: the engine must do this by itself.
    assert falls_to_one_extent(server, CACHE_TTL_S + SETTLE_S), server.kv_bytes()
    assert holding(server, serving.folder).in_ledger == EXTENT_BYTES


def test_server_info_shows_what_the_cache_really_holds(serving: Serving) -> None:
    server = serving.server
    server.complete_all(burst(4, seed=2), concurrency=4)
    numbers = server.elastic()

    assert numbers["limit_bytes"] == BUDGET_BYTES
    assert numbers["extent_bytes"] == EXTENT_BYTES
    assert 0 < numbers["cached_bytes"] <= numbers["committed_bytes"] <= BUDGET_BYTES
    assert numbers["virtual_bytes"] >= BUDGET_BYTES


def test_flushing_the_cache_gives_its_memory_back(serving: Serving) -> None:
    server = serving.server
    requests = burst(8, seed=3)
    first = server.complete_all(requests, concurrency=8)
    assert server.kv_bytes() > 2 * EXTENT_BYTES

    server.tell("/flush_cache")

    assert falls_to_one_extent(server, 1.0), server.kv_bytes()
    assert server.complete_all(requests, concurrency=8) == first


def test_a_sleeping_engine_holds_no_bytes_and_wakes_up_with_the_same_tokens(
    serving: Serving,
) -> None:
    server = serving.server
    requests = burst(4, seed=4)
    first = server.complete_all(requests, concurrency=4)

    server.tell("/release_memory_occupation", tags=["kv_cache"])
    asleep = holding(server, serving.folder)
    server.tell("/resume_memory_occupation", tags=["kv_cache"])

    assert asleep == (0, 0)
    assert server.complete_all(requests, concurrency=4) == first


def test_more_requests_than_the_budget_holds_wait_and_all_complete(serving: Serving) -> None:
    server = serving.server
    requests = burst(32, seed=5, size=400, output=24)
    assert len(requests) * 424 * TOKEN_BYTES > 4 * BUDGET_BYTES
    peak = 0
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(server.complete_all, requests, 32)
        while not running.done():
            peak = max(peak, server.kv_bytes())
        answers = running.result()

    assert [len(tokens) for tokens in answers] == [24] * 32
    assert BUDGET_BYTES // 2 < peak <= BUDGET_BYTES


def test_an_idle_engine_gives_what_it_only_keeps_cached_to_a_neighbour(serving: Serving) -> None:
    server = serving.server
    server.complete_all(burst(20, seed=6, size=300, output=1), concurrency=20)
    assert server.kv_bytes() > BUDGET_BYTES // 2

    with neighbour(serving.folder, BUDGET_BYTES - 2 * EXTENT_BYTES) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        assert server.kv_bytes() <= 2 * EXTENT_BYTES


def test_requests_wait_for_a_neighbour_that_is_then_killed(serving: Serving) -> None:
    """Nobody tells the ledger that it is gone."""
    server = serving.server
    requests = burst(6, seed=7, size=300)
    server.tell("/flush_cache")
    alone = server.complete_all(requests, concurrency=6)
    server.tell("/flush_cache")

    with neighbour(serving.folder, BUDGET_BYTES - EXTENT_BYTES) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(server.complete_all, requests, 6)
            assert not wait_until(running.done, 2.0)
            assert server.kv_bytes() <= EXTENT_BYTES
            other.send_signal(signal.SIGKILL)
            assert running.result(timeout=60) == alone
    with contextlib.closing(Ledger.open(serving.folder, "host")) as ledger:
        assert [account.name for account in ledger.snapshot().accounts] == ["sglang"]


def test_the_usage_metric_is_what_requests_use(serving: Serving) -> None:
    """SGLang would count pages without memory as used."""
    server = serving.server
    server.tell("/flush_cache")
    assert wait_until(lambda: server.metric("sglang:token_usage") == 0.0, 40.0)


def test_its_metrics_show_the_ledgers_figures_of_this_engine(serving: Serving) -> None:
    """Under the names that they have on vLLM's /metrics, beside SGLang's own."""
    server = serving.server
    server.complete_all(burst(6, seed=8), concurrency=6)
    with neighbour(serving.folder, EXTENT_BYTES) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        with contextlib.closing(Ledger.open(serving.folder, "host")) as ledger:
            view = ledger.snapshot()
        text = httpx.get(f"{server.url}/metrics", timeout=30).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    (own,) = [each for each in view.accounts if each.name == "sglang"]
    labels = {"model_name": "sglang", "engine": "sglang", "device": "host", "pid": str(own.pid)}
    for each in (*GAUGES, *COUNTERS):
        samples = families[each.name.removesuffix("_total")].samples
        expected = [] if each.value(own) is None else [labels]
        assert [sample.labels for sample in samples] == expected, "the neighbour is not its own"

    def value(name: str) -> float:
        return server.metric(f"kvcached_{name}")

    assert EXTENT_BYTES < value("committed_bytes") <= BUDGET_BYTES
    assert value("budget_bytes") == BUDGET_BYTES
    assert value("commits_total") > 4
    assert value("releases_total") > 0
    assert value("reclaims_total") > 0, "an earlier neighbour has waited"
    assert value("driver_seconds_total") > 0
    assert "sglang:num_queue_reqs" in families
    # Counted in the first process, where nobody may load prometheus_client before SGLang.
    assert server.metric("sglang:num_requests_total") > 0
    answer = httpx.get(
        f"{server.url}/metrics", headers={"Accept": "application/openmetrics-text"}, timeout=30
    )
    assert answer.text.endswith("# EOF\n"), "as SGLang's own route, it answers as it is asked"
    assert "kvcached_live_bytes" in answer.text
