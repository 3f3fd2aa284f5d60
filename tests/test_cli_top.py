"""`kvcached top` in a real terminal, and as lines where there is none."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from kvcached_plugins import control, timeline
from kvcached_plugins.cli import screen
from kvcached_plugins.cli.figures import Parts
from kvcached_plugins.cli.history import History
from kvcached_vmm.account import Account
from kvcached_vmm.records import AccountView, Counters, LedgerView
from kvcached_vmm.units import GIB, MIB

Join = Callable[..., Account]
GPU = "GPU-12345678-9abc-def0-1234-56789abcdef0"
_ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]*[a-zA-Z]|[()][A-Z0-9]|[78=>])")


class Terminal:
    """`kvcached` in a terminal of 80 columns and 24 lines."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.seen = ""
        self._passed = 0
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            script = "from kvcached_plugins.cli import main; main()"
            environment = {
                **{key: value for key, value in os.environ.items() if key != "COLUMNS"},
                "KVCACHED_DIR": str(folder),
                "TERM": "xterm-256color",
                "PYTHONIOENCODING": "utf-8",
            }
            command = [sys.executable, "-c", script, *arguments]
            os.execve(sys.executable, command, environment)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(self.fd)

    def wait_for(self, text: str, timeout_s: float = 20) -> str:
        """What was shown since the last such text, up to ``text``."""
        end = time.monotonic() + timeout_s
        while (at := (plain := _ESCAPE.sub("", self.seen)).find(text, self._passed)) < 0:
            assert time.monotonic() < end, (
                f"{text!r} did not come:\n{plain[self._passed :][-3000:]}"
            )
            self._read(0.1)
        begin, self._passed = self._passed, at + len(text)
        return plain[begin : self._passed]

    def press(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def end(self, timeout_s: float = 20) -> int:
        """The exit status, once it has ended by itself."""
        limit = time.monotonic() + timeout_s
        while (found := os.waitpid(self.pid, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < limit, "it did not end"
            self._read(0.05)
        while self._read(0.05):
            pass
        return os.waitstatus_to_exitcode(found[1])

    @property
    def is_restored(self) -> bool:
        """Whether the terminal's mode and its screen are as they were."""
        left = self.seen.rfind("\x1b[?1049l") > self.seen.rfind("\x1b[?1049h")
        shown = self.seen.rfind("\x1b[?25h") > self.seen.rfind("\x1b[?25l")
        return termios.tcgetattr(self.fd) == self.before and left and shown

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.fd], [], [], timeout_s)[0]:
            return False
        with contextlib.suppress(OSError):
            raw = os.read(self.fd, 65536)
            self.seen += raw.decode(errors="replace")
            return bool(raw)
        return False

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def terminal(folder: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(folder, *arguments))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_it_shows_sorts_quits_and_leaves_the_terminal_as_it_was(
    join: Join, terminal: Callable[..., Terminal]
) -> None:
    account = join("llama-3.1-8b-instruct", engine="vllm")
    account.commit(account.reserve(50 * MIB), 50 * MIB)
    account.report(30 * MIB, 10 * MIB, 60 * MIB)
    join("qwen", GPU)
    top = terminal("top", "--interval", "0.2")
    shown = top.wait_for("[q]uit")
    assert termios.tcgetattr(top.fd) != top.before, "keys come one by one"
    assert all(cell_len(line) <= 80 for line in shown.replace("\r", "").split("\n"))
    assert "[u]sed*" in shown
    assert GPU[:12] in shown
    top.press("d")
    shown = top.wait_for("llama-3.1-8b-instruct")
    assert all(text in shown for text in ("50M of 100M used", "1 waiting for 60M", "live 30M"))
    top.press("\x1b[An")
    top.press("n")
    top.wait_for("[n]ame*")
    top.press("q")
    assert top.end() == 0
    assert top.is_restored


@pytest.mark.parametrize(
    ("how", "status"), [("\x03", 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_however_it_ends_the_terminal_is_as_it_was(
    join: Join, terminal: Callable[..., Terminal], how: str | signal.Signals, status: int
) -> None:
    join("llama")
    top = terminal("top")
    top.wait_for("[q]uit")
    if isinstance(how, str):
        top.press(how)
    else:
        os.kill(top.pid, how)
    assert top.end() == status
    assert top.is_restored
    assert "Traceback" not in top.seen


def test_an_error_ends_it_in_a_sentence_on_the_restored_terminal(
    folder: Path, join: Join, terminal: Callable[..., Terminal]
) -> None:
    join("llama")
    top = terminal("top", "--interval", "0.1")
    top.wait_for("[q]uit")
    folder.rename(folder.with_name("moved"))
    folder.write_text("")
    assert top.end() == 2
    assert top.is_restored
    assert f"kvcached: The folder {folder} cannot be read" in top.seen.replace("\r\n", "")


def test_engines_that_come_and_go_are_followed(
    join: Join, terminal: Callable[..., Terminal]
) -> None:
    top = terminal("top", "--interval", "0.1")
    top.wait_for("No engine shares a budget here; waiting for one.")
    account = join("late")
    top.wait_for("used by 1 engine")
    account.close()
    top.wait_for("used by 0 engines")
    top.press("Q")
    assert top.end() == 0


def recorded(tmp_path: Path, *readings: control.Reading) -> Path:
    file = tmp_path / "timeline.json"
    timeline.save(file, readings)
    return file


def test_a_recording_is_played_at_its_pace_and_stays(
    folder: Path, join: Join, tmp_path: Path, terminal: Callable[..., Terminal]
) -> None:
    account = join("llama")
    first = control.read(folder)
    account.reserve(77 * MIB)
    second = control.read(folder)
    file = recorded(tmp_path, first, replace(second, at=first.at + 0.5))
    account.close()
    top = terminal("top", "--replay", str(file))
    top.wait_for("replay 1/2")
    assert "77M of 100M used" in top.wait_for("replay 2/2")
    top.press("q")
    assert top.end() == 0


def test_without_a_terminal_it_prints_a_line_per_engine(
    join: Join, kvcached: Callable[..., Any]
) -> None:
    account = join("llama")
    account.commit(account.reserve(50 * MIB), 50 * MIB)
    account.report(30 * MIB, 10 * MIB, 60 * MIB, idle_bytes=5 * MIB)
    join("qwen", GPU).fix(7 * MIB)
    ran = kvcached("top", "--once")
    assert (ran.status, ran.err) == (0, "")
    on_gpu, on_host = ran.out.splitlines()
    assert f"  {GPU}  qwen  " in on_gpu
    assert "fixed 7M" in on_gpu
    assert "llama  pid" in on_host
    assert "used 50M  live 30M  cached 10M  idle 5M  reserved 0  fixed 0  waits 0." in on_host
    assert on_host.endswith("for 60M")


def test_without_a_terminal_a_recording_is_printed_at_once_with_rates(
    folder: Path, join: Join, tmp_path: Path, kvcached: Callable[..., Any]
) -> None:
    account = join("llama")
    account.report(0, 0, counters=Counters(commits=1))
    first = control.read(folder)
    account.commit(account.reserve(20 * MIB), 20 * MIB)
    account.report(0, 0, counters=Counters(commits=11, releases=1))
    file = recorded(tmp_path, first, replace(control.read(folder), at=first.at + 2))
    begin = time.monotonic()
    ran = kvcached("top", "--replay", file)
    assert time.monotonic() - begin < 1.5
    assert len(ran.out.splitlines()) == 2
    assert ran.out.endswith("commits 5.0/s  releases 0.5/s  bytes +10M/s\n")
    assert kvcached("top", "--replay", file, "--once").out == ran.out.splitlines()[1] + "\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--sort", "size"], "--sort: 'size' is none of used, live, cached, waits, name."),
        (["--replay", "/nowhere.json"], "/nowhere.json cannot be read"),
        (["--interval", "0"], "--interval"),
    ],
)
def test_a_mistake_is_one_message(
    kvcached: Callable[..., Any], arguments: list[str], complaint: str
) -> None:
    ran = kvcached("top", "--once", *arguments)
    assert ran.status == 2
    assert complaint in ran.err
    assert "Traceback" not in ran.err


