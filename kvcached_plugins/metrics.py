"""The ledgers as Prometheus metrics: gauges and counters per engine, gauges per device.

Read at every scrape, so figures are as new as the ledger's, also while an engine does nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvcached_vmm.errors import LedgerError
from kvcached_vmm.ledger import Ledger, devices
from kvcached_vmm.records import AccountView, LedgerView

logger = logging.getLogger("kvcached")

ENGINE_LABELS = ("model_name", "engine", "device", "pid")
"""The name in the ledger, vllm or sglang, the GPU's UUID or ``host``, the process."""

UP = "kvcached_ledger_up"


class OfEngine(NamedTuple):
    """A family with one sample per engine; none where ``value`` is None."""

    name: str
    help: str
    value: Callable[[AccountView], float | None]


class OfDevice(NamedTuple):
    """A family with one sample per device."""

    name: str
    help: str
    value: Callable[[LedgerView], float]


GAUGES = (
    OfEngine(
        "kvcached_committed_bytes",
        "KV memory that the engine has, in bytes.",
        lambda account: account.committed_bytes,
    ),
    OfEngine(
        "kvcached_reserved_bytes",
        "Bytes granted to the engine and not yet committed.",
        lambda account: account.reserved_bytes,
    ),
    OfEngine(
        "kvcached_fixed_bytes",
        "Bytes of weights, graphs and activations.",
        lambda account: account.fixed_bytes,
    ),
    OfEngine(
        "kvcached_live_bytes",
        "Bytes in blocks that requests use.",
        lambda account: account.live_bytes,
    ),
    OfEngine(
        "kvcached_cached_bytes",
        "Bytes in free blocks whose content is kept as prefix cache.",
        lambda account: account.cached_bytes,
    ),
    OfEngine(
        "kvcached_evictable_bytes",
        "Bytes in extents that hold cached blocks and no live ones.",
        lambda account: account.evictable_bytes,
    ),
    OfEngine(
        "kvcached_idle_bytes",
        "Bytes in extents without content, decaying or kept as the reserve.",
        lambda account: account.idle_bytes,
    ),
    OfEngine(
        "kvcached_leaving_bytes",
        "Bytes in extents whose release waits for kernels to finish.",
        lambda account: account.leaving_bytes,
    ),
    OfEngine(
        "kvcached_wanted_bytes",
        "Bytes that requests need and the engine does not get.",
        lambda account: account.wanted_bytes,
    ),
    OfEngine(
        "kvcached_minimum_bytes",
        "Bytes that are never granted to others.",
        lambda account: account.minimum_bytes,
    ),
    OfEngine(
        "kvcached_maximum_bytes",
        "The most bytes that the engine may have; no sample where only the budget limits it.",
        lambda account: account.maximum_bytes,
    ),
    OfEngine(
        "kvcached_cache_limit_bytes",
        "Bytes that cached blocks may hold; no sample where there is no bound.",
        lambda account: account.cache_bytes,
    ),
    OfEngine(
        "kvcached_weight",
        "The engine's share under pressure, against the weights of the others.",
        lambda account: account.weight,
    ),
)

COUNTERS = (
    OfEngine(
        "kvcached_commits_total",
        "Extents committed since the engine joined.",
        lambda account: account.counters.commits,
    ),
    OfEngine(
        "kvcached_releases_total",
        "Extents released since the engine joined.",
        lambda account: account.counters.releases,
    ),
    OfEngine(
        "kvcached_refusals_total",
        "Reservations that were not granted in full.",
        lambda account: account.counters.refusals,
    ),
    OfEngine(
        "kvcached_waits_total",
        "How often requests had to wait for memory.",
        lambda account: account.counters.waits,
    ),
    OfEngine(
        "kvcached_reclaims_total",
        "How often the engine gave memory back to others that waited.",
        lambda account: account.counters.reclaims,
    ),
    OfEngine(
        "kvcached_reclaimed_bytes_total",
        "Bytes given back to others that waited.",
        lambda account: account.counters.reclaimed_bytes,
    ),
    OfEngine(
        "kvcached_driver_seconds_total",
        "Seconds spent in the driver, committing and releasing.",
        lambda account: account.counters.driver_seconds,
    ),
    OfEngine(
        "kvcached_wait_seconds_total",
        "Seconds that requests waited for memory.",
        lambda account: account.counters.wait_seconds,
    ),
    OfEngine(
        "kvcached_reclaim_seconds_total",
        "Seconds from learning what others wait for to having given it back.",
        lambda account: account.counters.reclaim_seconds,
    ),
)

