"""Driver calls of a running engine fail, and another process stops with the ledger's lock held.

The engine serves or queues; its tokens are those of stock vLLM; the kernel never counts more memory
than the ledger; and when the faults end, all memory comes back.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import httpx
import pytest

from integration.conftest import BUDGET_BYTES, EXTENT_BYTES, elastic_env
from integration.engine import MIB, ArenaFiles, Request, Server, needs_vllm, wait_until
from integration.test_vllm_memory import burst, sampled
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.records import AccountView

pytestmark = [pytest.mark.engine, needs_vllm]

REPEATED = ("create", "map", "allow", "unmap", "release", "memory")
"""All calls of a running engine; it reserves addresses only once, when it starts."""

AT_ONCE_S = 0.002
"""A reading that took longer is of no one moment."""


class Patient:
    """A server whose driver can be made to fail, and what is known of it."""

    def __init__(self, server: Server, folder: Path, faults: Path) -> None:
        self.server = server
        self.folder = folder
        self._faults = faults
        self._plans = itertools.count()
        self.ledger = Ledger.open(folder, "host")
        self._files = ArenaFiles(server.process.pid)

    def fail(
        self, *kinds: str, share: float = 1.0, times: int | None = None, taken: bool = False
    ) -> None:
        plan = self._faults / f"plan-{next(self._plans)}"
        how = {"kinds": kinds, "share": share, "times": times, "taken": taken}
        plan.write_text(json.dumps(how))
        (self._faults / "failed").write_text("")
        plan.rename(self._faults / "plan.json")

    def heal(self) -> Counter[str]:
        """What has failed meanwhile."""
        failed = self.failed()
        self.fail()
        return failed

    def failed(self) -> Counter[str]:
        return Counter((self._faults / "failed").read_text().split())

    def accounts(self) -> list[AccountView]:
        return list(self.ledger.snapshot().accounts)

    def uncounted_bytes(self) -> int:
        """How much more the kernel has than the ledger knows of; it is to be 0 at any time."""
        began = time.monotonic()
        before = self.ledger.snapshot().used_bytes
        in_kernel = self._files.size_bytes()
        after = self.ledger.snapshot().used_bytes
        assert max(before, in_kernel, after) > 0, "nothing was looked at"
        at_once = time.monotonic() - began < AT_ONCE_S
        return max(0, in_kernel - max(before, after)) if at_once else 0

    def is_at_rest(self) -> bool:
        """One account, which says what the kernel says, and that is one extent at most."""
        accounts = self.accounts()
        return (
            len(accounts) == 1
            and self._files.size_bytes() <= accounts[0].committed_bytes <= EXTENT_BYTES
            and accounts[0].reserved_bytes == 0
        )


@pytest.fixture(scope="module")
def patient(
    plugin: None, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Patient]:
    folder = tmp_path_factory.mktemp("faults")
    faults = folder / "faults"
    faults.mkdir()
    hook = Path(__file__).parent / "faults"
    paths = [str(hook), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        **elastic_env(folder / "ledger"),
        "PYTHONPATH": os.pathsep.join(paths),
        "KVC_TEST_FAULTS": str(faults),
        "KVCACHED_NAME": "patient",
        "KVCACHED_BUDGET": f"{BUDGET_BYTES // MIB}MiB",
        "KVCACHED_EXTENT": f"{EXTENT_BYTES // MIB}MiB",
        "KVCACHED_DECAY": "0",
        "KVCACHED_CACHE_TTL": "0.3",
    }
    server = Server(model, folder / "log", env=env)
    try:
        server.wait_ready()
        yield Patient(server, folder / "ledger", faults)
    finally:
        server.stop()


def test_the_hook_is_in_the_engine(patient: Patient) -> None:
    patient.fail("create", times=1)
    patient.server.complete_all(burst(2, seed=30))
    assert patient.heal() == {"create": 1}


@pytest.mark.parametrize("kind", REPEATED)
def test_one_call_fails(
    kind: str, patient: Patient, requests: list[Request], reference: list[list[int]]
) -> None:
    patient.fail(kind, times=1)
    with sampled(patient.uncounted_bytes, 0.005) as uncounted:
        answers = patient.server.complete_all(requests[:6])

    assert patient.heal()[kind] <= 2  # the engine core asks for free memory too
    assert answers == reference[:6]
    assert max(uncounted) == 0
    assert wait_until(patient.is_at_rest, 5.0, 0.02), patient.accounts()


@pytest.mark.parametrize("kind", REPEATED)
def test_all_calls_fail_for_a_while(
    kind: str, patient: Patient, requests: list[Request], reference: list[list[int]]
) -> None:
    some = slice(10, 22)
    patient.fail(kind)
    with (
        ThreadPoolExecutor(1) as threads,
        sampled(patient.uncounted_bytes, 0.005) as uncounted,
    ):
        serving = threads.submit(patient.server.complete_all, requests[some])
        assert wait_until(lambda: patient.failed()[kind] > 0, 20)
        time.sleep(1.0)
        queues = not serving.done()
        failed = patient.heal()
        answers = serving.result(60)

    assert set(failed) == {kind}
    assert queues or kind == "unmap", "what cannot be given back is in nobody's way"
    assert answers == reference[some]
    assert max(uncounted) == 0
    assert wait_until(patient.is_at_rest, 5.0, 0.02), patient.accounts()


def test_what_cannot_be_unmapped_is_seen_and_comes_back(patient: Patient) -> None:
    patient.server.complete_all(burst(8, seed=31))
    patient.fail("unmap")
    patient.server.complete_all(burst(8, seed=32))
    assert wait_until(
        lambda: "patient (not given back)" in {each.name for each in patient.accounts()}, 5.0
    )
    assert sum(each.committed_bytes for each in patient.accounts()) <= BUDGET_BYTES
    patient.heal()  # and no request comes that would make anybody try again
    assert wait_until(patient.is_at_rest, 5.0, 0.02), patient.accounts()


@pytest.mark.parametrize("share", [0.02, 0.06])
def test_calls_fail_at_random(
    share: float, patient: Patient, requests: list[Request], reference: list[list[int]]
) -> None:
    some = slice(30, 50)
    patient.fail(*REPEATED, share=share)
    with sampled(patient.uncounted_bytes, 0.005) as uncounted:
        answers = patient.server.complete_all(requests[some])

    failed = patient.heal()
    assert sum(failed.values()) >= 3
    assert len(failed) >= 2, failed
    assert answers == reference[some]
    assert max(uncounted) == 0
    assert wait_until(patient.is_at_rest, 5.0, 0.02), patient.accounts()


@pytest.mark.parametrize("who", ["a foreign process", "a neighbour in the ledger"])
def test_somebody_takes_everything_and_gives_it_back(
    who: str, patient: Patient, requests: list[Request], reference: list[list[int]]
) -> None:
    """Requests wait, as many as come; none fails, and none waits longer than it has to."""
    some = slice(80, 104)
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


def hold_the_lock(folder: Path) -> None:
    """Stop with the lock held, as an engine does that somebody stops at a bad moment."""
    ledger = Ledger.open(folder, "host")
    with ledger._writing:
        os.kill(os.getpid(), signal.SIGSTOP)


@contextlib.contextmanager
def stopped_holder(folder: Path) -> Iterator[int]:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=hold_the_lock, args=(folder,), daemon=True)
    process.start()
    assert process.pid is not None
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    try:
        yield process.pid
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.join(10)


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
