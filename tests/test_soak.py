"""What a soak calls growth of an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from integration.engine import Server
from integration.places import Life

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
    assert live(600).grown(SPARE) == []


def test_descriptors_that_leak_are_seen_in_any_life() -> None:
    (found,) = live(60, descriptors=lambda second: 100 + second // 2).grown(SPARE)
    assert found.startswith("descriptors")


def test_memory_that_leaks_is_seen_once_an_engine_is_warm() -> None:
    def leaking(second: int) -> float:
        return 700 + 20 * second / 60

    assert live(1200, leaking).grown(SPARE) == []
    (found,) = live(3600, leaking).grown(SPARE)
    assert found.startswith("memory_mib VLLM::Worker")
