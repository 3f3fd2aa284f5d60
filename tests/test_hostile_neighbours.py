"""Other local users get nowhere: they can neither read nor write nor be there first; and nothing of
ours runs what it reads, asks a shell, or is open to the world."""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcached_vmm.errors import LedgerError
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import MIB

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for name in ("kvcached_vmm", "kvcached_plugins") for path in (ROOT / name).rglob("*.py")
)
NOBODY = 65534
as_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can be somebody else"
)


def as_nobody(command: str) -> subprocess.CompletedProcess[str]:
    """A shell line of another user."""
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return subprocess.run([*become, "/bin/sh", "-c", command], capture_output=True, text=True)


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Path]:
    """A folder like /tmp, in which everybody may make files, and to which everybody finds."""
    place = Path("/dev/shm") / f"kvc-test-{os.getpid()}"
    place.mkdir()
    place.chmod(0o1777)
    yield place
    shutil.rmtree(place)


@as_root
def test_another_user_can_do_nothing_with_a_ledger(public: Path) -> None:
    folder = public / "ledgers"
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        ledger.join("engine", MIB).reserve(1000)
        path = folder / "host.ledger"
        for command in (
            f"cat {path}",
            f"echo x >> {path}",
            f"ls {folder}",
            f"rm -f {path}",
            f"mv {folder} {public}/elsewhere",
            f"touch {folder}/GPU-1.ledger",
            f"ln {path} {public}/link",
            f"cat /proc/{os.getpid()}/fd/{ledger._fd}",
            f"kill -STOP {os.getpid()}",
        ):
            done = as_nobody(command)
            assert done.returncode != 0, command
            assert "denied" in done.stderr or "permitted" in done.stderr, done.stderr
        assert ledger.snapshot().used_bytes == 1000


FIRST = {
    "a folder": "mkdir -m 700 {folder}",
    "a folder for all": "mkdir -m 777 {folder}",
    "a link to a folder of ours": "ln -s {ours} {folder}",
    "a link to nowhere": "ln -s {ours}/made-by-us {folder}",
    "a file": "touch {folder}",
    "a pipe": "mkfifo {folder}",
}


@as_root
@pytest.mark.parametrize("what", FIRST)
def test_who_was_there_first_is_refused(public: Path, tmp_path: Path, what: str) -> None:
    ours = tmp_path / "ours"
    ours.mkdir(mode=0o700)
    folder = public / "ledgers"
    assert as_nobody(FIRST[what].format(folder=folder, ours=ours)).returncode == 0
    with pytest.raises(LedgerError, match=r"KVCACHED_DIR at a folder of your own\.$"):
        Ledger.open(folder, "host")
    assert list(ours.iterdir()) == []


@as_root
@pytest.mark.parametrize(
    "make", ["touch {0}", "ln -s /etc/hostname {0}", "mkfifo {0}", "mkdir {0}"]
)
def test_a_file_of_another_user_in_our_folder_is_refused(public: Path, make: str) -> None:
    """As when the folder was open to others once."""
    folder = public / "ledgers"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    assert as_nobody(make.format(folder / "host.ledger")).returncode == 0
    folder.chmod(0o700)
    before = Path("/etc/hostname").read_bytes() if Path("/etc/hostname").exists() else b""
    with pytest.raises(LedgerError):
        Ledger.open(folder, "host")
    if before:
        assert Path("/etc/hostname").read_bytes() == before


@as_root
def test_kvcached_of_another_user_shows_nothing_of_ours(public: Path) -> None:
    folder = public / "ledgers"
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        ledger.join("secret-model", MIB)
        done = as_nobody(
            f"PYTHONPATH={ROOT} KVCACHED_DIR={folder} {sys.executable} -m kvcached_plugins.cli list"
        )
    assert "secret-model" not in done.stdout + done.stderr


def test_the_exporter_listens_on_this_machine_only(folder: Path) -> None:
    code = "from kvcached_plugins.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "exporter", "--port", "0", "--dir", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"},
    )
    assert process.stdout is not None
    try:
        port = _port(process.stdout.readline())
        socket.create_connection(("127.0.0.1", port), 5).close()
        local = Path("/proc/net/tcp").read_text().splitlines()
        listening = {line.split()[1] for line in local if line.split()[3] == "0A"}
        assert f"0100007F:{port:04X}" in listening
        assert f"00000000:{port:04X}" not in listening
    finally:
        process.terminate()
        process.wait(10)


def _port(line: str) -> int:
    return int(line.split(":")[2].split("/")[0])


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "shelve", "marshal", "yaml", "telnetlib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
FORBIDDEN_ATTRIBUTES = {
    ("os", "system"),
    ("os", "popen"),
    ("subprocess", "getoutput"),
    ("subprocess", "getstatusoutput"),
    ("tempfile", "mktemp"),
    ("torch", "load"),
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_of_ours_runs_what_it_reads(path: Path) -> None:
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not FORBIDDEN_MODULES & {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name):
                assert called.id not in FORBIDDEN_CALLS, ast.unparse(node)
            elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                assert (called.value.id, called.attr) not in FORBIDDEN_ATTRIBUTES, ast.unparse(node)
            shell = [each.value for each in node.keywords if each.arg == "shell"]
            assert not shell, ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith(("/tmp", "/var/tmp", "/dev/shm")), node.value
            assert node.value not in ("0.0.0.0", "::"), "an address that others reach"


def test_sources_were_looked_at() -> None:
    assert len(SOURCES) > 60
