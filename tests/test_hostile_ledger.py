"""Random bytes in the ledger's file while engines use it: sentences, no crash, nothing too much."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvcached_plugins import control
from kvcached_plugins.shares import Shares
from kvcached_vmm import records
from kvcached_vmm.account import Account
from kvcached_vmm.errors import KVCachedError, LedgerError
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.policy import Spending
from kvcached_vmm.records import FILE_BYTES, HEADER_BYTES, RECORD_BYTES
from kvcached_vmm.units import MIB

BUDGET = 100 * MIB
SPENDING = Spending(MIB, MIB, 0, 0, 0, (1.0,) * 8)
USED_BYTES = HEADER_BYTES + 3 * RECORD_BYTES

many = settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


class House:
    """Two engines and an onlooker in one ledger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "host.ledger"
        self.onlooker = Ledger.open(folder, "host")
        self.accounts = [Ledger.open(folder, "host").join(name, BUDGET) for name in ("ada", "bob")]
        self.shares = [Shares([(account, 1)]) for account in self.accounts]
        for shares in self.shares:
            shares.commit(shares.reserve(40 * MIB, MIB), 30 * MIB)
            shares.report(SPENDING, MIB, 0)

    @property
    def used_bytes(self) -> int:
        """What the engines have, by their own account."""
        return sum(each._committed + each._reserved for each in self.accounts)

    def write(self, at: int, raw: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(raw)

    def live(self) -> None:
        """All that engines do with a ledger, as their schedulers do it: nothing may raise."""
        for shares in self.shares:
            granted = shares.reserve(20 * MIB, MIB)
            shares.commit(granted, granted // 2 // MIB * MIB)
            shares.others_wait()
            shares.others_covet()
            assert shares.owed_bytes() >= 0
            shares.fair_share_bytes()
            shares.cache_bytes()
            shares.limit_bytes()
            shares.trims()
            shares.report(SPENDING, MIB, MIB)
            shares.release(MIB)
            assert self.used_bytes <= BUDGET, "more was granted than there is"

    def look(self) -> list[str]:
        """All that people do with it: an answer or a sentence."""
        said: list[str] = []
        looks: list[Callable[[], object]] = [
            self.onlooker.snapshot,
            lambda: control.read(self.folder),
            lambda: control.trim(directory=self.folder),
            lambda: control.limit("ada", weight=2, directory=self.folder),
            lambda: Ledger.open(self.folder, "host").close(),
        ]
        for look in looks:
            try:
                look()
            except KVCachedError as error:
                said.append(str(error))
        return said

    def close(self) -> None:
        for account in self.accounts:
            account.close()
        self.onlooker.close()


@pytest.fixture
def house(folder: Path) -> Iterator[House]:
    made = House(folder)
    yield made
    made.close()


damage = st.lists(
    st.tuples(
        st.one_of(
            st.integers(0, HEADER_BYTES - 1),
            st.integers(HEADER_BYTES, USED_BYTES - 1),
            st.integers(0, FILE_BYTES - 1),
        ),
        st.one_of(
            st.binary(min_size=1, max_size=40),
            st.sampled_from([bytes(8), b"\xff" * 8, bytes(64), b"\xff" * 64]),
        ),
    ),
    min_size=1,
    max_size=4,
)


@many
@given(wounds=damage)
@example(wounds=[(16, b"\xff" * 7)])  # a budget of 64 PiB
@example(wounds=[(28, bytes(4))])  # nobody is there, it says
@example(wounds=[(28, b"\x01\x01")])  # 257 are, of 256
@example(wounds=[(HEADER_BYTES, bytes(8))])  # a record without a process id
@example(wounds=[(HEADER_BYTES, b"\xff" * RECORD_BYTES * 2)])
@example(wounds=[(32, b"\xff" * 8)])  # the count of changes
def test_engines_outlive_any_damage_and_are_granted_nothing_that_is_not_there(
    tmp_path_factory: pytest.TempPathFactory, wounds: list[tuple[int, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    folder.chmod(0o700)
    house = House(folder)
    try:
        for at, raw in wounds:
            house.write(at, raw[: FILE_BYTES - at])
            house.live()
            for sentence in house.look():
                assert "\n" not in sentence
        house.live()
    finally:
        house.close()
        shutil.rmtree(folder)


def test_damage_is_mended_by_who_it_was_done_to(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner writes what it knows of itself: the others see it again."""
    monkeypatch.setattr("kvcached_vmm.ledger.CHECK_SECONDS", 0.0)
    before = house.onlooker.snapshot().used_bytes
    for section in (records.WHO, records.USE, records.COUNTERS):
        house.write(HEADER_BYTES + section.at, bytes(section.size))
    with contextlib.suppress(LedgerError):
        assert house.onlooker.snapshot().used_bytes < before
    house.shares[0].report(SPENDING, 0, 0)
    view = house.onlooker.snapshot()
    assert [each.name for each in view.accounts] == ["ada", "bob"]
    assert view.used_bytes == before


def test_a_damaged_header_is_told_once_and_engines_keep_what_they_have(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.write(16, b"\xff" * 6)
    for _ in range(3):
        assert house.shares[0].reserve(MIB, MIB) == 0
        house.shares[0].release(MIB)
    (said,) = [each.message for each in caplog.records]
    assert "The header of the ledger" in said
    assert said.endswith("or set KVCACHED_DIR to another folder.")


GOOD = records.HEADER.pack(records.MAGIC, records.VERSION, records.SLOTS, 0, 0, 0)


@many
@given(size=st.integers(0, FILE_BYTES + 10), seed=st.integers(0, 99), good=st.integers(0, 32))
def test_a_file_of_any_content_is_a_ledger_or_refused_and_kept(
    tmp_path_factory: pytest.TempPathFactory, size: int, seed: int, good: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    folder.chmod(0o700)
    content = (GOOD[:good] + random.Random(seed).randbytes(FILE_BYTES + 10))[:size]
    path = folder / "host.ledger"
    path.touch(mode=0o600)
    path.write_bytes(content)
    said = ""
    try:
        with contextlib.closing(Ledger.open(folder, "host")) as ledger:
            ledger.join("engine", BUDGET).reserve(MIB)
    except LedgerError as error:
        said = str(error)
    unchanged = path.read_bytes() == content
    shutil.rmtree(folder)
    assert not said or (said.endswith(".") and unchanged)


def test_a_ledger_cut_short_is_refused(folder: Path) -> None:
    Ledger.open(folder, "host").close()
    for size in (1, 31, HEADER_BYTES, FILE_BYTES // 2, FILE_BYTES - 1):
        os.truncate(folder / "host.ledger", size)
        with pytest.raises(LedgerError, match="is not a ledger that this version understands"):
            Ledger.open(folder, "host")


def test_a_record_of_a_living_engine_without_a_process_id_is_damage(
    folder: Path, house: House
) -> None:
    """Its owner is alive, so what it has is not free."""
    house.write(HEADER_BYTES, bytes(8))
    bob: Account = house.accounts[1]
    house.accounts[0].release(MIB)  # so that bob looks anew
    with pytest.raises(LedgerError, match=r"^Record 0 of the ledger .+ is damaged"):
        bob.reserve(60 * MIB)
