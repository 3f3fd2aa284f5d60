"""An engine that rests, over a device that takes its time: neighbours get its cache soon."""

from __future__ import annotations

import functools
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faults import PAGE, FaultyDriver

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch

from integration.benchmarks.first_prompt import Late
from integration.benchmarks.step import UniProcExecutor
from kvcached_plugins.settings import Settings
from kvcached_plugins.vllm import memory
from kvcached_plugins.vllm.geometry import ATTRIBUTE, Plan
from kvcached_plugins.vllm.memory import WorkerMemory
from kvcached_plugins.vllm.pool import ElasticBlockPool
from kvcached_plugins.vllm.steward import QUIET_SECONDS, Steward
from kvcached_vmm.host_driver import HostDriver
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import MIB

BLOCKS = 16
BUDGET = BLOCKS * PAGE


@pytest.fixture
def settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    driver = HostDriver(64 * MIB, granularity=PAGE)
    monkeypatch.setattr(memory, "device_driver", lambda _: driver)
    monkeypatch.setattr(memory, "Passed", functools.partial(Late, 0.003))
    return Settings.read({"KVCACHED_DIR": str(folder), "KVCACHED_BUDGET": str(BUDGET)})


def start(settings: Settings) -> Steward:
    """An engine whose worker is in this process, with blocks and extents of a page each."""
    tensor = SimpleNamespace(size=BUDGET, block_stride=PAGE, offset=0, layers=["0"])
    config: Any = SimpleNamespace(num_blocks=BLOCKS, kv_cache_tensors=[tensor])
    setattr(config, ATTRIBUTE, Plan(blocks_per_extent=1))
    worker: Any = SimpleNamespace(device=torch.device("cpu"))
    worker.kvcached = WorkerMemory(worker, config, settings)
    names = SimpleNamespace(served_model_name="resting", model="resting")
    cache = SimpleNamespace(block_size=16, enable_prefix_caching=True)
    core = SimpleNamespace(
        vllm_config=SimpleNamespace(model_config=names, cache_config=cache),
        model_executor=UniProcExecutor(worker),
    )
    scheduler = SimpleNamespace(
        kv_cache_config=config,
        kv_cache_manager=SimpleNamespace(block_pool=ElasticBlockPool(BLOCKS, True, 16)),
        has_requests=lambda: False,
        max_num_running_reqs=1,
        running=[],
        waiting=[],
    )
    return Steward(core, scheduler, settings)


def step_of(blocks: list[int]) -> Any:
    """What the scheduler sends for one new request."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(block_ids=(blocks,))],
        scheduled_cached_reqs=SimpleNamespace(new_block_ids=[]),
    )


def test_a_device_that_is_late_costs_neighbours_milliseconds(settings: Settings) -> None:
    """With events on a GPU that served a neighbour, this took until the next look, 50 ms later."""
    engine = start(settings)
    with engine.pool.lock:
        engine.pool.prepare(BLOCKS - 1)
        blocks = engine.pool.take(BLOCKS - 1)
        step: Any = SimpleNamespace()
        engine.launched(step)
    engine.pool.keep(blocks)
    engine.finished(step)
    time.sleep(QUIET_SECONDS)
    neighbour = Ledger.open(settings.directory, "host").join("neighbour", None)
    waits = []
    for _ in range(5):
        began = time.monotonic()
        neighbour.report(0, 0, 2 * PAGE)
        while not (granted := neighbour.reserve(2 * PAGE, 2 * PAGE)):
            assert time.monotonic() - began < 5, "nothing was given back"
            time.sleep(0.0005)
        waits.append(time.monotonic() - began)
        neighbour.commit(granted, granted)
        neighbour.report(2 * PAGE, 0)
    assert sorted(waits)[2] < 0.03
    neighbour.close()
    engine.close()


def test_others_are_told_what_is_wanted_once_the_step_is_launched(settings: Settings) -> None:
    """Telling them takes up to 0.4 ms beside a GPU, which a first token would wait for."""
    engine = start(settings)
    neighbour = Ledger.open(settings.directory, "host").join("neighbour", None)
    rest = neighbour.reserve(BUDGET, PAGE)
    neighbour.commit(rest, rest)
    step = step_of([])
    with engine.pool.lock:
        engine.pool.prepare(3)
        engine.launched(step)
    worker = engine._core.model_executor.driver_worker.worker.kvcached
    worker.before_step(step)
    assert not neighbour.others_wait()
    worker.after_step()
    assert neighbour.others_wait()
    neighbour.close()
    engine.close()


def test_what_is_committed_ahead_cannot_be_given_back_at_the_same_moment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have its memory after it was given back, and no ledger would know."""
    driver = FaultyDriver(HostDriver(64 * MIB, granularity=PAGE))
    monkeypatch.setattr(memory, "device_driver", lambda _: driver)
    variables = {"KVCACHED_DIR": str(folder), "KVCACHED_BUDGET": str(BUDGET)}
    engine = start(Settings.read(variables | {"KVCACHED_RESERVE": str(2 * PAGE)}))
    worker = engine._core.model_executor.driver_worker.worker.kvcached
    with engine.pool.lock:
        engine.pool.prepare(1)
        [block] = engine.pool.take(1)
        step = step_of([block.block_id])
        engine.launched(step)
    worker.before_step(step)
    could: list[bool] = []

    def give_back() -> None:
        could.append(engine.pool.lock.acquire(timeout=0.05))

    def beside(kind: str, number: int) -> bool:
        if kind == "create":
            other = threading.Thread(target=give_back)
            other.start()
            other.join()
        return False

    driver.fail(beside)
    worker.after_step()
    driver.heal()
    assert could == [False] * len(could)
    assert len(could) >= 1
    assert worker.arena.committed_bytes == engine.pool.committed_bytes
    engine.close()
