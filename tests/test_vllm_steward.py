"""An engine that rests, over a device that takes its time: neighbours get its cache soon."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
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
from kvcached_plugins.tenant import LOOK_SECONDS
from kvcached_plugins.vllm import memory, steward
from kvcached_plugins.vllm.geometry import ATTRIBUTE, Plan
from kvcached_plugins.vllm.memory import WorkerMemory
from kvcached_plugins.vllm.pool import ElasticBlockPool
from kvcached_plugins.vllm.reclaimer import HEARTBEAT_SECONDS
from kvcached_plugins.vllm.steward import FIRST_TOKEN_SECONDS, PACE_SECONDS, QUIET_SECONDS, Steward
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
        scheduled_cached_reqs=SimpleNamespace(new_block_ids=[], num_output_tokens=[]),
    )


def next_token(known: int = 1) -> Any:
    """What it sends for a request that runs, and of which ``known`` tokens are the answer's."""
    return SimpleNamespace(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(new_block_ids=[None], num_output_tokens=[known]),
    )


def worker_of(engine: Steward) -> WorkerMemory:
    memory: WorkerMemory = engine._core.model_executor.driver_worker.worker.kvcached
    return memory


def launch(engine: Steward, step: Any) -> None:
    """Schedule a step, and send it to the device."""
    with engine.pool.lock:
        engine.launched(step)
    worker_of(engine).before_step(step)
    worker_of(engine).launch_is_over()


def a_prompt(engine: Steward) -> Any:
    """The step of a request whose block has been handed out."""
    with engine.pool.lock:
        engine.pool.prepare(1)
        [block] = engine.pool.take(1)
    return step_of([block.block_id])


def test_a_device_that_is_late_costs_neighbours_milliseconds(settings: Settings) -> None:
    """With events on a GPU that served a neighbour, this took until the next look, 50 ms later."""
    engine = start(settings)
    with engine.pool.lock:
        engine.pool.prepare(BLOCKS - 1)
        blocks = engine.pool.take(BLOCKS - 1)
        step = next_token()
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
    worker_of(engine).before_step(step)
    worker_of(engine).launch_is_over()
    assert not neighbour.others_wait()
    engine.stepped()  # at once, though a first token is being computed
    assert neighbour.others_wait()
    neighbour.close()
    engine.close()


@pytest.fixture
def reserving(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Steward]:
    """An engine that keeps two extents ready, and takes steps however long a test is held up."""
    monkeypatch.setattr(steward, "QUIET_SECONDS", 60.0)
    engine = start(replace(settings, reserve_bytes=2 * PAGE))
    monkeypatch.setattr(engine._scheduler, "has_requests", lambda: True)
    yield engine
    engine.close()


@pytest.mark.parametrize("in_parts", [False, True])
def test_nothing_that_can_wait_comes_before_a_first_token(
    reserving: Steward, in_parts: bool
) -> None:
    """vLLM tells what a step has computed once it has launched the next one. What was done after
    the prompt's launch held its token up for 0.4 ms, whether sampling had been launched or not."""
    prompt = a_prompt(reserving)
    launch(reserving, prompt)
    if in_parts:  # of a long prompt, the rest
        reserving.finished(prompt)
        prompt = next_token(known=0)
        launch(reserving, prompt)
    reserving.stepped()
    assert worker_of(reserving).arena.committed == {0, 1}

    launch(reserving, next_token())
    reserving.finished(prompt)
    reserving.stepped()
    assert worker_of(reserving).arena.committed == {0, 1, 2, 3}


def test_what_can_wait_is_not_done_after_every_step(reserving: Steward) -> None:
    """Where a step is bound by the processor, each microsecond of ours in it makes it longer."""
    prompt, before = a_prompt(reserving), next_token()
    launch(reserving, prompt)
    launch(reserving, before)
    reserving.finished(prompt)
    began = time.monotonic()
    reserving.stepped()
    arena = worker_of(reserving).arena
    assert arena.committed == {0, 1, 2, 3}

    a_prompt(reserving)
    while len(arena.committed) == 4:
        assert time.monotonic() - began < 5, "the reserve was not committed again"
        step = next_token()
        launch(reserving, step)
        reserving.finished(before)
        reserving.stepped()
        before = step
        time.sleep(0.001)
    assert time.monotonic() - began >= PACE_SECONDS


def test_an_engine_that_serves_is_not_woken_for_nothing(
    reserving: Steward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time, a launch in its main thread would have to wait for the interpreter."""
    launch(reserving, next_token())
    looks = []

    def look(heard: int) -> None:
        looks.append(heard)
        Steward.look(reserving, heard)

    monkeypatch.setattr(reserving, "look", look)
    time.sleep(2 * LOOK_SECONDS)
    looks.clear()
    time.sleep(4 * HEARTBEAT_SECONDS)
    assert 1 <= len(looks) <= 5


def test_an_engine_with_a_prompt_in_every_step_does_not_put_things_off_for_ever(
    reserving: Steward,
) -> None:
    before = a_prompt(reserving)
    launch(reserving, before)
    arena = worker_of(reserving).arena
    reserving.stepped()
    began = time.monotonic()
    while arena.committed != {0, 1, 2, 3}:
        assert time.monotonic() - began < 5, "nothing was committed ahead"
        step = step_of([])
        launch(reserving, step)
        reserving.finished(before)
        reserving.stepped()
        before = step
        time.sleep(0.005)
    assert time.monotonic() - began > 0.9 * FIRST_TOKEN_SECONDS


def test_an_engine_that_is_left_with_a_first_token_untold_serves_its_neighbours(
    settings: Settings,
) -> None:
    """Whoever uses an engine in process may stop between two steps."""
    engine = start(settings)
    with engine.pool.lock:
        engine.pool.prepare(BLOCKS - 1)
        blocks = engine.pool.take(BLOCKS - 1)
    launch(engine, step_of([block.block_id for block in blocks]))
    engine.stepped()
    engine.pool.keep(blocks)
    neighbour = Ledger.open(settings.directory, "host").join("neighbour", None)
    neighbour.report(0, 0, 2 * PAGE)
    began = time.monotonic()
    while not neighbour.reserve(2 * PAGE, 2 * PAGE):
        assert time.monotonic() - began < 5, "nothing was given back"
        time.sleep(0.005)
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
    worker = worker_of(engine)
    step = a_prompt(engine)
    launch(engine, step)
    engine.finished(step)
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
    engine.stepped()
    driver.heal()
    assert could == [False] * len(could)
    assert len(could) >= 1
    assert worker.arena.committed_bytes == engine.pool.committed_bytes
    engine.close()
