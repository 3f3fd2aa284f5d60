"""Profiles for hypothesis, the host driver that most tests run on, and a tiny engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import PAGE
from hypothesis import HealthCheck, settings
from tiny_engine import nothing_installed, site

from kvcached_vmm.host_driver import HostDriver
from kvcached_vmm.units import MIB

__all__ = ["nothing_installed", "site"]

settings.register_profile(
    "local", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


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
