"""`kvcached limit` and `kvcached trim`: steering from the shell."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from kvcached_vmm.account import Account
from kvcached_vmm.units import MIB

Join = Callable[..., Account]


def test_limits_are_set_as_people_write_them_and_printed(
    join: Join, kvcached: Callable[..., Any]
) -> None:
    account = join("llama")
    account.reserve(9 * MIB)
    ran = kvcached(
        *("limit", "llama", "--min", "1 MiB", "--max", "8M", "--weight", "2", "--cache", "0.5m")
    )
    terms = account.terms
    assert ran.status == 0
    assert (terms.minimum, terms.maximum, terms.weight, terms.cache) == (
        *(MIB, 8 * MIB, 2.0, MIB // 2),
    )
    assert ran.out == (
        f"llama (pid {os.getpid()}) on host: minimum 1 MiB, maximum 8 MiB, weight 2, "
        "cache 512 KiB, uses 9 MiB, 1 MiB too much: it gives back as blocks come free\n"
    )


def test_none_clears_and_without_options_it_only_prints(
    join: Join, kvcached: Callable[..., Any]
) -> None:
    account = join("llama", maximum_bytes=MIB, cache_bytes=MIB)
    kvcached("limit", "llama", "--max", "none", "--cache", "none")
    version = account.terms.version
    ran = kvcached("limit", "llama")
    assert "maximum none, weight 1, cache none" in ran.out
    assert account.terms.version == version + 1, "each change makes a new version"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["llama", "--max", "2 apples"], "--max: '2 apples' is not accepted: give a size from 0"),
        (["llama", "--min", "none"], "--min: 'none' is not accepted"),
        (["llama", "--cache", "-1"], "--cache: '-1' is not accepted"),
        (["llama", "--weight", "0"], "--weight: '0' is not accepted: give a number from 0.01"),
        (["llama", "--min", "2GiB"], "--min: 2 GiB cannot be guaranteed"),
        (["lama"], "No engine is called 'lama'; did you mean 'llama'?"),
        ([], "Missing argument 'NAME'"),
    ],
)
def test_a_mistake_names_the_option_and_what_is_accepted(
    join: Join, kvcached: Callable[..., Any], arguments: list[str], complaint: str
) -> None:
    account = join("llama")
    before = account.terms
    ran = kvcached("limit", *arguments)
    assert (ran.status, ran.out) == (2, "")
    assert complaint in ran.err
    assert "Traceback" not in ran.err
    assert account.terms == before


def test_trim_says_what_came_back(join: Join, kvcached: Callable[..., Any]) -> None:
    account, other = join("llama"), join("qwen", "GPU-1")
    account.commit(account.reserve(8 * MIB), 8 * MIB)
    account.report(2 * MIB, 4 * MIB, idle_bytes=2 * MIB, evictable_bytes=4 * MIB)

    def obey() -> None:
        while not account.terms.trims:
            time.sleep(0.001)
        account.release(6 * MIB)
        account.report(2 * MIB, 0)

    thread = threading.Thread(target=obey)
    thread.start()
    ran = kvcached("trim", "--all")
    thread.join()
    assert ran.status == 0
    assert f"llama (pid {os.getpid()}) on host: 6 MiB given back, uses 2 MiB" in ran.out
    assert "qwen" in ran.out
    assert other.terms.trims == 1


def test_trim_does_not_wait_for_an_engine_that_does_not_answer(
    join: Join, kvcached: Callable[..., Any]
) -> None:
    account = join("llama")
    account.commit(account.reserve(8 * MIB), 8 * MIB)
    account.report(2 * MIB, 4 * MIB, evictable_bytes=4 * MIB)
    begin = time.monotonic()
    ran = kvcached("trim", "llama")
    assert time.monotonic() - begin < 3
    assert (ran.status, "0 B given back, uses 8 MiB" in ran.out) == (0, True)


@pytest.mark.parametrize("arguments", [[], ["llama", "--all"]])
def test_trim_wants_a_name_or_all(
    join: Join, kvcached: Callable[..., Any], arguments: list[str]
) -> None:
    account = join("llama")
    ran = kvcached("trim", *arguments)
    assert (ran.status, account.terms.trims) == (2, 0)
    assert "Give the NAME of an engine, or --all" in ran.err


def test_trim_of_nobody_is_no_failure(kvcached: Callable[..., Any]) -> None:
    assert kvcached("trim", "--all")[:2] == (0, "No engine shares a budget here.\n")
