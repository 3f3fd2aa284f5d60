"""The ledger's file and folder: private, whole, of our version, or refused and left alone."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from pathlib import Path

import pytest

from kvcached_vmm.errors import LedgerError
from kvcached_vmm.ledger import Ledger

GOOD = struct.pack("<8sIIqII", b"KVLEDGER", 1, 256, 0, 0, 0).ljust(256 + 256 * 256, b"\0")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"not a ledger", id="garbage"),
        pytest.param(bytes(range(256)) * 257, id="garbage-of-the-right-size"),
        pytest.param(GOOD[:-1], id="truncated"),
        pytest.param(GOOD + b"\0", id="too-long"),
        pytest.param(GOOD[:8] + b"\2" + GOOD[9:], id="another-version"),
        pytest.param(GOOD[:12] + b"\1" + GOOD[13:], id="another-number-of-records"),
        pytest.param(GOOD[:28] + b"\xff\xff" + GOOD[30:], id="records-past-the-end"),
    ],
)
def test_a_file_that_is_no_ledger_of_ours_is_refused_and_kept(folder: Path, content: bytes) -> None:
    path = folder / "host.ledger"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(LedgerError, match=r"is not a ledger that this version understands; .+\.$"):
        Ledger.open(folder, "host").snapshot()
    assert path.read_bytes() == content


@pytest.mark.parametrize("what", ["symlink", "hard-link", "mode", "owner", "folder", "fifo"])
def test_a_file_that_others_could_reach_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path, other = folder / "host.ledger", tmp_path / "other"
    other.write_bytes(GOOD)
    other.chmod(0o600)
    {
        "symlink": lambda: path.symlink_to(other),
        "hard-link": lambda: path.hardlink_to(other),
        "mode": lambda: (path.write_bytes(GOOD), path.chmod(0o640)),
        "owner": lambda: (other.rename(path), foreign_files(monkeypatch)),
        "folder": lambda: path.mkdir(mode=0o700),
        "fifo": lambda: os.mkfifo(path, 0o600),
    }[what]()
    with pytest.raises(LedgerError, match=r"KVCACHED_DIR at a folder of your own\.$"):
        Ledger.open(folder, "host")
    assert what == "owner" or other.read_bytes() == GOOD


def foreign_files(patch: pytest.MonkeyPatch) -> None:
    """From now on plain files belong to another user than we are."""
    fstat, user = os.fstat, os.geteuid() + 1
    patch.setattr(os, "fstat", lambda fd: os.stat_result([*fstat(fd)[:4], user, *fstat(fd)[5:]]))


def denied(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("what", ["mode", "symlink", "file", "owner", "no permission"])
def test_a_folder_that_others_could_enter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path = tmp_path / "shared"
    if what == "symlink":
        (tmp_path / "real").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "real")
    elif what == "file":
        path.touch()
    elif what == "no permission":
        monkeypatch.setattr(Path, "mkdir", denied)
    else:
        path.mkdir(mode=0o755 if what == "mode" else 0o700)
    if what == "owner":
        user = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(LedgerError, match=r"KVCACHED_DIR at a folder of your own\.$"):
        Ledger.open(path, "host")


def test_a_full_disk_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(LedgerError, match="No space left on device"):
        Ledger.open(folder, "host")


def test_folder_and_file_are_made_for_their_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    Ledger.open(folder, "GPU-1").close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "GPU-1.ledger").stat().st_mode) == 0o600


def test_each_device_has_a_file_of_its_own_that_outlives_its_engines(folder: Path) -> None:
    """A SIGTERM to one engine deleted what others shared, in prior art."""
    ledgers = [Ledger.open(folder, device) for device in ("GPU-1", "GPU-2")]
    accounts = [ledger.join("engine", 100) for ledger in ledgers]
    assert [account.reserve(100) for account in accounts] == [100, 100]
    for account in accounts:
        account.close()
    assert {path.name for path in folder.iterdir()} == {"GPU-1.ledger", "GPU-2.ledger"}


def test_a_ledger_is_opened_again_where_it_was_left(folder: Path) -> None:
    with contextlib.closing(Ledger.open(folder, "host")) as first:
        first.join("engine", 100).reserve(40)
        with contextlib.closing(Ledger.open(folder, "host")) as second:
            assert second.snapshot().used_bytes == 40
