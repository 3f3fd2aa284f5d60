"""The same tokens as stock SGLang, whatever memory comes and goes behind them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from integration.conftest import elastic_env, mixed_requests, random_prompt
from integration.engine import MIB, Request
from integration.sglang_engine import EXTENT_BYTES, Scheduled, needs_sglang, schedule

pytestmark = [pytest.mark.engine, needs_sglang]

MANY = 210
LONG = 24
LARGE = 8
BUDGET_BYTES = 6 * MIB
CACHE_TTL_S = 2.0
DECAY_S = 0.5
SETTLE_S = 12.0
"""How long a loaded two-core machine may take to fall to one extent."""

SERVE = ("run", 0, MANY)
FALL = ("until", EXTENT_BYTES, CACHE_TTL_S + DECAY_S + SETTLE_S)
SERVE_LONG = ("run", MANY, MANY + LONG)
"""Short prompts with long answers: more of them are admitted than fit in the small budget."""

BESIDE_A_RIVAL = ("rival", MANY + LONG, MANY + LONG + LARGE)
"""Prompts that are read in many parts and take several extents."""


class Case(NamedTuple):
    """A way to run SGLang: its arguments and environment, and what it does."""

    arguments: dict[str, Any]
    small_budget: bool
    script: tuple[tuple[Any, ...], ...] = (SERVE, FALL)
    env: Mapping[str, str] = MappingProxyType({})


OPTIMIST = {"schedule_conservativeness": 0.01}
CHUNKS = {"chunked_prefill_size": 32, "disable_radix_cache": True}
CASES = {
    "room for all": Case({}, False),
    "no radix cache, chunked prefill": Case(
        {"disable_radix_cache": True, "chunked_prefill_size": 64}, True
    ),
    "no overlap": Case({"disable_overlap_schedule": True}, True),
    "pages of 16": Case({"page_size": 16}, True),
    "poison": Case({}, True, env=MappingProxyType({"KVCACHED_POISON": "large"})),
    "chunks beside a rival": Case(CHUNKS, True, (BESIDE_A_RIVAL, FALL)),
    "chunks of pages of 16 beside a rival": Case(
        {**CHUNKS, "page_size": 16}, True, (BESIDE_A_RIVAL, FALL)
    ),
    "retraction": Case(OPTIMIST, True, (SERVE_LONG, FALL)),
    "retraction, pages of 16": Case({**OPTIMIST, "page_size": 16}, True, (SERVE_LONG, FALL)),
}


@pytest.fixture(scope="module")
def mixed() -> list[Request]:
    """MANY mixed requests, then LONG with long answers, then LARGE with long prompts."""
    rng = random.Random(5)
    many = [Request(prompt, min(size, 24)) for prompt, size in mixed_requests(MANY, longest=300)]
    long = [
        Request(random_prompt(rng.randint(20, 120), rng), rng.randint(60, 160)) for _ in range(LONG)
    ]
    large = [
        Request(random_prompt(rng.randint(600, 1000), rng), rng.randint(20, 60))
        for _ in range(LARGE)
    ]
    return many + long + large


@pytest.fixture(scope="module")
def stock(
    model: Path, mixed: list[Request], tmp_path_factory: pytest.TempPathFactory
) -> list[list[int]]:
    """What stock SGLang makes of all requests, with room for all and the plugin installed."""
    folder = tmp_path_factory.mktemp("stock")
    return schedule(model, mixed, [("run", 0, len(mixed))], folder).tokens


@pytest.fixture(scope="module")
def elastic(
    model: Path, mixed: list[Request], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Scheduled]:
    """Runs a case, once. SGLang adds up its pages after every batch, not only when it is idle."""
    done: dict[str, Scheduled] = {}

    def run(name: str) -> Scheduled:
        if name not in done:
            case, folder = CASES[name], tmp_path_factory.mktemp("elastic")
            env = {
                **elastic_env(folder / "ledger"),
                "KVCACHED_EXTENT": f"{EXTENT_BYTES}",
                "KVCACHED_DECAY": f"{DECAY_S}",
                "KVCACHED_CACHE_TTL": f"{CACHE_TTL_S}",
                "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
            }
            env |= case.env
            if case.small_budget:
                env["KVCACHED_BUDGET"] = f"{BUDGET_BYTES}"
            done[name] = schedule(model, mixed, case.script, folder, env=env, **case.arguments)
        return done[name]

    return run


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_stock_sglang(
    name: str, elastic: Callable[[str], Scheduled], stock: list[list[int]]
) -> None:
    run = elastic(name)

    _, first, last = CASES[name].script[0]
    assert run.tokens == stock[first:last]


@pytest.mark.parametrize("name", CASES)
def test_memory_rises_under_load_and_falls_to_one_extent(
    name: str, elastic: Callable[[str], Scheduled]
) -> None:
    served, idle = elastic(name).phases

    assert served["peak_bytes"] > 4 * EXTENT_BYTES
    assert 0 < idle["end_bytes"] <= EXTENT_BYTES
    assert idle["state"]["kvcached"]["committed_bytes"] <= EXTENT_BYTES


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.small_budget])
def test_a_small_budget_is_kept_and_makes_requests_wait(
    name: str, elastic: Callable[[str], Scheduled]
) -> None:
    served, _ = elastic(name).phases

    assert BUDGET_BYTES // 2 < served["peak_bytes"] <= BUDGET_BYTES
    assert served["most_waiting"] > 0


@pytest.mark.parametrize("name", ["retraction", "retraction, pages of 16"])
def test_requests_are_retracted_when_the_budget_is_short(
    name: str, elastic: Callable[[str], Scheduled]
) -> None:
    assert elastic(name).phases[0]["counts"]["retractions"] > 0


@pytest.mark.parametrize("name", [name for name in CASES if "rival" in name])
def test_a_half_read_prompt_waits_for_the_memory_that_a_neighbour_took(
    name: str, elastic: Callable[[str], Scheduled]
) -> None:
    assert elastic(name).phases[0]["counts"]["left_out"] > 0
