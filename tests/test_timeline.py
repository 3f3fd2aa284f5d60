"""Readings as JSON: what programs rely on, and what `top --replay` plays."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvcached_plugins import control, timeline
from kvcached_plugins.control import Reading
from kvcached_vmm.account import Account
from kvcached_vmm.records import Counters
from kvcached_vmm.units import MIB

Join = Callable[..., Account]

READING = {"version", "time", "devices", "faults"}
DEVICE = {
    "device",
    "budget_bytes",
    "set_by_user",
    "capacity_bytes",
    "used_bytes",
    "free_bytes",
    "engines",
}
ENGINE = {
    "device",
    "slot",
    "name",
    "engine",
    "pid",
    "namespace",
    "started",
    "joined",
    "minimum_bytes",
    "maximum_bytes",
    "weight",
    "cache_bytes",
    "trims",
    "committed_bytes",
    "reserved_bytes",
    "fixed_bytes",
    "arena_bytes",
    "live_bytes",
    "cached_bytes",
    "evictable_bytes",
    "idle_bytes",
    "leaving_bytes",
    "wanted_bytes",
    "coveted_bytes",
    "demand_bytes",
    "waiting_since",
    "used_bytes",
    "silent_s",
    "unused_s",
    "counters",
}
COUNTERS = {
    "commits",
    "releases",
    "refusals",
    "waits",
    "reclaims",
    "reclaimed_bytes",
    "driver_seconds",
    "wait_seconds",
    "reclaim_seconds",
}


@pytest.fixture
def reading(folder: Path, join: Join) -> Reading:
    account = join("llama", engine="vllm", maximum_bytes=50 * MIB)
    account.commit(account.reserve(9 * MIB), 8 * MIB)
    account.report(
        4 * MIB,
        2 * MIB,
        MIB,
        evictable_bytes=MIB,
        idle_bytes=MIB,
        ages=[1.0, *[2.0] * 7],
        counters=Counters(commits=3, driver_seconds=0.25),
    )
    join("qwen", "GPU-1")
    return control.read(folder)


def test_the_keys_of_the_json_stay_as_they_are(reading: Reading) -> None:
    found = timeline.as_json(reading)
    assert set(found) == READING
    assert all(set(device) == DEVICE for device in found["devices"])
    engines = [engine for device in found["devices"] for engine in device["engines"]]
    assert len(engines) == 2
    assert all(set(engine) == ENGINE for engine in engines)
    assert all(set(engine["counters"]) == COUNTERS for engine in engines)
    llama = next(engine for engine in engines if engine["name"] == "llama")
    assert llama["used_bytes"] == llama["committed_bytes"] == 8 * MIB
    assert (llama["maximum_bytes"], llama["cache_bytes"]) == (50 * MIB, None)
    assert llama["unused_s"][0] == pytest.approx(reading.clock - 1, abs=0.001)
    assert 0 <= llama["silent_s"] < 10


def test_what_is_written_is_what_is_read(reading: Reading, tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    later = replace(reading, at=reading.at + 1, faults=("one is broken",))
    assert timeline.save(file, [reading, later]) == 2
    found = timeline.load(file)
    assert [timeline.as_json(each) for each in found] == [
        timeline.as_json(each) for each in (reading, later)
    ]
    (before,) = reading.ledgers[-1].accounts
    (after,) = found[0].ledgers[-1].accounts
    same = {"heartbeat": 0.0, "ages": ()}
    assert replace(after, **same) == replace(before, **same)


def test_a_line_that_was_cut_off_at_the_end_is_passed_over(
    reading: Reading, tmp_path: Path
) -> None:
    file = tmp_path / "timeline.json"
    whole = timeline.dumps(reading)
    file.write_text(f"{whole}\n{whole[:100]}")
    assert len(timeline.load(file)) == 1


def test_names_that_are_not_known_are_passed_over(reading: Reading) -> None:
    found = timeline.as_json(reading) | {"more": 1}
    found["devices"][0]["engines"][0]["more"] = 1
    assert timeline.from_json(found).ledgers


def spoil(key: str, value: Any) -> str:
    return json.dumps({"version": 1, "time": 0, "devices": [], "faults": [], key: value})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has nothing recorded in it"),
        ("no json", "line 1"),
        ("[]", "line 1: not a reading of ledgers"),
        (spoil("version", 99), "line 1: version 99 is not known, only 1"),
        (spoil("time", None), "not a reading"),
        (spoil("devices", [{"device": "host"}]), "not a reading"),
        (spoil("devices", 1), "not a reading"),
    ],
)
def test_what_is_no_timeline_is_refused_in_a_sentence(
    tmp_path: Path, text: str, complaint: str
) -> None:
    file = tmp_path / "timeline.json"
    file.write_text(text)
    with pytest.raises(timeline.TimelineError, match=complaint):
        timeline.load(file)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(timeline.TimelineError, match="absent cannot be read: No such file"):
        timeline.load(tmp_path / "absent")
    with pytest.raises(timeline.TimelineError, match="cannot be written: Is a directory"):
        timeline.save(tmp_path, [])
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(timeline.TimelineError, match="it is not text"):
        timeline.load(binary)
