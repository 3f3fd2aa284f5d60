"""A short soak: `python -m integration.soak` runs for as long as it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.engine import Request, needs_vllm
from integration.soak import Setup, soaking

pytestmark = [pytest.mark.engine, needs_vllm]


@pytest.mark.long
def test_a_short_soak_finds_nothing(
    plugin: None,
    model: Path,
    requests: list[Request],
    reference: list[list[int]],
    tmp_path: Path,
) -> None:
    setup = Setup(minutes=0.4, seed=1)
    with soaking(setup, model, requests, reference, tmp_path) as soak:
        found = soak.run()

    assert found.failures() == {}
    assert found.completed > 20
    assert found.cut_off > 0
    assert found.prefix_hits > 0
    assert found.mishaps["limits_moved"] > 5
    assert sum(found.mishaps["neighbours"].values()) > 1
    assert found.looks > 100
