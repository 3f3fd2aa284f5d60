"""A server whose driver can be made to fail, and what must hold meanwhile, whatever the engine."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from integration.conftest import BUDGET_BYTES, EXTENT_BYTES, elastic_env, random_prompt
from integration.engine import MIB, ArenaFiles, Request, Server, wait_until
from integration.sampling import sampled
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.records import AccountView

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


def patient_env(folder: Path) -> dict[str, str]:
    """Variables of a server called "patient" whose calls fail as the plan in ``folder`` says."""
    faults = folder / "faults"
    faults.mkdir()
    paths = [str(Path(__file__).parent / "faults"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **elastic_env(folder / "ledger"),
        "PYTHONPATH": os.pathsep.join(paths),
        "KVC_TEST_FAULTS": str(faults),
        "KVCACHED_NAME": "patient",
        "KVCACHED_BUDGET": f"{BUDGET_BYTES // MIB}MiB",
        "KVCACHED_EXTENT": f"{EXTENT_BYTES // MIB}MiB",
        "KVCACHED_DECAY": "0",
        "KVCACHED_CACHE_TTL": "0.3",
    }


@contextlib.contextmanager
def patient_of(kind: type[Server], model: Path, folder: Path) -> Iterator[Patient]:
    """A server of that ``kind``, from its start to its end."""
    server = kind(model, folder / "log", env=patient_env(folder))
    try:
        server.wait_ready()
        yield Patient(server, folder / "ledger", folder / "faults")
    finally:
        server.stop()


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


class DriverFaults:
    """The tests. A module that has an engine has a class of them, and the fixtures ``patient``,
    ``requests`` and ``reference``: the tokens of the stock engine."""

    def burst(self, count: int, seed: int) -> list[Request]:
        rng = random.Random(seed)
        return [Request(random_prompt(700, rng), 40) for _ in range(count)]

    def test_the_hook_is_in_the_engine(self, patient: Patient) -> None:
        patient.fail("create", times=1)
        patient.server.complete_all(self.burst(2, 30))
        assert patient.heal() == {"create": 1}

    @pytest.mark.parametrize("kind", REPEATED)
    def test_one_call_fails(
        self, kind: str, patient: Patient, requests: list[Request], reference: list[list[int]]
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
        self, kind: str, patient: Patient, requests: list[Request], reference: list[list[int]]
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

    def test_what_cannot_be_unmapped_is_seen_and_comes_back(self, patient: Patient) -> None:
        patient.server.complete_all(self.burst(8, 31))
        patient.fail("unmap")
        patient.server.complete_all(self.burst(8, 32))
        assert wait_until(
            lambda: "patient (not given back)" in {each.name for each in patient.accounts()}, 5.0
        )
        assert sum(each.committed_bytes for each in patient.accounts()) <= BUDGET_BYTES
        patient.heal()  # and no request comes that would make anybody try again
        assert wait_until(patient.is_at_rest, 5.0, 0.02), patient.accounts()

    @pytest.mark.parametrize("share", [0.02, 0.06])
    def test_calls_fail_at_random(
        self, share: float, patient: Patient, requests: list[Request], reference: list[list[int]]
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
