"""Whatever is typed behind `kvcached`: an answer or one sentence, a documented exit status, no
traceback; and nothing is changed by what is not understood."""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvcached_plugins.cli import main
from kvcached_vmm.errors import SettingsError
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import MIB

OPTIONS = {
    "list": ("--json", "--dir"),
    "top": ("--interval", "--once", "--replay", "--sort", "--dir"),
    "record": ("--seconds", "--interval", "--replay", "--dir"),
    "limit": ("--min", "--max", "--weight", "--cache", "--dir"),
    "trim": ("--all", "--wait", "--dir"),
    "doctor": ("--json",),
    "bench": ("--device", "--size", "--json"),
    "demo": ("--budget", "--seconds", "--out", "--engine", "--json", "--no-compare"),
    "contract": ("generate", "check", "list", "--engine", "--installed", "--wheel", "--symbols"),
    "exporter": ("--host", "--port", "--textfile", "--every", "--dir"),
    "version": (),
}
STATUSES = {0, 1, 2, 130}
"""130 is for Ctrl-C, which ends here what would go on for ever."""

few = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)

# What a shell can pass: no NUL; bytes that are not UTF-8 arrive as lone surrogates. No slash
# either: commands write where they are told to, and tests may run as root.
typed = st.text(
    st.one_of(
        st.characters(exclude_characters="\0/", exclude_categories=("Cs",)),
        st.sampled_from([chr(code) for code in range(0xDC80, 0xDD00)]),
    ),
    max_size=12,
)
numbers = st.sampled_from(
    [
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "1e999",
        "1e-320",
        "9" * 30,
        "1_0",
        "٣",
        "0x10",
        "1GiB",
        "none",
    ]
)
names = st.sampled_from(["llama", "x.json", "x.png", "-", "--", "", "--help", "--min=", "-\udcff"])


class Ran(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def house(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """An engine that could be changed, and nothing that waits, listens, measures, downloads or
    writes manifests."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("KVCACHED_DIR", str(folder))

    def sleep(seconds: float) -> None:
        assert seconds >= 0, "time.sleep would raise"
        assert seconds < threading_limit, "time.sleep would raise"
        raise KeyboardInterrupt

    class Event:
        def wait(self, seconds: float) -> bool:
            assert 0 <= seconds < threading_limit, "Event.wait would raise"
            return True

    def refuse(*_: object, **__: object) -> None:
        raise SettingsError("This is as far as a test goes.")

    def no_port(*_: object) -> None:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr("time.sleep", sleep)
    from kvcached_plugins.cli import bench, contract, demo, exporter

    monkeypatch.setattr(exporter, "start_http_server", no_port)
    monkeypatch.setattr(exporter.signal, "signal", lambda *_: None)
    monkeypatch.setattr(exporter.threading, "Event", Event)
    monkeypatch.setattr(bench.measuring, "measure", refuse)
    monkeypatch.setattr(demo, "_measure", refuse)
    monkeypatch.setattr(contract, "_describe_release", refuse)
    monkeypatch.setattr(contract, "_write", refuse)  # over a manifest of this very checkout
    ledger = Ledger.open(folder, "host")
    ledger.join("llama", 100 * MIB, minimum_bytes=MIB, maximum_bytes=50 * MIB, weight=2.0)
    yield ledger
    ledger.close()


threading_limit = 9e9
"""Seconds beyond which the interpreter cannot wait."""


def kvcached(*arguments: str) -> Ran:
    """Run the command as its entry point does, on a terminal that knows UTF-8 only."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors)
        for errors in ("strict", "backslashreplace")  # as the interpreter opens them
    )
    argv, sys.argv = sys.argv, ["kvcached", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        status: object = 0
    except SystemExit as end:
        status = end.code if end.code is not None else 0
    finally:
        sys.argv = argv
    out.flush()
    err.flush()
    assert isinstance(status, int), status
    return Ran(status, *(each.buffer.getvalue().decode() for each in (out, err)))  # type: ignore[attr-defined]


def terms(ledger: Ledger) -> tuple[int, int | None, float, int | None]:
    (account,) = ledger.snapshot().accounts
    return account.minimum_bytes, account.maximum_bytes, account.weight, account.cache_bytes


def check(arguments: Sequence[str], house: Ledger) -> Ran:
    before = terms(house)
    ran = kvcached(*arguments)
    assert ran.status in STATUSES, ran
    assert "Traceback" not in ran.out + ran.err
    if ran.status == 2:
        assert (ran.err or ran.out).strip(), "a refusal without a word"
        assert terms(house) == before
    return ran


@pytest.mark.parametrize("command", OPTIONS)
@few
@given(data=st.data())
def test_any_arguments_are_answered(command: str, house: Ledger, data: st.DataObject) -> None:
    words = st.one_of(typed, numbers, names, st.sampled_from([*OPTIONS[command], "llama"]))
    check([command, *data.draw(st.lists(words, max_size=5), label="arguments")], house)


@few
@given(st.lists(st.one_of(typed, names, st.sampled_from(list(OPTIONS))), max_size=4))
def test_any_command_is_answered(house: Ledger, arguments: list[str]) -> None:
    check(arguments, house)


OPTION_VALUES = [
    (command, option)
    for command, options in OPTIONS.items()
    for option in options
    if option.startswith("--") and option not in ("--json", "--once", "--all", "--no-compare")
]
BEFORE = {"limit": ["llama"], "record": ["x.json"], "trim": ["llama"], "contract": ["list"]}


@pytest.mark.parametrize(("command", "option"), OPTION_VALUES, ids=lambda each: each.strip("-"))
@few
@given(value=st.one_of(numbers, typed))
@example(value="nan")
@example(value="inf")
@example(value="\udcff\udcfe")
def test_any_value_of_any_option_is_answered(
    command: str, option: str, house: Ledger, value: str
) -> None:
    check([command, *BEFORE.get(command, []), f"{option}={value}"], house)


SECONDS = [
    ("top", "--interval"),
    ("record", "--interval"),
    ("record", "--seconds"),
    ("trim", "--wait"),
    ("exporter", "--every"),
    ("demo", "--seconds"),
]


@pytest.mark.parametrize(("command", "option"), SECONDS, ids=lambda each: each.strip("-"))
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_no_time_is_no_number(command: str, option: str, value: str, house: Ledger) -> None:
    assert check([command, *BEFORE.get(command, []), f"{option}={value}"], house).status == 2


@given(st.sampled_from(["--min", "--max", "--cache"]), st.integers(-(1 << 70), 1 << 70))
@few
def test_a_size_is_had_as_it_was_given_or_refused(house: Ledger, option: str, size: int) -> None:
    before = terms(house)
    ran = check(["limit", "llama", f"{option}={size}"], house)
    after = terms(house)
    if ran.status == 0:
        assert after[("--min", "--max", "", "--cache").index(option)] == size
    else:
        assert after == before
        assert re.fullmatch(r"kvcached: [^\n]+\n", ran.err), ran.err


@given(st.floats())
@few
def test_a_weight_is_a_number_of_a_sensible_size_or_refused(house: Ledger, weight: float) -> None:
    ran = check(["limit", "llama", f"--weight={weight!r}"], house)
    assert (ran.status == 0) == (0.01 <= weight <= 100)
    assert math.isfinite(terms(house)[2])


def test_a_name_that_is_no_text_is_not_found_in_one_sentence(house: Ledger) -> None:
    ran = check(["limit", "\udcff\x1b[31m\n", "--min=1MiB"], house)
    assert ran.status == 2
    assert ran.err.count("\n") == 1
    assert "\x1b" not in ran.err
