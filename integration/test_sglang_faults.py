"""Driver calls of a running SGLang fail, and another process stops with the ledger's lock held.

The engine serves or queues; its tokens are those of stock SGLang; the kernel never counts more
memory than the ledger; and when the faults end, all memory comes back.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from integration.engine import Request, wait_until
from integration.patient import DriverFaults, Patient, patient_of, stopped_holder
from integration.sglang_engine import SGLangServer, needs_sglang, schedule

pytestmark = [pytest.mark.engine, needs_sglang]

MANY = 50
"""Of the requests that all engines' tests share, those that are sent here."""


@pytest.fixture(scope="module")
def reference(
    model: Path, requests: list[Request], tmp_path_factory: pytest.TempPathFactory
) -> list[list[int]]:
    """What stock SGLang makes of the requests, with room for all."""
    folder = tmp_path_factory.mktemp("stock")
    return schedule(model, requests[:MANY], [("run", 0, MANY)], folder).tokens


@pytest.fixture(scope="module")
def patient(
    reference: list[list[int]], model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Patient]:
    with patient_of(SGLangServer, model, tmp_path_factory.mktemp("faults")) as started:
        yield started


class TestDriverFaults(DriverFaults):
    """With SGLang."""


def test_requests_wait_while_a_neighbour_stops_with_the_lock_held(
    patient: Patient, requests: list[Request], reference: list[list[int]]
) -> None:
    some = slice(22, 30)
    with stopped_holder(patient.folder) as holder, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(patient.server.complete_all, requests[some])
        time.sleep(3.0)
        waited = not waiting.done()
        os.kill(holder, signal.SIGCONT)
        answers = waiting.result(60)

    assert waited, "they need more than the one extent that the engine has"
    assert answers == reference[some]
    assert "does not let go of the ledger" in str(patient.server)
    assert wait_until(patient.is_at_rest, 5.0, 0.02), patient.accounts()
