"""`kvcached exporter`: over HTTP on this machine only, or as a file."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from kvcached_vmm.account import Account
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import MIB

COMMAND = [sys.executable, "-c", "from kvcached_plugins.cli import main; main()", "exporter"]


@pytest.fixture(autouse=True)
def account(folder: Path) -> Iterator[Account]:
    """An engine with a budget of 64 MiB."""
    account = Ledger.open(folder, "host").join("llama", 64 * MIB)
    yield account
    account.close()


def run(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_answers_here_until_it_is_ended(folder: Path, number: signal.Signals) -> None:
    command = [*COMMAND, "--port", "0", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://(127\.0\.0\.1):(\d+)/metrics", line)
            assert found is not None, line
            page = httpx.get(found[0])
            assert page.headers["content-type"].startswith("text/plain")
            assert 'kvcached_budget_bytes{device="host"} 6.7108864e+07' in page.text
            process.send_signal(number)
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_a_port_that_is_taken_is_said_in_one_sentence(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("--port", str(port), "--dir", folder)
    assert done.returncode == 2
    assert done.stderr == (
        f"kvcached: Nothing can listen on 127.0.0.1, port {port}: Address already in use; "
        "give another --host or --port.\n"
    )


def test_the_file_is_written_at_one_stroke_for_all_to_read(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "kvcached.prom"
    file.write_text("old")
    inode = file.stat().st_ino
    done = run("--textfile", file, KVCACHED_DIR=str(folder))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "kvcached_minimum_bytes{" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert file.stat().st_ino != inode
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["kvcached.prom"]


def test_the_file_may_be_written_again_and_again(
    folder: Path, tmp_path: Path, account: Account
) -> None:
    file = tmp_path / "kvcached.prom"
    command = [*COMMAND, "--textfile", str(file), "--every", "0.05", "--dir", str(folder)]
    with subprocess.Popen(command) as process:
        try:
            _until(file.exists)
            account.reserve(3 * MIB)
            _until(lambda: 'kvcached_used_bytes{device="host"} 3.145728e+06' in file.read_text())
            process.terminate()
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_who_is_ended_while_about_to_wait_ends(folder: Path, tmp_path: Path) -> None:
    """``Event.wait`` holds a lock that ``Event.set`` wants, and signals come at any moment."""
    code = """
import os, signal, threading, types
from kvcached_plugins.cli import exporter, main

class Event(threading.Event):
    def wait(self, timeout=None):
        with self._cond:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().wait(timeout)

exporter.threading = types.SimpleNamespace(Event=Event, Thread=threading.Thread)
main()
"""
    arguments = ["exporter", "--textfile", str(tmp_path / "f"), "--every", "60"]
    ended = subprocess.run([sys.executable, "-c", code, *arguments, "--dir", folder], timeout=30)
    assert ended.returncode == 0


def test_a_file_that_cannot_be_written_is_said_in_one_sentence(
    folder: Path, tmp_path: Path
) -> None:
    done = run("--textfile", tmp_path / "nowhere" / "file.prom", "--dir", folder)
    assert done.returncode == 2
    assert "cannot be written: No such file or directory; give --textfile" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_without_ledgers_is_no_error_and_is_not_made(tmp_path: Path) -> None:
    done = run("--textfile", tmp_path / "file.prom", "--dir", tmp_path / "none")
    assert done.returncode == 0
    assert "# TYPE kvcached_ledger_up gauge" in (tmp_path / "file.prom").read_text()
    assert not (tmp_path / "none").exists()


def test_help_has_an_example_and_the_exit_codes() -> None:
    shown = run("--help", COLUMNS="100", TERM="dumb").stdout
    assert "kvcached exporter --port 9440" in shown
    assert "127.0.0.1" in shown
    assert "Exit status: 0" in shown


def _until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
