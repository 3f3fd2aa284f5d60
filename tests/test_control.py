"""What other programs see of engines, and how they steer them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_plugins import control, limits
from kvcached_vmm.account import Account
from kvcached_vmm.errors import LedgerError
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import LARGEST, MIB

fork = multiprocessing.get_context("fork")
Join = Callable[..., Account]
BUDGET = 100 * MIB
GPU = "GPU-12345678-9abc-def0-1234-56789abcdef0"


@pytest.fixture
def elsewhere(folder: Path) -> Iterator[Callable[..., int]]:
    """Starts an engine in a process of its own; returns its process id."""
    processes = []

    def engine(name: str, device: str = "host", used_bytes: int = 0) -> int:
        def live() -> None:
            account = Ledger.open(folder, device).join(name, BUDGET)
            account.reserve(used_bytes)
            theirs.send("ready")
            theirs.poll(60)

        ours, theirs = fork.Pipe()
        process = fork.Process(target=live, daemon=True)
        process.start()
        ours.recv()
        processes.append((process, ours))
        assert process.pid is not None
        return process.pid

    yield engine
    for process, _ in processes:
        process.kill()
        process.join()


def test_reading_makes_nothing_and_an_absent_folder_has_no_engines(tmp_path: Path) -> None:
    assert control.read(tmp_path / "absent" / "deeper").ledgers == ()
    assert list(tmp_path.iterdir()) == []


def test_all_engines_on_all_devices_are_read(folder: Path, join: Join) -> None:
    join("a").reserve(MIB)
    join("b", GPU).reserve(2 * MIB)
    reading = control.read(folder)
    used = {view.device: view.used_bytes for view in reading.ledgers}
    assert used == {"host": MIB, GPU: 2 * MIB}
    assert abs(reading.at - time.time()) < 10
    assert reading.faults == ()


def test_the_folder_is_the_one_that_engines_use(
    folder: Path, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    join("a")
    monkeypatch.setenv("KVCACHED_DIR", str(folder))
    assert control.find("a").pids == (os.getpid(),)


def test_a_ledger_that_cannot_be_read_does_not_hide_the_others(folder: Path, join: Join) -> None:
    join("a")
    (folder / "GPU-broken.ledger").write_bytes(b"something else")
    (folder / "GPU-broken.ledger").chmod(0o600)
    reading = control.read(folder)
    assert [view.device for view in reading.ledgers] == ["host"]
    assert len(reading.faults) == 1
    assert "GPU-broken.ledger is not a ledger" in reading.faults[0]
    assert control.find("a", folder).name == "a"


def test_an_engine_is_found_by_its_name_or_its_process(
    folder: Path, join: Join, elsewhere: Callable[..., int]
) -> None:
    join("llama")
    pid = elsewhere("qwen")
    assert control.find("llama", folder).pids == (os.getpid(),)
    assert control.find("qwen", folder).pids == (pid,)
    assert control.find(str(pid), folder).name == "qwen"


def test_a_name_that_is_a_number_comes_before_a_process(folder: Path, join: Join) -> None:
    join(str(os.getpid()))
    join("other")
    assert control.find(str(os.getpid()), folder).name == str(os.getpid())


@pytest.mark.parametrize(
    ("asked", "nearest"), [("lama", "llama-8b"), ("LLAMA-8B", "llama-8b"), ("zzz", None)]
)
def test_an_unknown_name_suggests_the_nearest(
    folder: Path, join: Join, asked: str, nearest: str | None
) -> None:
    join("llama-8b")
    join("qwen")
    with pytest.raises(control.UnknownEngine) as raised:
        control.find(asked, folder)
    assert (raised.value.name, raised.value.nearest) == (asked, nearest)
    assert ("did you mean 'llama-8b'?" if nearest else "there are llama-8b, qwen") in str(
        raised.value
    )


def test_where_there_is_no_engine_the_folder_is_named(folder: Path) -> None:
    with pytest.raises(control.UnknownEngine, match=f"No engine shares a budget in {folder}"):
        control.find("any", folder)


def test_two_engines_of_one_name_are_told_apart_by_process(
    folder: Path, join: Join, elsewhere: Callable[..., int]
) -> None:
    own, pid = join("llama"), elsewhere("llama")
    with pytest.raises(control.AmbiguousEngine) as raised:
        control.limit("llama", maximum=MIB, directory=folder)
    assert set(raised.value.pids) == {os.getpid(), pid}
    assert all(str(each) in str(raised.value) for each in (os.getpid(), pid))
    control.limit(str(pid), maximum=MIB, directory=folder)
    assert own.terms.maximum > BUDGET
    assert control.find(str(pid), folder).accounts["host"].maximum_bytes == MIB


def test_a_process_with_several_engines_needs_a_name(folder: Path, join: Join) -> None:
    join("a")
    join("b")
    with pytest.raises(control.AmbiguousEngine, match="has several engines: 'a', 'b'"):
        control.find(str(os.getpid()), folder)


def test_a_killed_engine_is_not_found(folder: Path, elsewhere: Callable[..., int]) -> None:
    pid = elsewhere("llama", used_bytes=MIB)
    assert control.find("llama", folder).used_bytes == MIB
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(control.UnknownEngine):
        control.find("llama", folder)


def test_a_limit_is_in_force_at_once_and_wakes_its_engine(folder: Path, join: Join) -> None:
    account = join("llama")
    heard: list[float] = []

    def listen() -> None:
        account.wait_for_bell(before, 10)
        heard.append(time.monotonic())

    before = account._ledger.bell.rings
    thread = threading.Thread(target=listen)
    thread.start()
    time.sleep(0.05)
    asked = time.monotonic()
    engine = control.limit(
        "llama", minimum="1MiB", maximum=2 * MIB, weight="2.5", cache=0, directory=folder
    )
    terms = account.terms
    assert (terms.minimum, terms.maximum, terms.weight, terms.cache) == (MIB, 2 * MIB, 2.5, 0)
    seen = engine.accounts["host"]
    assert (seen.minimum_bytes, seen.maximum_bytes, seen.cache_bytes) == (MIB, 2 * MIB, 0)
    thread.join()
    assert heard[0] - asked < 1
    assert account.reserve(BUDGET) == 2 * MIB


def test_a_limit_below_what_is_used_is_accepted(folder: Path, join: Join) -> None:
    account = join("llama")
    account.reserve(10 * MIB)
    control.limit("llama", maximum=0, directory=folder)
    assert account.reserve(1) == 0
    account.cancel(10 * MIB)
    control.limit("llama", maximum="none", directory=folder)
    assert account.reserve(BUDGET) == BUDGET


def test_none_takes_bounds_away_and_what_is_not_named_stays(folder: Path, join: Join) -> None:
    account = join("llama", maximum_bytes=9 * MIB, cache_bytes=MIB, weight=3.0)
    control.limit("llama", cache="None", directory=folder)
    assert (account.terms.cache, account.terms.maximum, account.terms.weight) == (-1, 9 * MIB, 3.0)
    engine = control.limit("llama", maximum=" none ", directory=folder)
    assert engine.accounts["host"].maximum_bytes is None


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("minimum", -1),
        ("minimum", "none"),
        ("minimum", True),
        ("minimum", 1.5),
        ("maximum", "2 apples"),
        ("maximum", ""),
        ("maximum", LARGEST),
        ("cache", "-1"),
        ("cache", float("nan")),
        ("weight", 0),
        ("weight", -1),
        ("weight", "inf"),
        ("weight", "nan"),
        ("weight", "heavy"),
        ("weight", True),
        ("weight", 101),
        ("weight", 0.001),
    ],
)
def test_what_is_no_limit_is_refused_by_name(
    folder: Path, join: Join, argument: str, value: Any
) -> None:
    account = join("llama")
    before = account.terms
    with pytest.raises(control.BadLimit) as raised:
        control.limit("llama", directory=folder, **{argument: value})
    assert raised.value.argument == argument
    assert repr(value) in raised.value.reason
    assert account.terms == before


def test_limits_that_contradict_each_other_say_which_to_change(folder: Path, join: Join) -> None:
    join("other", minimum_bytes=70 * MIB)
    account = join("llama", minimum_bytes=10 * MIB)
    before = account.terms
    for arguments, complaint in (
        ({"maximum": MIB}, "maximum: 1 MiB is less than the minimum of llama, 10 MiB"),
        ({"minimum": 9 * MIB, "maximum": MIB}, "minimum: 9 MiB is more than the maximum"),
        ({"minimum": 31 * MIB}, "minimum: 31 MiB cannot be .* at most 30 MiB are left"),
    ):
        with pytest.raises(control.BadLimit, match=complaint):
            control.limit("llama", directory=folder, **arguments)
    assert account.terms == before
    control.limit("llama", minimum=MIB, maximum=MIB, directory=folder)


def test_an_engine_on_two_devices_has_its_limits_on_both(folder: Path, join: Join) -> None:
    ranks = [join("llama"), join("llama", GPU)]
    engine = control.limit("llama", maximum=MIB, directory=folder)
    assert set(engine.accounts) == {"host", GPU}
    assert [rank.terms.maximum for rank in ranks] == [MIB, MIB]


@pytest.mark.parametrize("looked_before", [True, False])
def test_a_refusal_on_one_device_changes_nothing_on_the_others(
    folder: Path, join: Join, monkeypatch: pytest.MonkeyPatch, looked_before: bool
) -> None:
    """Also where the refusal comes from a ledger that has changed since it was read."""
    ranks = [join("llama", GPU, cache_bytes=7, weight=2.0), join("llama", "host", cache_bytes=8)]
    join("other", "host", minimum_bytes=80 * MIB)
    if not looked_before:
        monkeypatch.setattr(limits, "check", lambda *_: None)
    before = [rank.terms._replace(version=0) for rank in ranks]
    with pytest.raises((control.BadLimit, LedgerError), match="cannot be guaranteed"):
        control.limit(
            "llama", minimum=30 * MIB, maximum=50 * MIB, cache=1, weight=5, directory=folder
        )
    assert [rank.terms._replace(version=0) for rank in ranks] == before


sizes = st.one_of(
    st.none(),
    st.integers(0, 2 * BUDGET),
    st.integers(0, 300).map(lambda mib: f"{mib}MiB"),
)
bounds = st.one_of(sizes, st.just("none"))
weights = st.one_of(st.none(), st.floats(0.001, 200), st.floats(0.01, 100).map(str))


@given(st.lists(st.tuples(sizes, bounds, weights, bounds), max_size=8))
def test_any_limits_are_in_force_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[Any, Any, Any, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("ledgers")
    folder.chmod(0o700)
    with (
        contextlib.closing(Ledger.open(folder, "host")) as first,
        contextlib.closing(Ledger.open(folder, "host")) as second,
    ):
        account = first.join("llama", BUDGET)
        second.join("other", BUDGET, minimum_bytes=BUDGET // 4)
        for minimum, maximum, weight, cache in changes:
            old = account.terms
            wanted = limits.Change(old.minimum, old.maximum, old.weight, old.cache)
            with contextlib.suppress(control.BadLimit):
                asked = limits.change(minimum, maximum, weight, cache)
                wanted = limits.Change(
                    *(b if a is None else a for a, b in zip(asked, wanted, strict=True))
                )
            try:
                control.limit(
                    "llama",
                    minimum=minimum,
                    maximum=maximum,
                    weight=weight,
                    cache=cache,
                    directory=folder,
                )
            except control.BadLimit:
                assert account.terms == old
            else:
                terms = account.terms
                assert (terms.minimum, terms.weight, terms.cache) == (
                    wanted.minimum,
                    wanted.weight,
                    wanted.cache,
                )
                assert terms.maximum == wanted.maximum or wanted.maximum == -1
            assert account.terms.minimum <= account.terms.maximum
            assert account.terms.minimum <= BUDGET - BUDGET // 4


def test_trim_asks_one_or_all(folder: Path, join: Join) -> None:
    first, second = join("a"), join("b", GPU)
    assert [engine.name for engine in control.trim("a", folder)] == ["a"]
    assert (first.terms.trims, second.terms.trims) == (1, 0)
    assert len(control.trim(directory=folder)) == 2
    assert (first.terms.trims, second.terms.trims) == (2, 1)
    with pytest.raises(control.UnknownEngine):
        control.trim("c", folder)


def test_trim_of_nobody_asks_nobody(tmp_path: Path) -> None:
    assert control.trim(directory=tmp_path / "absent") == ()
    assert list(tmp_path.iterdir()) == []
