"""Profiles for hypothesis, the host driver that most tests run on, and a tiny engine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from faults import PAGE
from hypothesis import HealthCheck, settings
from tiny_engine import nothing_installed, site

from kvcached_plugins.cli import main
from kvcached_vmm.account import Account
from kvcached_vmm.host_driver import HostDriver
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import MIB

__all__ = ["nothing_installed", "site"]

settings.register_profile(
    "local", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As of a job in the background; the programs that tests send Ctrl-C to would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def driver() -> Iterator[HostDriver]:
    """A host driver of 64 MiB with mappings of single pages; a test must not leave memory in it."""
    driver = HostDriver(capacity_bytes=64 * MIB, granularity=PAGE)
    yield driver
    assert driver.allocated_bytes == 0, "the test left memory in the driver"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that only we can enter."""
    path = tmp_path / "ledgers"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def join(folder: Path) -> Iterator[Callable[..., Account]]:
    """Makes engines in real ledgers, each with an open file of its own as in a process of its own.

    The budget is 100 MiB on each device.
    """
    opened: list[Ledger] = []

    def engine(name: str = "engine", device: str = "host", **terms: Any) -> Account:
        opened.append(Ledger.open(folder, device))
        return opened[-1].join(name, 100 * MIB, **terms)

    yield engine
    for ledger in opened:
        ledger.close()


class Ran(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


@pytest.fixture
def kvcached(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Runs the command as the entry point does, 80 columns wide, with the ledgers of ``join``."""
    monkeypatch.setenv("KVCACHED_DIR", str(folder))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["kvcached", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        code = end.value.code
        return Ran(code if isinstance(code, int) else int(bool(code)), *capsys.readouterr())

    return run
