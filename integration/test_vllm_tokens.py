"""The same greedy tokens as stock vLLM, whatever the scheduler does with the blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from integration.conftest import Pair
from integration.engine import MIB, Request, generate, needs_vllm, tail

pytestmark = [pytest.mark.engine, needs_vllm]

CASES: dict[str, dict[str, Any]] = {
    "prefix caching and small chunks": {
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 256,
    },
    "no prefix caching": {"enable_prefix_caching": False},
}


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


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_stock_vllm(
    case: str,
    model: Path,
    requests: list[Request],
    reference: list[list[int]],
    elastic_env: dict[str, str],
    tmp_path: Path,
) -> None:
    elastic = generate(model, requests, tmp_path, env=elastic_env, **CASES[case])

    assert elastic.peak_bytes > 0, f"no elastic KV range was seen; {tail(tmp_path / 'log')}"
    assert differences(requests, elastic.tokens, reference) == []


@pytest.mark.parametrize("caching", [False, True], ids=["plain", "prefix caching"])
def test_tokens_survive_preemption(
    caching: bool,
    model: Path,
    requests: list[Request],
    reference: list[list[int]],
    elastic_env: dict[str, str],
    tmp_path: Path,
) -> None:
    budget_bytes = 16 * MIB
    env = {**elastic_env, "KVCACHED_BUDGET": "16MiB", "KVCACHED_EXTENT": "1MiB"}

    elastic = generate(model, requests, tmp_path, env=env, enable_prefix_caching=caching)

    assert elastic.preemptions > 0
    assert 0 < elastic.peak_bytes <= budget_bytes
    assert differences(requests, elastic.tokens, reference) == []


def test_tokens_with_two_tensor_parallel_workers(
    model: Path,
    requests: list[Request],
    reference: list[list[int]],
    elastic_env: dict[str, str],
    tmp_path: Path,
) -> None:
    """In float32 stock vLLM gives the same tokens with one worker and with two."""
    some, expected = requests[-12:], reference[-12:]

    elastic = generate(model, some, tmp_path, env=elastic_env, tensor_parallel_size=2)

    assert elastic.peak_bytes > 0, tail(tmp_path / "log")
    assert differences(some, elastic.tokens, expected) == []


def test_tokens_over_http_with_both_servers_busy(
    pair: Pair, requests: list[Request], reference: list[list[int]]
) -> None:
    some, expected = requests[-40:], reference[-40:]
    for server in (pair.plain, pair.caching):
        assert differences(some, server.complete_all(some), expected) == []
