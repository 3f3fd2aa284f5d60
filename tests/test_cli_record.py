"""`kvcached record`: what it writes is what `top --replay` plays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcached_plugins import timeline
from kvcached_plugins.cli import picture
from kvcached_vmm.account import Account
from kvcached_vmm.units import MIB

Join = Callable[..., Account]


def test_a_recording_can_be_played(
    join: Join, kvcached: Callable[..., Any], tmp_path: Path
) -> None:
    join("llama").reserve(9 * MIB)
    file = tmp_path / "timeline.json"
    ran = kvcached("record", file, "--seconds", 0.2, "--interval", 0.05)
    assert ran.status == 0
    assert "of 1 engine:" in ran.out
    readings = timeline.load(file)
    assert 2 <= len(readings) <= 6
    assert all(reading.ledgers[0].used_bytes == 9 * MIB for reading in readings)
    played = kvcached("top", "--replay", file)
    assert played.out.count("used 9M") == len(readings)


def test_a_picture_is_drawn_live_or_from_a_recording(
    join: Join, kvcached: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    account = join("llama")
    account.reserve(9 * MIB)
    account.report(MIB, 0, MIB)
    join("qwen", "GPU-1")
    recording, drawn, live = (tmp_path / name for name in ("a.json", "b.png", "c.PNG"))
    kvcached("record", recording, "--seconds", 0.1, "--interval", 0.05)
    assert kvcached("record", drawn, "--replay", recording).status == 0
    assert kvcached("record", live, "--seconds", 0.1, "--interval", 0.05).status == 0
    for file in (drawn, live):
        assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("limit", "status"), [([], 0), (["--seconds", "60"], 130)])
def test_ctrl_c_keeps_what_was_recorded(
    folder: Path, join: Join, tmp_path: Path, limit: list[str], status: int
) -> None:
    join("llama")
    file = tmp_path / "timeline.json"
    script = "from kvcached_plugins.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "record", str(file), "--interval", "0.05", *limit],
        env={**os.environ, "KVCACHED_DIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 20
    while not (file.exists() and file.read_text().count("\n") >= 2):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (status, "")
    assert "readings of 1 engine:" in out
    assert len(timeline.load(file)) >= 2


def test_nobody_to_record_is_a_failure(kvcached: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("a.json", "b.png"):
        ran = kvcached("record", tmp_path / name, "--seconds", 0.05, "--interval", 0.05)
        assert (ran.status, ran.err) == (1, "No engine shared a budget meanwhile.\n")


def test_a_mistake_is_one_sentence(
    join: Join,
    kvcached: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    join("llama")
    ran = kvcached("record", tmp_path / "a.txt")
    assert (ran.status, "ends in .json or .png" in ran.err) == (2, True)
    ran = kvcached("record", tmp_path / "no" / "a.json", "--seconds", 0)
    assert (ran.status, "cannot be written" in ran.err) == (2, True)
    monkeypatch.setattr(picture, "can_draw", lambda: False)
    ran = kvcached("record", tmp_path / "a.png")
    assert ran.status == 2
    assert "pip install 'kvcached-plugins[demo]'" in ran.err
