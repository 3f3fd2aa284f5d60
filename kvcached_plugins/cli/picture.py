"""A timeline as a picture: what each engine has, stacked, a panel for each device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcached_plugins.cli import figures
from kvcached_plugins.control import Reading
from kvcached_plugins.timeline import TimelineError
from kvcached_vmm.records import AccountView, LedgerView
from kvcached_vmm.units import GIB, MIB

COLOURS = (
    "#1f77b4",
    "#d95f02",
    "#2ca02c",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
)


def can_draw() -> bool:
    """True where matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def draw(path: Path, readings: Sequence[Reading]) -> None:
    """Write a PNG.

    Raises:
        TimelineError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    devices = sorted(
        {view.device for reading in readings for view in reading.ledgers if view.accounts}
    )
    figure = Figure(figsize=(9, 2.8 * len(devices) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(devices), 1, sharex=True, squeeze=False)[:, 0]
    for panel, device in zip(panels, devices, strict=True):
        _panel(panel, device, readings)
    panels[-1].set_xlabel("seconds")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise TimelineError(f"{path} cannot be written: {error.strerror}.") from error


def _panel(panel: Any, device: str, readings: Sequence[Reading]) -> None:
    times = [reading.at - readings[0].at for reading in readings]
    views = [_view(reading, device) for reading in readings]
    found = [{_key(each): each for each in view.accounts} if view else {} for view in views]
    keys = sorted({key for accounts in found for key in accounts}, key=lambda key: key[1])
    capacity = max(view.capacity_bytes for view in views if view)
    unit, name = (GIB, "GiB") if capacity >= 2 * GIB else (MIB, "MiB")
    below = [0.0] * len(times)
    for index, key in enumerate(keys):
        of_key = [accounts.get(key) for accounts in found]
        used = [each.used_bytes / unit if each else 0.0 for each in of_key]
        live = [min(each.live_bytes, each.used_bytes) / unit if each else 0.0 for each in of_key]
        top = [a + b for a, b in zip(below, used, strict=True)]
        middle = [a + b for a, b in zip(below, live, strict=True)]
        colour = COLOURS[index % len(COLOURS)]
        label = figures.printable(key[2])
        panel.fill_between(times, below, top, color=colour, alpha=0.3, lw=0, label=f"{label} has")
        panel.fill_between(times, below, middle, color=colour, alpha=0.85, lw=0, label="live")
        panel.plot(times, top, color=colour, lw=0.8)
        waits = [at for at, each in zip(times, of_key, strict=True) if each and each.waiting_since]
        level = capacity / unit * (1.04 + 0.03 * (index % 4))
        panel.plot(waits, [level] * len(waits), "|", color=colour, markersize=5)
        below = top
    limit = [view.capacity_bytes / unit if view else None for view in views]
    panel.plot(times, limit, color="black", ls="--", lw=0.9, label="capacity")
    panel.set_ylim(0, capacity / unit * 1.2)
    panel.set_ylabel(f"KV memory, {name}")
    panel.set_title(
        f"{figures.device_name(device)} (ticks above the line: waiting)", loc="left", fontsize=9
    )
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=7)
    panel.spines[["top", "right"]].set_visible(False)


def _view(reading: Reading, device: str) -> LedgerView | None:
    return next((view for view in reading.ledgers if view.device == device), None)


def _key(account: AccountView) -> tuple[int, float, str]:
    return account.slot, account.joined, account.name
