"""A worker over a driver that fails: steps wait, the ledger tells the truth, all comes back."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from faults import PAGE, FaultyDriver, at_random, every

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch

from kvcached_plugins.settings import Settings
from kvcached_plugins.shares import PLENTY_BYTES, FreeBytes
from kvcached_plugins.vllm import memory
from kvcached_plugins.vllm.geometry import ATTRIBUTE, Orders, Plan
from kvcached_plugins.vllm.memory import WorkerMemory
from kvcached_plugins.vllm.steward import Steward
from kvcached_plugins.vllm.worker import execute_model, sample_tokens
from kvcached_vmm.driver import DeviceMemory, Driver
from kvcached_vmm.errors import DriverError
from kvcached_vmm.host_driver import HostDriver
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import MIB

BLOCKS = 16
BUDGET = BLOCKS * PAGE
Worker = tuple[WorkerMemory, FaultyDriver]


@pytest.fixture
def worker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A worker with blocks and extents of a page each, when start-up is over."""
    driver = FaultyDriver(HostDriver(64 * MIB, granularity=PAGE))
    monkeypatch.setattr(memory, "device_driver", lambda _: driver)
    monkeypatch.setattr("kvcached_plugins.leftovers.RETRY_SECONDS", 0.02)
    made = make(folder)
    made.start()
    yield made, driver
    driver.heal()
    made.close()
    assert until(lambda: not driver.driver.allocated_bytes)  # type: ignore[attr-defined]


def make(folder: Path) -> WorkerMemory:
    tensor = SimpleNamespace(size=BUDGET, block_stride=PAGE, offset=0, layers=["0"])
    config = SimpleNamespace(num_blocks=BLOCKS, kv_cache_tensors=[tensor])
    setattr(config, ATTRIBUTE, Plan(blocks_per_extent=1))
    device = SimpleNamespace(device=torch.device("cpu"))
    variables = {"KVCACHED_DIR": str(folder), "KVCACHED_BUDGET": str(BUDGET)}
    return WorkerMemory(device, config, Settings.read(variables))


def step(
    number: int, blocks: list[int], release: tuple[int, ...] = (), commit: tuple[int, ...] = ()
) -> Any:
    """What the scheduler sends: a step that touches ``blocks`` first, gives ``release`` back and
    commits ``commit`` ahead of need."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(block_ids=(blocks,))],
        scheduled_cached_reqs=SimpleNamespace(new_block_ids=[]),
        **{ATTRIBUTE: Orders(number, release, commit)},
    )


def run(worker: WorkerMemory, output: Any) -> None:
    worker.before_step(output)
    worker.launch_is_over()


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def in_ledger(folder: Path) -> dict[str, int]:
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        return {each.name: each.committed_bytes for each in ledger.snapshot().accounts}


def test_what_cannot_be_unmapped_is_in_the_ledger_until_it_is(worker: Worker, folder: Path) -> None:
    made, driver = worker
    run(made, step(1, [1, 2, 3]))
    assert in_ledger(folder) == {}  # the engine core answers for what it ordered

    driver.fail(every("unmap"))
    run(made, step(2, [], release=(1, 2)))
    run(made, step(3, []))
    assert in_ledger(folder) == {"vllm (not given back)": 2 * PAGE}
    assert made.arena.committed == {0, 3}

    run(made, step(4, [1]))  # is used again as it is
    assert in_ledger(folder) == {"vllm (not given back)": PAGE}

    driver.heal()  # and nobody takes a step any more
    assert until(lambda: in_ledger(folder) == {})
    assert made.arena.committed_bytes == 3 * PAGE == driver.driver.allocated_bytes


class Device:
    """Sets marks that it passes when it is told to."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        assert self.done, "this would have waited for the device"


