"""kill -9 of an engine leaves nothing behind that stands in the way of the next one."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import NamedTuple

import pytest

from integration.conftest import asked_for, cases, elastic_env
from integration.engine import (
    MIB,
    ONE_PROCESS,
    Generated,
    Ran,
    Request,
    arenas,
    engine_spec,
    family,
    generate,
    kv_bytes,
    needs_vllm,
    run_script,
    wait_until,
)
from kvcached_vmm.ledger import Ledger

pytestmark = [pytest.mark.engine, needs_vllm]

VICTIMS = ("the worker", "all of it")
REQUESTS_AFTERWARDS = 20


class Killed(NamedTuple):
    """An engine that was killed while it was busy, and the one that was started after it."""

    ran: Ran
    victims: list[int]
    ledger_emptied: bool
    again: Generated
    new_files: set[str]


@pytest.fixture(scope="module")
def kills(
    request: pytest.FixtureRequest,
    lanes: Executor,
    plugin: None,
    model: Path,
    requests: list[Request],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Future[Killed]]:
    return {
        victims: lanes.submit(kill, victims, model, requests, tmp_path_factory.mktemp("kill"))
        for victims in asked_for(request, "victims")
    }


def kill(victims: str, model: Path, requests: list[Request], folder: Path) -> Killed:
    """Budget and guarantee fit one engine only, so a record left behind would show at once."""
    ledger = folder / "ledger"
    env = {**elastic_env(ledger), "KVCACHED_BUDGET": "24MiB", "KVCACHED_MIN": "16MiB"}
    killed: list[int] = []

    def kill_when_busy(pid: int) -> None:
        if killed or kv_bytes(pid) < 4 * MIB:
            return
        for process in family(pid):
            if victims == "all of it" or arenas(process.pid):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    ran = run_script(
        engine_spec(model, requests, folder),
        folder / "killed.log",
        env={**env, **ONE_PROCESS},
        watch=kill_when_busy,
        timeout_s=120,
    )
    emptied = wait_until(lambda: not accounts(ledger), 3.0)
    files = {path.name for path in ledger.iterdir()}
    again = generate(model, requests[:REQUESTS_AFTERWARDS], folder, env=env)
    new_files = {path.name for path in ledger.iterdir()} - files
    return Killed(ran, killed, emptied, again, new_files)


def accounts(folder: Path) -> list[str]:
    """The names of those who use the ledger in `folder`."""
    ledger = Ledger.open(folder, "host")
    try:
        return [account.name for account in ledger.snapshot().accounts]
    finally:
        ledger.close()


@pytest.mark.parametrize("victims", cases(VICTIMS, {"the worker"}))
def test_an_engine_starts_where_another_was_killed(
    victims: str, kills: dict[str, Future[Killed]], reference: list[list[int]]
) -> None:
    killed = kills[victims].result()

    assert killed.victims, killed.ran.end()
    assert killed.ran.code != 0, killed.ran.end()
    assert killed.ledger_emptied
    assert killed.again.tokens == reference[:REQUESTS_AFTERWARDS]
    assert killed.new_files == set()
