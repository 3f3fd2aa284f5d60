"""Memory follows the load, as the kernel counts it, on running `vllm` servers."""

from __future__ import annotations

import contextlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from integration.conftest import (
    BUDGET_BYTES,
    CACHE_TTL_S,
    DECAY_S,
    EXTENT_BYTES,
    Pair,
    elastic_env,
    holding,
    random_prompt,
)
from integration.engine import (
    BLOCK_TOKENS,
    MIB,
    ArenaFiles,
    Request,
    Server,
    needs_vllm,
    wait_until,
)
from integration.sampling import sampled
from integration.test_vllm_tokens import differences
from kvcached_vmm.ledger import Ledger

pytestmark = [pytest.mark.engine, needs_vllm]

SETTLE_S = 3.0
"""How long a loaded two-core machine may take beyond the times that were asked for."""

MOMENT_S = 0.002
"""A reading of two servers that took longer is of no one moment. It takes 20 us by itself."""


def burst(count: int, *, seed: int, size: int = 700, output: int = 40) -> list[Request]:
    rng = random.Random(seed)
    return [Request(random_prompt(size, rng), output) for _ in range(count)]


def falls_to_one_extent(server: Server, within_s: float) -> bool:
    return wait_until(lambda: server.kv_bytes() <= EXTENT_BYTES, within_s)


def test_an_engine_that_served_nothing_holds_at_most_one_extent(pair: Pair) -> None:
    for server, idle in zip((pair.plain, pair.caching), pair.idle, strict=True):
        assert server.arena_pids(), f"no process has an elastic KV range; {server}"
        assert idle.in_kernel <= EXTENT_BYTES
        assert 0 < idle.in_ledger <= EXTENT_BYTES


def test_memory_rises_under_load_and_falls_when_idle(pair: Pair) -> None:
    with sampled(pair.plain.kv_bytes) as sizes:
        pair.plain.complete_all(burst(12, seed=1))

    assert max(sizes) > 4 * EXTENT_BYTES
    # No request is sent any more: the engine must do this by itself.
    assert falls_to_one_extent(pair.plain, DECAY_S + SETTLE_S), f"{pair.plain.kv_bytes()} bytes"


def test_cached_prefixes_are_kept_for_their_time_and_then_given_back(pair: Pair) -> None:
    requests = burst(12, seed=2)
    first = pair.caching.complete_all(requests)
    kept_bytes = pair.caching.kv_bytes()
    hits = pair.caching.metric("vllm:prefix_cache_hits_total")
    again = pair.caching.complete_all(requests)

    assert again == first
    assert kept_bytes > 4 * EXTENT_BYTES
    assert pair.caching.metric("vllm:prefix_cache_hits_total") > hits
    within_s = CACHE_TTL_S + DECAY_S + SETTLE_S
    assert falls_to_one_extent(pair.caching, within_s), f"{pair.caching.kv_bytes()} bytes"


def test_more_requests_than_the_budget_holds_wait_and_all_complete(pair: Pair) -> None:
    requests = burst(64, seed=3, size=900, output=30)
    with sampled(pair.plain.kv_bytes) as sizes:
        answers = pair.plain.complete_all(requests, concurrency=64)

    assert [len(tokens) for tokens in answers] == [30] * 64
    assert BUDGET_BYTES // 2 < max(sizes) <= BUDGET_BYTES


def test_resetting_the_prefix_cache_gives_its_memory_back(pair: Pair) -> None:
    requests = burst(8, seed=4)
    first = pair.caching.complete_all(requests)
    assert pair.caching.kv_bytes() > EXTENT_BYTES

    assert pair.caching.post("/reset_prefix_cache") == {"success": True}

    # Sooner than the prefixes would have run out by themselves.
    assert falls_to_one_extent(pair.caching, DECAY_S + 1.5)
    hits = pair.caching.metric("vllm:prefix_cache_hits_total")
    assert pair.caching.complete_all(requests) == first
    assert pair.caching.metric("vllm:prefix_cache_hits_total") == hits


def test_the_usage_metric_stays_between_nothing_and_all(pair: Pair) -> None:
    """vLLM reports it about once per step; it is 0 when idle and grows with what is running."""
    seen: list[float] = []
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(pair.plain.complete_all, burst(24, seed=5, output=64))
        while not running.done():
            seen.append(pair.plain.metric("vllm:kv_cache_usage_perc"))
        running.result()

    assert all(0.0 <= value <= 1.0 for value in seen)
    assert max(seen) > 0.0
    idle = "vllm:kv_cache_usage_perc"
    assert wait_until(lambda: pair.plain.metric(idle) == 0.0, 5.0), pair.plain.metric(idle)


