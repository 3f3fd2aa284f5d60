"""A short soak: `python -m integration.soak` runs for as long as it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.engine import Request, needs_vllm
from integration.soak import soaking

pytestmark = [pytest.mark.engine, needs_vllm]


def test_a_short_soak_finds_nothing(
    plugin: None,
    model: Path,
    requests: list[Request],
    reference: list[list[int]],
    tmp_path: Path,
) -> None:
    with soaking(model, requests, reference, tmp_path, engines=1, seed=1) as soak:
        found = soak.run(minutes=0.4)

    assert found.failures() == {}
    assert found.completed > 20
    assert found.cut_off > 0
    assert found.prefix_hits > 0
    assert found.limits_moved > 5
    assert sum(found.neighbours.values()) > 1
    assert found.looks > 100