DEVICE_GAUGES = (
    OfDevice(
        "kvcached_budget_bytes",
        "Bytes that all engines on the device may use together.",
        lambda view: view.budget_bytes,
    ),
    OfDevice(
        "kvcached_capacity_bytes",
        "Bytes that KV caches may use together: the budget, less fixed bytes if no user set it.",
        lambda view: view.capacity_bytes,
    ),
    OfDevice(
        "kvcached_free_bytes",
        "Bytes that nobody uses or was promised.",
        lambda view: view.free_bytes,
    ),
    OfDevice(
        "kvcached_used_bytes",
        "Bytes committed or reserved, by all engines on the device.",
        lambda view: view.used_bytes,
    ),
    OfDevice(
        "kvcached_waiting_engines",
        "Engines on the device that want bytes which they do not get.",
        lambda view: sum(account.wanted_bytes > 0 for account in view.accounts),
    ),
)


class Reading(NamedTuple):
    """A device's ledger at one moment; ``view`` is None if it cannot be read."""

    device: str
    view: LedgerView | None


def read_ledgers(directory: Path) -> Iterator[Reading]:
    """Every ledger in ``directory``, which need not exist. Makes nothing.

    A folder that cannot be listed is a reading without a device.
    """
    try:
        found = devices(directory)
    except LedgerError as error:
        logger.debug("kvcached: %s", error)
        found = [""]
    for device in found:
        view = None
        if device:
            try:
                with contextlib.closing(Ledger.open(directory, device)) as ledger:
                    view = ledger.snapshot()
            except (LedgerError, OSError) as error:
                logger.debug("kvcached: %s", error)
        yield Reading(device, view)


class LedgerCollector(Collector):
    """What the ledgers in ``directory`` say. Safe to use from several threads.

    Given ``mine``, only the engines for which it holds are shown, and only their devices.
    """

    def __init__(self, directory: Path, mine: Callable[[AccountView], bool] | None = None) -> None:
        self._directory = directory
        self._mine = mine

    def describe(self) -> Iterable[Metric]:
        """The families, without samples."""
        return _families().values()

    def collect(self) -> Iterable[Metric]:
        """Every family, with what the ledgers say now. A ledger that cannot be read is "down"."""
        families = _families()
        for device, view in read_ledgers(self._directory):
            if view is None:
                families[UP].add_metric([device], 0)
                continue
            accounts = [each for each in view.accounts if self._mine is None or self._mine(each)]
            if self._mine is not None and not accounts:
                continue
            families[UP].add_metric([device], 1)
            for of_device in DEVICE_GAUGES:
                families[of_device.name].add_metric([device], of_device.value(view))
            for account, labels in _labelled(device, accounts):
                for of_engine in (*GAUGES, *COUNTERS):
                    value = of_engine.value(account)
                    if value is not None:
                        families[of_engine.name].add_metric(labels, value)
        return families.values()


def _families() -> dict[str, GaugeMetricFamily | CounterMetricFamily]:
    up = GaugeMetricFamily(UP, "1 if the device's ledger can be read, else 0.", labels=["device"])
    return {
        UP: up,
        **{f.name: GaugeMetricFamily(f.name, f.help, labels=["device"]) for f in DEVICE_GAUGES},
        **{f.name: GaugeMetricFamily(f.name, f.help, labels=ENGINE_LABELS) for f in GAUGES},
        **{f.name: CounterMetricFamily(f.name, f.help, labels=ENGINE_LABELS) for f in COUNTERS},
    }


def _labelled(
    device: str, accounts: Iterable[AccountView]
) -> Iterator[tuple[AccountView, list[str]]]:
    """Accounts with their label values, which differ even for engines that share a process: a
    scrape with the same series twice would be refused as a whole."""
    seen: dict[tuple[str, str, int], int] = {}
    for account in accounts:
        key = account.name, account.engine, account.pid
        seen[key] = seen.get(key, 0) + 1
        name = account.name if seen[key] == 1 else f"{account.name} ({seen[key]})"
        yield account, [name, account.engine, device, str(account.pid)]