def test_a_sleeping_engine_holds_no_bytes_and_wakes_up_with_the_same_tokens(pair: Pair) -> None:
    server, requests = pair.plain, burst(6, seed=6)
    before = server.complete_all(requests)
    awake = holding(server, pair.folder)

    server.post("/sleep?level=1")
    asleep = holding(server, pair.folder)
    server.post("/wake_up")

    assert min(awake) > 0
    assert asleep == (0, 0)
    assert server.complete_all(requests) == before
    assert falls_to_one_extent(server, DECAY_S + SETTLE_S)


def test_the_tokens_over_http_are_those_of_stock_vllm_with_both_servers_busy(
    pair: Pair, requests: list[Request], reference: list[list[int]]
) -> None:
    some, expected = requests[-40:], reference[-40:]
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(server.complete_all, some) for server in pair[:2]]
        for answer in answers:
            assert differences(some, answer.result(), expected) == []


@pytest.mark.long
def test_two_servers_take_turns_within_one_budget(pair: Pair) -> None:
    """Bursts that each want more than half of the budget move memory from one to the other."""
    ledger = Ledger.open(pair.folder, "host")
    requests = burst(18, seed=8, size=900, output=24)
    files = {server: ArenaFiles(server.process.pid) for server in (pair.plain, pair.caching)}
    peaks = dict.fromkeys(files, 0)

    def promised() -> int:
        return ledger.snapshot().used_bytes

    def resident() -> int:
        """What both hold at one moment; 0 for a reading that took too long to be of one moment.

        Memory that has moved from one to the other in between would count twice: the first one is
        read on both sides of the second.
        """
        began = time.monotonic()
        before, other = files[pair.plain].size_bytes(), files[pair.caching].size_bytes()
        after = files[pair.plain].size_bytes()
        peaks[pair.plain] = max(peaks[pair.plain], after)
        peaks[pair.caching] = max(peaks[pair.caching], other)
        at_once = time.monotonic() - began < MOMENT_S
        return min(before, after) + other if at_once else 0

    try:
        assert ledger.snapshot().budget_bytes == BUDGET_BYTES
        names = {account.name for account in ledger.snapshot().accounts}
        assert names == {"plain", "caching"}
        with sampled(promised) as in_ledger, sampled(resident, 0.01) as in_kernel:
            expected = pair.plain.complete_all(requests)
            for server in (pair.caching, pair.plain, pair.caching):
                assert server.complete_all(requests) == expected
            with ThreadPoolExecutor(2) as threads:
                both = [
                    threads.submit(server.complete_all, requests)
                    for server in (pair.plain, pair.caching)
                ]
                assert [each.result() for each in both] == [expected, expected]
    finally:
        ledger.close()

    assert max(in_ledger) <= BUDGET_BYTES
    assert max(in_kernel) <= BUDGET_BYTES
    assert len([size for size in in_kernel if size]) > len(in_kernel) // 2
    assert min(peaks.values()) > BUDGET_BYTES // 2, f"peaks: {list(peaks.values())} bytes"


@pytest.mark.long
def test_a_second_engine_gets_what_the_first_one_only_keeps_cached(
    plugin: None, model: Path, tmp_path: Path
) -> None:
    """The first is idle, keeps prefixes in all of the budget, and would do so for an hour."""
    folder = tmp_path / "ledger"
    env = {
        **elastic_env(folder),
        "KVCACHED_BUDGET": f"{BUDGET_BYTES // MIB}MiB",
        "KVCACHED_EXTENT": f"{EXTENT_BYTES // MIB}MiB",
        "KVCACHED_CACHE_TTL": "3600",
    }
    # Whole blocks only: one that is partly filled is not cached.
    kept = burst(40, seed=9, size=5 * BLOCK_TOKENS, output=1)
    requests = burst(15, seed=10, output=24)
    with contextlib.ExitStack() as servers:

        def start(name: str) -> Server:
            named = {**env, "KVCACHED_NAME": name}
            server = Server(model, tmp_path / f"{name}.log", env=named)
            servers.callback(server.stop)
            server.wait_ready()
            return server

        first = start("first")
        expected = first.complete_all(kept)
        full = holding(first, folder)
        assert full.in_ledger == BUDGET_BYTES
        assert full.in_kernel > BUDGET_BYTES - EXTENT_BYTES

        second = start("second")
        answers, seconds = timed(second, requests)
        left = holding(first, folder)
        again = first.complete_all(kept[-4:])
        first.stop()
        second.post("/reset_prefix_cache")
        alone, alone_seconds = timed(second, requests)

    assert answers == alone
    assert again == expected[-4:]
    assert seconds < alone_seconds + 5.0
    assert max(left) < BUDGET_BYTES // 2


def timed(server: Server, requests: list[Request]) -> tuple[list[list[int]], float]:
    """The answers to `requests`, sent all at once, and how many seconds they took."""
    began = time.monotonic()
    answers = server.complete_all(requests)
    return answers, time.monotonic() - began
