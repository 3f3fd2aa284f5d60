"""The collector says what the ledgers say, whatever state they are in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvcached_plugins.metrics import (
    COUNTERS,
    DEVICE_GAUGES,
    GAUGES,
    LedgerCollector,
    read_ledgers,
)
from kvcached_vmm.account import Account
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.records import AccountView, Counters
from kvcached_vmm.units import MIB

BUDGET = 100 * MIB
Join = Callable[..., Account]


@pytest.fixture
def join(folder: Path) -> Iterator[Join]:
    """Makes accounts in the ledgers of `folder`."""
    opened: list[Ledger] = []

    def join(name: str = "llama", device: str = "host", **terms: object) -> Account:
        opened.append(Ledger.open(folder, device))
        return opened[-1].join(name, BUDGET, engine="vllm", **terms)  # type: ignore[arg-type]

    yield join
    for ledger in opened:
        ledger.close()


def scrape(
    folder: Path, mine: Callable[[AccountView], bool] | None = None
) -> dict[tuple[str, str], float]:
    """Samples by their name and the model's, or the device's: as Prometheus would read them."""
    registry = CollectorRegistry()
    registry.register(LedgerCollector(folder, mine))
    text = generate_latest(registry).decode()
    samples = [each for f in text_string_to_metric_families(text) for each in f.samples]
    found = {
        (each.name, each.labels.get("model_name") or each.labels["device"]): each.value
        for each in samples
    }
    assert len(found) == len(samples), "a series is there twice"
    return found


def test_every_figure_of_an_engine_has_its_own_sample(join: Join, folder: Path) -> None:
    account = join(minimum_bytes=1 * MIB, maximum_bytes=64 * MIB, cache_bytes=2 * MIB, weight=3.0)
    account.reserve(32 * MIB)
    account.commit(24 * MIB, 23 * MIB)
    account.fix(5 * MIB)
    account.report(
        6 * MIB,
        7 * MIB,
        9 * MIB,
        idle_bytes=10 * MIB,
        leaving_bytes=11 * MIB,
        evictable_bytes=4 * MIB,
        counters=Counters(1, 2, 3, 4, 5, 6 * MIB, 0.25, 0.5, 0.75),
    )
    found = scrape(folder)
    assert {name: value for (name, model), value in found.items() if model == "llama"} == {
        "kvcached_committed_bytes": 23 * MIB,
        "kvcached_reserved_bytes": 8 * MIB,
        "kvcached_fixed_bytes": 5 * MIB,
        "kvcached_live_bytes": 6 * MIB,
        "kvcached_cached_bytes": 7 * MIB,
        "kvcached_evictable_bytes": 4 * MIB,
        "kvcached_idle_bytes": 10 * MIB,
        "kvcached_leaving_bytes": 11 * MIB,
        "kvcached_wanted_bytes": 9 * MIB,
        "kvcached_minimum_bytes": 1 * MIB,
        "kvcached_maximum_bytes": 64 * MIB,
        "kvcached_cache_limit_bytes": 2 * MIB,
        "kvcached_weight": 3,
        "kvcached_commits_total": 1,
        "kvcached_releases_total": 2,
        "kvcached_refusals_total": 3,
        "kvcached_waits_total": 4,
        "kvcached_reclaims_total": 5,
        "kvcached_reclaimed_bytes_total": 6 * MIB,
        "kvcached_driver_seconds_total": 0.25,
        "kvcached_wait_seconds_total": 0.5,
        "kvcached_reclaim_seconds_total": 0.75,
    }


def test_every_device_has_its_budget_and_what_is_left(join: Join, folder: Path) -> None:
    first, second = join("a"), join("b", minimum_bytes=10 * MIB)
    join("c", device="GPU-1")
    first.reserve(30 * MIB)
    second.report(0, 0, 5 * MIB)
    found = scrape(folder)
    assert {name: value for (name, device), value in found.items() if device == "host"} == {
        "kvcached_ledger_up": 1,
        "kvcached_budget_bytes": BUDGET,
        "kvcached_capacity_bytes": BUDGET,
        "kvcached_free_bytes": 60 * MIB,
        "kvcached_used_bytes": 30 * MIB,
        "kvcached_waiting_engines": 1,
    }
    assert found["kvcached_free_bytes", "GPU-1"] == BUDGET


def test_no_limit_is_no_sample(join: Join, folder: Path) -> None:
    join()
    names = {name for name, _ in scrape(folder)}
    assert "kvcached_minimum_bytes" in names
    assert not names & {"kvcached_maximum_bytes", "kvcached_cache_limit_bytes"}


def test_labels_name_the_model_the_engine_the_device_and_the_process(
    join: Join, folder: Path
) -> None:
    join()
    families = {each.name: each for each in LedgerCollector(folder).collect()}
    (sample,) = families["kvcached_committed_bytes"].samples
    assert sample.labels == {
        "model_name": "llama",
        "engine": "vllm",
        "device": "host",
        "pid": str(os.getpid()),
    }


def test_engines_of_one_name_in_one_process_stay_apart(join: Join, folder: Path) -> None:
    for committed in (1, 2, 3):
        account = join()
        account.reserve(committed * MIB)
        account.commit(committed * MIB, committed * MIB)
    found = scrape(folder)
    names = ("llama", "llama (2)", "llama (3)")
    assert [found["kvcached_committed_bytes", name] / MIB for name in names] == [1, 2, 3]


def test_a_damaged_ledger_is_down_and_the_others_are_not(join: Join, folder: Path) -> None:
    join(device="GPU-1")
    join(device="GPU-2")
    (folder / "GPU-3.ledger").touch(mode=0o600)
    (folder / "GPU-3.ledger").write_bytes(b"not a ledger")
    path = folder / "GPU-1.ledger"
    with path.open("r+b") as file:
        file.seek(300)
        file.write(b"\xff\xff\xff\xff")
    found = scrape(folder)
    up = {device: value for (name, device), value in found.items() if name == "kvcached_ledger_up"}
    assert up == {"GPU-1": 0, "GPU-2": 1, "GPU-3": 0}
    assert ("kvcached_budget_bytes", "GPU-1") not in found
    assert ("kvcached_budget_bytes", "GPU-2") in found
    assert (folder / "GPU-3.ledger").read_bytes() == b"not a ledger"


def test_a_folder_that_others_can_enter_is_down(join: Join, folder: Path) -> None:
    join()
    folder.chmod(0o755)
    assert scrape(folder) == {("kvcached_ledger_up", "host"): 0}


def test_a_folder_that_is_none_is_down_without_a_device(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert scrape(file) == {("kvcached_ledger_up", ""): 0}


def test_reading_makes_no_folder(tmp_path: Path) -> None:
    assert list(read_ledgers(tmp_path / "nowhere")) == []
    assert scrape(tmp_path / "nowhere") == {}
    assert list(tmp_path.iterdir()) == []


def test_of_one_server_only_its_engines_and_devices_are_shown(join: Join, folder: Path) -> None:
    for name, device in (("mine", "GPU-1"), ("other", "GPU-1"), ("other", "GPU-2")):
        join(name, device)
    found = scrape(folder, lambda account: account.name == "mine")
    assert {each for _, each in found} == {"mine", "GPU-1"}


def test_an_engine_that_left_is_gone(join: Join, folder: Path) -> None:
    account = join()
    assert ("kvcached_weight", "llama") in scrape(folder)
    account.close()
    assert ("kvcached_weight", "llama") not in scrape(folder)


def test_names_say_what_is_counted_in_which_unit() -> None:
    families = {each.name: each for each in LedgerCollector(Path("/nowhere")).describe()}
    assert len(families) == len(GAUGES) + len(COUNTERS) + len(DEVICE_GAUGES) + 1
    for each in (*GAUGES, *DEVICE_GAUGES):
        assert families[each.name].type == "gauge"
        assert not each.name.endswith("_total")
    for each in COUNTERS:
        assert each.name.endswith("_total")
        assert families[each.name.removesuffix("_total")].type == "counter"
    for each in (*GAUGES, *COUNTERS, *DEVICE_GAUGES):
        assert each.name.startswith("kvcached_")
        assert each.help.endswith(".")
        if "_bytes" in each.name:
            assert "bytes" in each.help.lower(), each.name
        if "_seconds" in each.name:
            assert "Seconds" in each.help, each.name
