"""The same greedy tokens as stock vLLM, whatever the scheduler does with the blocks."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from integration.conftest import asked_for, cases, elastic_env
from integration.engine import MIB, Generated, Request, generate, needs_vllm
from integration.probe import wait_for_grant
from kvcached_vmm.ledger import Ledger

pytestmark = [pytest.mark.engine, needs_vllm]

ALL = 220
BUDGET_BYTES = 16 * MIB
TIGHT = {"KVCACHED_BUDGET": f"{BUDGET_BYTES // MIB}MiB", "KVCACHED_EXTENT": "1MiB"}
"""About two of the longest requests at a time."""


class Case(NamedTuple):
    """An engine that serves the last `size` of the requests, all at once."""

    size: int
    engine: dict[str, Any]
    env: dict[str, str]


CASES = {
    "prefix caching and small chunks": Case(
        ALL, {"enable_prefix_caching": True, "max_num_batched_tokens": 256}, {}
    ),
    "no prefix caching": Case(ALL, {"enable_prefix_caching": False}, {}),
    "preemption": Case(ALL, {"enable_prefix_caching": False}, TIGHT),
    "preemption with prefix caching": Case(100, {"enable_prefix_caching": True}, TIGHT),
    # In float32 stock vLLM gives the same tokens with one worker and with two.
    "two tensor parallel workers": Case(12, {"tensor_parallel_size": 2}, {}),
}


LONG = {
    "prefix caching and small chunks",
    "no prefix caching",
    "preemption with prefix caching",
}


@pytest.fixture(scope="module")
def elastic(
    request: pytest.FixtureRequest,
    lanes: Executor,
    stock: Future[Generated],
    plugin: None,
    model: Path,
    requests: list[Request],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Future[Generated]]:
    """What an elastic engine makes of each case, soon."""
    made = {}
    for name in asked_for(request, "name"):
        case = CASES[name]
        folder = tmp_path_factory.mktemp("tokens")
        env = {**elastic_env(folder / "ledger"), **case.env}
        some = requests[-case.size :]
        made[name] = lanes.submit(generate, model, some, folder, env=env, **case.engine)
    return made


def differences(
    requests: list[Request], ours: list[list[int]], theirs: list[list[int]]
) -> list[str]:
    """One line for each request whose tokens differ, and where they begin to."""
    lines = []
    for number, (request, mine, stock) in enumerate(zip(requests, ours, theirs, strict=True)):
        if mine != stock:
            at = next(
                (i for i, (a, b) in enumerate(zip(mine, stock, strict=False)) if a != b),
                min(len(mine), len(stock)),
            )
            lines.append(f"request {number}, prompt of {len(request.prompt)}: from token {at} on")
    return lines


def test_the_tokens_of_this_model_tell_whether_its_cache_is_right(
    reference: list[list[int]],
) -> None:
    """Two prompts that differ 600 tokens before the end must not give the same answer."""
    assert reference[-1][1:] != reference[-2][1:]
    assert len({token for tokens in reference for token in tokens}) > 500


@pytest.mark.parametrize("name", cases(CASES, LONG))
def test_tokens_are_those_of_stock_vllm(
    name: str,
    elastic: dict[str, Future[Generated]],
    requests: list[Request],
    reference: list[list[int]],
) -> None:
    size = CASES[name].size
    generated = elastic[name].result()

    assert generated.peak_bytes > 0, "no elastic KV range was seen"
    assert differences(requests[-size:], generated.tokens, reference[-size:]) == []


@pytest.mark.parametrize("name", cases([name for name in CASES if CASES[name].env], LONG))
def test_a_tight_budget_preempts_and_is_kept(
    name: str, elastic: dict[str, Future[Generated]]
) -> None:
    generated = elastic[name].result()

    assert generated.preemptions > 0
    assert generated.peak_bytes <= BUDGET_BYTES


@pytest.mark.long
def test_tokens_beside_a_neighbour_who_takes_memory_between_and_during_steps(
    plugin: None,
    model: Path,
    requests: list[Request],
    reference: list[list[int]],
    tmp_path: Path,
) -> None:
    """The engine core is in one process with its worker: it answers while a step runs."""
    some, budget = requests[-100:], 32 * MIB
    env = {
        **elastic_env(tmp_path / "ledger"),
        "KVCACHED_BUDGET": str(budget),
        "KVCACHED_EXTENT": "1MiB",
    }
    done = threading.Event()
    grants: list[float] = []

    def neighbour() -> None:
        with contextlib.closing(Ledger.open(tmp_path / "ledger", "host")) as ledger:
            account = ledger.join("neighbour", budget)
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    grants.append(wait_for_grant(account, 12 * MIB, MIB, timeout_s=5))
                    time.sleep(0.05)
                    account.cancel(12 * MIB)
                time.sleep(0.02)

    thread = threading.Thread(target=neighbour)
    thread.start()
    try:
        generated = generate(model, some, tmp_path, env=env, enable_prefix_caching=True)
    finally:
        done.set()
        thread.join()

    assert differences(some, generated.tokens, reference[-len(some) :]) == []
    assert len(grants) > 20
    assert generated.peak_bytes > 16 * MIB, "the neighbour had nothing to take"