def test_orders_are_open_until_their_extents_are_released(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = worker
    run(made, step(1, [1, 2, 3]))
    assert made.open_step(release=True) == 2  # of step 2 the worker has not heard yet

    device = Device()
    monkeypatch.setattr(made._quarantine, "_mark", lambda: device)
    made.obey(Orders(2, (1,)))  # beside the launch of step 2, which somebody waits for
    run(made, step(2, [4], release=(2,)))
    assert made.open_step(release=True) == 2
    assert made.arena.committed == {0, 1, 2, 3, 4}

    device.done = True
    assert made.open_step(release=False) == 2
    assert made.open_step(release=True) == 3
    assert made.arena.committed == {0, 3, 4}


@pytest.mark.parametrize("samples", [True, False])
def test_what_need_not_hold_up_a_step_is_done_once_all_of_it_is_launched(
    worker: Worker, samples: bool
) -> None:
    """vLLM launches a prompt no faster than the device computes it: a commit before sampling would
    be in front of the first token."""
    made, _ = worker
    engine: Any = SimpleNamespace(kvcached=made)
    scheduled = step(1, [1], commit=(5,))
    execute_model(lambda *_: None if samples else "an output", engine, scheduled)
    if samples:
        assert made.arena.committed == {0, 1}
        sample_tokens(lambda *_: "an output", engine, None)
    assert made.arena.committed == {0, 1, 5}


def test_an_engine_core_in_the_process_says_when_that_is_done(worker: Worker) -> None:
    made, _ = worker
    made.is_led = True
    engine: Any = SimpleNamespace(kvcached=made)
    for number in (1, 2, 3):
        execute_model(lambda *_: None, engine, step(number, [number], release=(number - 1,)))
        sample_tokens(lambda *_: "an output", engine, None)
    assert made.arena.committed == {0, 1, 2, 3}
    made.after_step()
    assert made.arena.committed == {3}
    assert made.obey(Orders(3, ())).done_step == 3


def test_a_step_after_which_nothing_was_sampled_is_settled_before_the_next(worker: Worker) -> None:
    made, _ = worker
    engine: Any = SimpleNamespace(kvcached=made)
    run(made, step(1, [1, 2]))
    for number in (2, 3, 4):
        execute_model(lambda *_: None, engine, step(number, [3], release=(number - 1,)))
    assert made.arena.committed == {0, 3}
    assert made.open_step(release=False) == 4


def test_a_ledger_that_is_full_learns_of_leftovers_when_it_is_not(
    worker: Worker, folder: Path
) -> None:
    made, driver = worker
    run(made, step(1, [1]))
    with contextlib.ExitStack() as crowd:
        for _ in range(256):
            ledger = crowd.enter_context(contextlib.closing(Ledger.open(folder, "host")))
            ledger.join("engine", BUDGET)
        driver.fail(every("unmap"))
        run(made, step(2, [], release=(1,)))
        run(made, step(3, []))
        assert "vllm (not given back)" not in in_ledger(folder)
    assert until(lambda: in_ledger(folder) == {"vllm (not given back)": PAGE})


@pytest.mark.parametrize("kind", ["create", "map", "allow", "release"])
def test_a_step_waits_while_a_call_fails_and_holds_no_more_than_it_needs(
    worker: Worker, kind: str
) -> None:
    made, driver = worker
    host = driver.driver
    assert isinstance(host, HostDriver)
    most = 0

    class Fault:
        """Fails for a while; looks at what the driver holds."""

        until = time.monotonic() + 0.5

        def __call__(self, called: str, number: int) -> bool:
            nonlocal most
            most = max(most, host.allocated_bytes)
            return called == kind and time.monotonic() < self.until

    driver.fail(Fault())
    began = time.monotonic()
    run(made, step(1, [1, 2]))
    assert time.monotonic() - began > 0.3
    assert len(driver.failed) >= 3
    assert most <= 3 * PAGE, "every attempt left something behind"
    assert made.arena.committed == {0, 1, 2}
    assert until(lambda: host.allocated_bytes == 3 * PAGE)


def test_a_start_over_a_driver_that_fails_counts_each_byte_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FaultyDriver(HostDriver(64 * MIB, granularity=PAGE))
    monkeypatch.setattr(memory, "device_driver", lambda _: driver)
    driver.fail(lambda kind, number: kind == "create" and len(driver.failed) < 2 * BLOCKS)
    made = make(folder)
    assert len(driver.failed) == 2 * BLOCKS
    assert in_ledger(folder) == {"vllm (starting)": PAGE}
    driver.heal()
    made.start()
    made.close()


@pytest.mark.parametrize("seed", range(4))
def test_random_faults_of_all_kinds_leave_nothing_behind(
    worker: Worker, folder: Path, seed: int
) -> None:
    made, driver = worker
    kinds = ("create", "map", "allow", "unmap", "release")
    driver.fail(at_random(seed, 0.3, kinds))
    for number in range(1, 30):
        run(made, step(number, [number % 15 + 1], release=((number - 3) % 15 + 1,)))
        committed = made.arena.committed
        assert number % 15 + 1 in committed
        kept = sum(in_ledger(folder).values())
        assert driver.driver.allocated_bytes <= len(committed) * PAGE + kept
    assert driver.failed
    driver.heal()
    assert until(lambda: made.arena.kept_bytes == 0)
    made.arena.check()
    assert driver.driver.allocated_bytes == len(made.arena.committed) * PAGE
    assert in_ledger(folder) == {}


def test_an_engine_that_ends_while_the_driver_fails_does_not_fail(worker: Worker) -> None:
    made, driver = worker
    run(made, step(1, [1]))
    driver.fail(every("unmap"))
    made.close()
    driver.heal()
    assert until(lambda: not driver.driver.allocated_bytes)


def test_when_free_memory_cannot_be_asked_for_none_is_granted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvcached_plugins.shares.FRESH_SECONDS", 0.0)
    driver = HostDriver(PAGE)
    free = FreeBytes(driver)
    assert free() == PAGE

    def fails(_: object) -> None:
        raise DriverError("memory", "a fault made on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(HostDriver, "memory", fails)
        assert [free(), free()] == [0, 0]
    assert free() == PAGE
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("free_bytes", "asked"), [(PLENTY_BYTES, 2), (PLENTY_BYTES + 1, 1)])
def test_a_driver_that_has_plenty_is_asked_less_often(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, asked: int
) -> None:
    monkeypatch.setattr("kvcached_plugins.shares.FRESH_SECONDS", 0.0)
    monkeypatch.setattr("kvcached_plugins.shares.PLENTY_FRESH_SECONDS", 3600.0)
    answers: list[int] = []

    class Roomy:
        def memory(self) -> DeviceMemory:
            answers.append(free_bytes)
            return DeviceMemory(free_bytes, free_bytes)

    free = FreeBytes(cast(Driver, Roomy()))
    assert [free(), free()] == [free_bytes, free_bytes]
    assert len(answers) == asked


def test_a_host_that_has_no_file_left_to_ask_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("psutil.virtual_memory", exhausted)
    with pytest.raises(DriverError, match="Too many open files"):
        HostDriver().memory()


def test_the_queue_may_grow_while_it_is_counted() -> None:
    """The reclaimer thread counts; the engine's main thread adds requests."""
    waiting: deque[Any] = deque()

    class Arriving:
        @property
        def num_tokens(self) -> int:
            waiting.append(self)
            return 1

    waiting.extend([Arriving(), Arriving()])
    steward = SimpleNamespace(
        _scheduler=SimpleNamespace(max_num_running_reqs=8, running=[], waiting=waiting),
        _block_tokens=1,
        pool=SimpleNamespace(extents=SimpleNamespace(block_bytes=PAGE)),
    )
    assert Steward._queued_bytes(steward) == 2 * PAGE  # type: ignore[arg-type]


def test_a_step_that_needs_much_gets_it_piece_by_piece_from_a_driver_that_often_fails(
    worker: Worker,
) -> None:
    """All at once would take some 3,000 attempts, and the engine would give up."""
    made, driver = worker
    driver.fail(at_random(1, 0.15, ("create", "map", "allow")))
    began = time.monotonic()
    run(made, step(1, list(range(1, 16))))
    assert made.arena.committed == set(range(16))
    assert time.monotonic() - began < 10
