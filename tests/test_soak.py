"""What a soak calls growth: of each engine's own life, beyond what stock's processes do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

from integration.engine import Server
from integration.places import Life, growth

SPARE = {"descriptors": 10, "threads": 4}


def live(
    seconds: int,
    memory_mib: Callable[[int], float] = lambda _: 700.0,
    descriptors: Callable[[int], int] = lambda _: 100,
) -> Life:
    """A life of so many seconds; functions of the second say what its worker holds."""
    life = Life(cast(Server, None))
    life.samples = [
        {"memory_mib VLLM::Worker": memory_mib(second), "descriptors": descriptors(second)}
        for second in range(seconds)
    ]
    return life


def test_an_engine_that_holds_what_it_held_has_not_grown() -> None:
    assert live(600).grown(SPARE, {}) == []


def test_descriptors_that_leak_are_seen_in_any_life() -> None:
    (found,) = live(60, descriptors=lambda second: 100 + second // 2).grown(SPARE, {})
    assert found.startswith("descriptors")


def test_memory_that_leaks_is_seen_once_an_engine_is_warm() -> None:
    def leaking(second: int) -> float:
        return 700 + 20 * second / 60

    assert live(200, leaking).grown(SPARE, {}) == []
    (found,) = live(1200, leaking).grown(SPARE, {})
    assert found.startswith("memory_mib VLLM::Worker")


def test_growth_that_stock_has_as_well_is_not_ours() -> None:
    def growing(second: int) -> float:
        return 700 + 32 * second / 60

    assert live(3600, growing).grown(SPARE, {"memory_mib VLLM::Worker": 33.0}) == []
    assert live(3600, growing).grown(SPARE, {"memory_mib VLLM::Worker": 20.0})


def test_a_report_says_by_how_much_its_longest_life_grew_in_a_minute(tmp_path: Path) -> None:
    lives = [
        {"minutes": 2.0, "first": {"descriptors": 1}, "last": {"descriptors": 9}},
        {"minutes": 10.0, "first": {"descriptors": 100}, "last": {"descriptors": 110}},
    ]
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"findings": {"lives": lives}}))
    assert growth(report) == {"descriptors": 2.0}