sizes = st.integers(0, 1 << 45)


@given(st.builds(Parts, *[sizes] * 7), st.integers(7, 200), st.booleans())
def test_a_bar_is_as_wide_as_its_place_and_shows_every_part(
    parts: Parts, width: int, unicode: bool
) -> None:
    bar = screen.Screen(History(), "used", unicode).bar(parts, width).plain
    assert len(bar) == (width if any(parts) else 0)
    glyphs = screen.GLYPHS if unicode else screen.PLAIN_GLYPHS
    assert len(set(glyphs)) == 7, "parts differ without colours"
    for part, glyph in zip(parts, glyphs, strict=True):
        assert (glyph in bar) == (part > 0)


def view(number: int, chance: st.DataObject) -> AccountView:
    draw = chance.draw
    return AccountView(
        *(number, draw(st.text(max_size=30)), "vllm", 7, 1, 0.0, float(number)),
        *(
            draw(sizes),
            draw(st.none() | sizes),
            draw(st.floats(0.01, 100)),
            draw(st.none() | sizes),
        ),
        0,
        *(draw(sizes) for _ in range(12)),
        *(draw(st.sampled_from([0.0, 90.0])), draw(st.floats(0, 100)), (0.0,) * 8, Counters()),
    )


@given(st.data(), st.integers(40, 130), st.integers(4, 60))
def test_any_ledger_fits_the_screen(chance: st.DataObject, width: int, height: int) -> None:
    history = History()
    devices = chance.draw(st.integers(0, 3))
    for at in (100.0, 101.5):
        ledgers = tuple(
            LedgerView(
                f"GPU-{number}",
                chance.draw(sizes),
                chance.draw(st.booleans()),
                tuple(view(each, chance) for each in range(chance.draw(st.integers(0, 4)))),
            )
            for number in range(devices)
        )
        history.add(control.Reading(at, at, ledgers, ("a fault of some ledger",)))
    picture = screen.Screen(history, chance.draw(st.sampled_from(list(screen.SORTS))))
    picture.device = chance.draw(st.integers(0, 5))
    lines = picture.draw(width, height).plain.split("\n")
    assert len(lines) == height
    assert all(cell_len(line) <= width for line in lines)


def test_the_parts_of_a_device_add_up_to_all_of_it(folder: Path, join: Join) -> None:
    first, second = join("a"), join("b")
    first.fix(GIB)
    first.commit(first.reserve(50 * MIB), 40 * MIB)
    first.report(10 * MIB, 5 * MIB, idle_bytes=4 * MIB, leaving_bytes=MIB)
    second.reserve(20 * MIB)
    second.report(99 * MIB, 99 * MIB)
    (ledger,) = control.read(folder).ledgers
    parts = Parts.of_device(ledger)
    assert parts == Parts(GIB, 10 * MIB, 5 * MIB, 20 * MIB, 5 * MIB, 20 * MIB, 40 * MIB)
    assert sum(parts) == ledger.capacity_bytes + GIB
