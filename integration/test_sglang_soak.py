"""A short soak of stock SGLang: random load while limits move and neighbours grab memory."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from integration.conftest import elastic_env, mixed_requests, random_prompt
from integration.engine import MIB, Request, wait_until
from integration.mishaps import Mishaps
from integration.places import Place
from integration.sampling import sampled
from integration.sglang_engine import EXTENT_BYTES, SGLangServer, needs_sglang, schedule
from kvcached_vmm.ledger import Ledger

pytestmark = [pytest.mark.engine, needs_sglang]

BUDGET_BYTES = 16 * MIB
"""A third of what the clients' requests want at a time."""
CLIENTS = 10
SECONDS = 30.0


@pytest.fixture(scope="module")
def asked() -> list[Request]:
    """Mixed requests, and some whose prompts are read in a dozen parts and fill whole extents."""
    rng = random.Random(9)
    mixed = [Request(prompt, min(size, 40)) for prompt, size in mixed_requests(50, longest=300)]
    large = [
        Request(random_prompt(rng.randint(600, 1200), rng), rng.randint(10, 60)) for _ in range(12)
    ]
    return mixed + large


@pytest.fixture
def place(model: Path, tmp_path: Path) -> Iterator[Place]:
    env = {
        **elastic_env(tmp_path / "ledger"),
        "KVCACHED_NAME": "engine",
        "KVCACHED_BUDGET": str(BUDGET_BYTES),
        "KVCACHED_EXTENT": str(EXTENT_BYTES),
        "KVCACHED_DECAY": "0.05",
        "KVCACHED_CACHE_TTL": "0.2",
    }

    def start(life: int) -> SGLangServer:
        arguments = ("--chunked-prefill-size", "64")
        return SGLangServer(model, tmp_path / f"{life}.log", env=env, arguments=arguments)

    made = Place("engine", start)
    try:
        made.wait_ready()
        yield made
    finally:
        made.server.stop()


def test_tokens_stay_those_of_stock_sglang_and_the_budget_is_kept(
    place: Place, model: Path, asked: list[Request], tmp_path: Path
) -> None:
    expected = schedule(model, asked, [("run", 0, len(asked))], tmp_path / "stock").tokens
    over, folder = threading.Event(), tmp_path / "ledger"
    mishaps = Mishaps([place], folder, BUDGET_BYTES, seed=3, over=over, pause_s=(0.0, 0.0))

    def client(number: int) -> int:
        chance, answers = random.Random(number), 0
        while not over.is_set():
            index = chance.randrange(len(asked))
            assert place.server.complete(asked[index]) == expected[index], index
            answers += 1
            over.wait(chance.uniform(0.3, 2.0) if chance.random() < 0.1 else 0.0)
        return answers

    with (
        contextlib.closing(Ledger.open(folder, "host")) as ledger,
        sampled(lambda: ledger.snapshot().used_bytes, 0.01) as used,
        ThreadPoolExecutor(CLIENTS + 2) as threads,
    ):
        clients = [threads.submit(client, number) for number in range(CLIENTS)]
        others = [threads.submit(each) for each in (mishaps.move_limits, mishaps.grab)]
        end = time.monotonic() + SECONDS
        wait_until(lambda: any(each.done() for each in clients), end - time.monotonic())
        over.set()
        answers = [each.result(120) for each in clients]
        for each in others:
            each.result(30)

    mishaps.lift_limits()
    assert all(answers)
    assert max(used) <= BUDGET_BYTES
    assert mishaps.seen.limits_moved > 5
    assert sum(mishaps.seen.neighbours.values()) > 1
    assert wait_until(lambda: place.kv_bytes() <= EXTENT_BYTES, 10.0)
