"""kill -9 of an engine leaves nothing behind that stands in the way of the next one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from integration.engine import (
    MIB,
    Request,
    arenas,
    engine_spec,
    family,
    generate,
    kv_bytes,
    needs_vllm,
    run_script,
    tail,
    wait_until,
)
from kvcached_vmm.ledger import Ledger

pytestmark = [pytest.mark.engine, needs_vllm]


@pytest.mark.parametrize("victims", ["the worker", "all of it"])
def test_an_engine_starts_where_another_was_killed(
    victims: str,
    model: Path,
    requests: list[Request],
    reference: list[list[int]],
    elastic_env: dict[str, str],
    tmp_path: Path,
) -> None:
    """Budget and guarantee fit one engine only, so a record left behind would show at once."""
    env = {**elastic_env, "KVCACHED_BUDGET": "24MiB", "KVCACHED_MIN": "16MiB"}
    killed: list[int] = []

    def kill_when_busy(pid: int) -> None:
        if killed or kv_bytes(pid) < 4 * MIB:
            return
        for process in family(pid):
            if victims == "all of it" or arenas(process.pid):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    command = engine_spec(model, requests, tmp_path)
    ran = run_script(
        command,
        tmp_path / "killed.log",
        env={**env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        watch=kill_when_busy,
        timeout_s=90,
    )
    folder = Path(env["KVCACHED_DIR"])
    files = {path.name for path in folder.iterdir()}

    assert killed, ran.end()
    assert ran.code != 0, ran.end()
    assert wait_until(lambda: not accounts(folder), 3.0), accounts(folder)

    some = requests[:20]
    again = generate(model, some, tmp_path, env=env)
    assert again.tokens == reference[:20], tail(tmp_path / "log")
    assert {path.name for path in folder.iterdir()} == files


def accounts(folder: Path) -> list[str]:
    """The names of those who use the ledger in `folder`."""
    ledger = Ledger.open(folder, "host")
    try:
        return [account.name for account in ledger.snapshot().accounts]
    finally:
        ledger.close()
