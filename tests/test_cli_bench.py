"""`kvcached bench`: what is measured, that all of it is given back, and the advice."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from faults import FaultyDriver, every, nth_call

from kvcached_plugins import bench
from kvcached_plugins.bench import CALLS, Costs, Link
from kvcached_vmm.errors import DriverError
from kvcached_vmm.host_driver import HostDriver
from kvcached_vmm.units import GIB, KIB, MIB


class Gpu(HostDriver):
    """Host memory with the granularity of a GPU, which says it is one."""

    device = "GPU-1"  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(64 * MIB, 2 * MIB)


def test_every_call_is_made_for_every_extent_and_nothing_is_left() -> None:
    driver = FaultyDriver(Gpu())
    costs = bench.measure_size(driver, 4 * MIB, 16 * MIB)
    assert (costs.extents, costs.size_bytes) == (4, 16 * MIB)
    assert driver.calls == [
        *("reserve", *("create", "map", "allow") * 4, *("unmap", "release") * 4, "free"),
    ]
    assert set(costs.calls_s) == set(CALLS)
    assert all(value > 0 for value in costs.calls_s.values())
    assert costs.commit_s > 0 < costs.return_s
    assert (driver.reserved, driver.mapped, driver.handles) == ({}, {}, set())


def test_sizes_that_do_not_fit_are_left_out() -> None:
    costs = bench.measure(Gpu(), bench.CUDA_EXTENTS, GIB)
    assert [each.extent_bytes for each in costs] == [2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB]
    with pytest.raises(bench.BenchError, match=r"Too little memory is free.* 1 MiB may be used"):
        bench.measure(Gpu(), bench.CUDA_EXTENTS, MIB)


@pytest.mark.parametrize("call", ["reserve", "create", "map", "allow"])
@pytest.mark.parametrize("number", [1, 7])
def test_a_call_that_fails_leaves_nothing_behind(call: str, number: int) -> None:
    driver = FaultyDriver(Gpu())
    driver.fail(lambda kind, at: kind == call and at >= (number if call != "reserve" else 1))
    with pytest.raises(DriverError):
        bench.measure_size(driver, 2 * MIB, 16 * MIB)
    assert (driver.reserved, driver.mapped, driver.handles) == ({}, {}, set())


@pytest.mark.parametrize("fault", [every("unmap"), nth_call(9)])
def test_a_release_that_fails_is_reported(fault: Any) -> None:
    driver = FaultyDriver(Gpu())
    driver.fail(fault)
    with pytest.raises(DriverError):
        bench.measure_size(driver, 8 * MIB, 16 * MIB)


def costs(extent_bytes: int, s_per_gib: float) -> Costs:
    return Costs(extent_bytes, GIB // extent_bytes, 0, {}, s_per_gib, 0, 0)


def test_the_smallest_extent_that_is_nearly_the_cheapest_is_advised() -> None:
    found = [costs(2 * MIB, 10), costs(8 * MIB, 2.9), costs(32 * MIB, 2.1), costs(128 * MIB, 2)]
    assert bench.best_extent(found) == 8 * MIB
    assert bench.best_extent(found[:1]) == 2 * MIB


@pytest.mark.parametrize(
    ("rate", "flop_per_s", "verdicts"),
    [
        (55e9, 700e12, ["would pay"]),
        (4e9, 700e12, ["would gain little", "link is slow (4.0 GB/s"]),
        (1e9, 700e12, ["would not pay", "link is slow (1.0 GB/s"]),
    ],
)
def test_offloading_is_advised_by_the_link(
    rate: float, flop_per_s: float, verdicts: list[str]
) -> None:
    first, *rest = bench.offload_advice(Link(rate, rate, flop_per_s))
    assert f"takes {131072000 / rate * 1e3:.1f} ms" in first
    assert "takes about 46 ms" in first
    assert len(rest) == len(verdicts)
    assert all(verdict in sentence for verdict, sentence in zip(verdicts, rest, strict=True))


def test_this_machine_is_measured(kvcached: Callable[..., Any]) -> None:
    ran = kvcached("bench", "--device", "host", "--size", "16MiB")
    assert ran.status == 0
    assert [line.split()[0] for line in ran.out.splitlines()[3:8]] == [
        *("64K", "256K", "1M", "4M", "16M"),
    ]
    assert all(len(line) <= 80 for line in ran.out.splitlines())
    assert "First use of 1 GiB" in ran.out
    assert "KVCACHED_EXTENT" in ran.out
    assert "GB/s" not in ran.out, "there is no link"


def test_json_has_bytes_and_seconds(kvcached: Callable[..., Any]) -> None:
    ran = kvcached("bench", "--device", "host", "--size", "4MiB", "--json")
    found = json.loads(ran.out)
    assert (found["device"], found["link"]) == ("host", None)
    assert found["extents"][0]["extent_bytes"] == 64 * KIB
    assert set(found["extents"][0]["calls_s"]) == set(CALLS)
    assert found["advised_extent_bytes"] in {each["extent_bytes"] for each in found["extents"]}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--device", "gpu"], "--device: 'gpu' is none of host, cuda, cuda:0, cuda:1"),
        (["--device", "cuda:x"], "--device: 'cuda:x' is none of"),
        (["--size", "big"], "--size: 'big' is not a size"),
        (["--device", "host", "--size", "0"], "Too little memory is free"),
    ],
)
def test_a_mistake_is_one_sentence(
    kvcached: Callable[..., Any], arguments: list[str], complaint: str
) -> None:
    ran = kvcached("bench", *arguments)
    assert (ran.status, ran.out) == (2, "")
    assert complaint in ran.err
