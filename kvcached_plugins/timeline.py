"""What the ledgers said, as JSON: one object per reading, a timeline has one on each line.

A reading:

    version     of this form: 1
    time        seconds since the epoch
    devices     one object per ledger
    faults      a sentence for each ledger that could not be read

A device: ``device``, ``budget_bytes``, ``set_by_user``, ``capacity_bytes`` (what KV caches may use
together), ``used_bytes``, ``free_bytes`` and ``engines``.

An engine: ``device``, and what ``kvcached_vmm.records.AccountView`` has, under the same names and
in the same units, ``used_bytes`` too. In place of moments on the monotonic clock there are
``silent_s``, seconds since it last reported, and ``unused_s``, seconds since each eighth of its
evictable bytes was last used. ``waiting_since`` is 0 if nothing is wanted, ``maximum_bytes`` and
``cache_bytes`` are null if there is no bound.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from kvcached_plugins.control import Reading
from kvcached_vmm.errors import KVCachedError
from kvcached_vmm.records import AccountView, Counters, LedgerView

VERSION = 1

_FIGURES = tuple(
    field.name
    for field in fields(AccountView)
    if field.name not in ("heartbeat", "ages", "counters")
)
_COUNTERS = tuple(field.name for field in fields(Counters))


class TimelineError(KVCachedError):
    """A file is not a timeline, or cannot be read or written."""


def as_json(reading: Reading) -> dict[str, Any]:
    """A reading as an object of JSON."""
    return {
        "version": VERSION,
        "time": reading.at,
        "devices": [_device(view, reading.clock) for view in reading.ledgers],
        "faults": list(reading.faults),
    }


def from_json(found: Mapping[str, Any]) -> Reading:
    """The reading that ``as_json`` was given. Its monotonic clock is the time of day.

    Raises:
        ValueError: it is none, or of a newer version. Names that are not known are passed over.
    """
    try:
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']} is not known, only {VERSION}")
        at = float(found["time"])
        return Reading(
            at,
            at,
            tuple(
                LedgerView(
                    str(device["device"]),
                    int(device["budget_bytes"]),
                    bool(device["set_by_user"]),
                    tuple(_account(engine, at) for engine in device["engines"]),
                )
                for device in found["devices"]
            ),
            tuple(map(str, found["faults"])),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a reading of ledgers: {error}") from error


def dumps(reading: Reading) -> str:
    """A reading as one line of JSON."""
    return json.dumps(as_json(reading), separators=(",", ":"))


def load(path: Path) -> list[Reading]:
    """The readings in a file, one on each line. A last line that was cut off is passed over.

    Raises:
        TimelineError: the file cannot be read, or has something else in it, or nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TimelineError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise TimelineError(f"{path} is not a timeline: it is not text.") from error
    readings: list[Reading] = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                readings.append(from_json(json.loads(line)))
        except ValueError as error:
            if number == len(lines) and readings and isinstance(error, json.JSONDecodeError):
                break
            raise TimelineError(
                f"{path} is not a timeline of `kvcached record`: line {number}: {error}."
            ) from error
    if not readings:
        raise TimelineError(f"{path} has nothing recorded in it.")
    return readings


def save(path: Path, readings: Iterable[Reading]) -> int:
    """Write readings as they come; returns how many.

    Raises:
        TimelineError: the file cannot be written.
    """
    count = 0
    try:
        with path.open("w", encoding="utf-8") as file:
            for reading in readings:
                file.write(dumps(reading) + "\n")
                file.flush()
                count += 1
    except OSError as error:
        raise TimelineError(f"{path} cannot be written: {error.strerror}.") from error
    return count


def _device(view: LedgerView, clock: float) -> dict[str, Any]:
    return {
        "device": view.device,
        "budget_bytes": view.budget_bytes,
        "set_by_user": view.set_by_user,
        "capacity_bytes": view.capacity_bytes,
        "used_bytes": view.used_bytes,
        "free_bytes": view.free_bytes,
        "engines": [_engine(view.device, account, clock) for account in view.accounts],
    }


def _engine(device: str, account: AccountView, clock: float) -> dict[str, Any]:
    known = account.evictable_bytes > 0
    return {
        "device": device,
        **{name: getattr(account, name) for name in _FIGURES},
        "used_bytes": account.used_bytes,
        "silent_s": round(clock - account.heartbeat, 3),
        "unused_s": [round(clock - age, 3) for age in account.ages] if known else [],
        "counters": {name: getattr(account.counters, name) for name in _COUNTERS},
    }


def _account(engine: Mapping[str, Any], clock: float) -> AccountView:
    ages = tuple(clock - age for age in engine["unused_s"])
    return AccountView(
        **{name: engine[name] for name in _FIGURES},
        heartbeat=clock - engine["silent_s"],
        ages=ages,
        counters=Counters(**{name: engine["counters"][name] for name in _COUNTERS}),
    )
