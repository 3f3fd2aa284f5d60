"""Driver calls of a running engine fail, and another process stops with the ledger's lock held.

The engine serves or queues; its tokens are those of stock vLLM; the kernel never counts more memory
than the ledger; and when the faults end, all memory comes back.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import httpx
import pytest

from integration.conftest import BUDGET_BYTES, EXTENT_BYTES
from integration.engine import Request, Server, needs_vllm, wait_until
from integration.patient import DriverFaults, Patient, patient_of, stopped_holder
from integration.sampling import sampled
from kvcached_vmm.ledger import Ledger

pytestmark = [pytest.mark.engine, needs_vllm]


@pytest.fixture(scope="module")
def patient(
    plugin: None, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Patient]:
    with patient_of(Server, model, tmp_path_factory.mktemp("faults")) as started:
        yield started


class TestDriverFaults(DriverFaults):
    """With vLLM."""


@pytest.mark.parametrize("who", ["a foreign process", "a neighbour in the ledger"])
def test_somebody_takes_everything_and_gives_it_back(
    who: str, patient: Patient, requests: list[Request], reference: list[list[int]]
) -> None:
    """Requests wait, as many as come; none fails, and none waits longer than it has to."""
    some = slice(80, 104)
    assert wait_until(patient.is_at_rest, 5.0, 0.02), patient.accounts()
    with (
        ThreadPoolExecutor(1) as threads,
        sampled(patient.uncounted_bytes, 0.005) as uncounted,
        contextlib.ExitStack() as taken,
    ):
        if who == "a foreign process":
            patient.fail(taken=True)
            taken.callback(patient.fail)
        else:
            ledger = taken.enter_context(contextlib.closing(Ledger.open(patient.folder, "host")))
            account = ledger.join("greedy", BUDGET_BYTES)
            granted = account.reserve(BUDGET_BYTES, EXTENT_BYTES)
            account.commit(granted, granted)
        serving = threads.submit(patient.server.complete_all, requests[some])
        time.sleep(2.0)
        waits = not serving.done()
        had = max(each.used_bytes for each in patient.accounts() if each.name == "patient")
        taken.close()
        began = time.monotonic()
        answers = serving.result(90)
        took_s = time.monotonic() - began

    assert waits
    assert had <= EXTENT_BYTES
    assert answers == reference[some]
    assert max(uncounted) == 0
    assert took_s < 60
    assert wait_until(patient.is_at_rest, 5.0, 0.02), patient.accounts()


@pytest.mark.long
def test_maxima_from_one_request_upwards(
    patient: Patient, requests: list[Request], reference: list[list[int]]
) -> None:
    """The longest request alone needs 9 MiB in extents of 2; nobody fails at any maximum."""
    some = slice(104, 124)
    for extents in (5, 6, 8, 12, 24):
        (account,) = patient.accounts()
        patient.ledger.set_terms(account, maximum_bytes=extents * EXTENT_BYTES)
        with sampled(lambda: sum(each.used_bytes for each in patient.accounts()), 0.01) as used:
            answers = patient.server.complete_all(requests[some])
        assert answers == reference[some]
        assert max(used) <= extents * EXTENT_BYTES
        assert max(used) >= min(extents, 10) * EXTENT_BYTES * 0.8
    (account,) = patient.accounts()
    patient.ledger.set_terms(account, no_maximum=True)
    assert wait_until(patient.is_at_rest, 5.0, 0.02), patient.accounts()


def gaps(server: Server, tokens: int) -> list[float]:
    """Seconds between the tokens of one short request, which are the engine's steps."""
    body = {
        "model": "model",
        "prompt": [5, 6, 7],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    times = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
    return [after - before for before, after in itertools.pairwise(times)]


def test_a_neighbour_that_stops_with_the_lock_held_costs_others_nothing(
    patient: Patient, requests: list[Request], reference: list[list[int]]
) -> None:
    server = patient.server
    before = gaps(server, 100)
    with stopped_holder(patient.folder):
        began = time.monotonic()
        during: list[float] = []
        while time.monotonic() - began < 2.5:
            during += gaps(server, 100)
        # Prompts that need more memory than the engine has: they wait, and nothing breaks.
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(server.complete_all, requests[70:80])
            time.sleep(max(0.0, 5.0 - (time.monotonic() - began)))
            patient.accounts()
            stopped_s = time.monotonic() - began
            still_waits = not waiting.done()
            os.kill(_only_child(), signal.SIGCONT)
            answers = waiting.result(60)

    assert stopped_s >= 5.0
    assert still_waits
    assert answers == reference[70:80]
    assert median(during) < median(before) + 0.05
    assert max(during) < max(before) + 0.25, "a machine with two cores has hiccups of its own"
    assert "does not let go of the ledger" in str(server)
    assert wait_until(patient.is_at_rest, 5.0, 0.02), patient.accounts()


def _only_child() -> int:
    return next(child.pid for child in multiprocessing.active_children() if child.pid)
