"""What a user may write as a limit, and whether a ledger can have it."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

from kvcached_vmm.errors import KVCachedError
from kvcached_vmm.records import AccountView, LedgerView
from kvcached_vmm.units import LARGEST, format_size, parse_size

NONE = "none"
"""Takes a maximum or a bound of the cache away."""

SMALLEST_WEIGHT, LARGEST_WEIGHT = 0.01, 100.0

Size = int | str
"""Bytes, or a size as people write them: ``512MiB``."""


class BadLimit(KVCachedError):
    """A limit cannot be had: ``argument`` is minimum, maximum, weight or cache, ``reason`` why."""

    def __init__(self, argument: str, reason: str) -> None:
        super().__init__(f"{argument}: {reason}")
        self.argument = argument
        self.reason = reason


class Change(NamedTuple):
    """What ``Ledger.set_terms`` is told; a bound below 0 is none, None stays as it is."""

    minimum: int | None
    maximum: int | None
    weight: float | None
    cache: int | None


def change(
    minimum: Size | None, maximum: Size | None, weight: float | str | None, cache: Size | None
) -> Change:
    """What was written, checked.

    Raises:
        BadLimit: one of them is not a limit.
    """
    return Change(
        None if minimum is None else _size("minimum", minimum, "0 for no guarantee"),
        _bound("maximum", maximum),
        None if weight is None else _weight(weight),
        _bound("cache", cache),
    )


def check(change: Change, account: AccountView, view: LedgerView) -> None:
    """Would the ledger take the change? It decides itself, when the change is made.

    Raises:
        BadLimit: it would not.
    """
    minimum = account.minimum_bytes if change.minimum is None else change.minimum
    maximum = account.maximum_bytes if change.maximum is None else change.maximum
    if maximum is not None and 0 <= maximum < minimum:
        if change.minimum is None:
            raise BadLimit(
                "maximum",
                f"{format_size(maximum)} is less than the minimum of {account.name}, "
                f"{format_size(minimum)}; lower that as well.",
            )
        raise BadLimit(
            "minimum",
            f"{format_size(minimum)} is more than the maximum of {account.name}, "
            f"{format_size(maximum)}; raise that as well, or lower this.",
        )
    others = sum(each.minimum_bytes for each in view.accounts if each.slot != account.slot)
    if change.minimum is not None and minimum + others > view.budget_bytes:
        raise BadLimit(
            "minimum",
            f"{format_size(minimum)} cannot be guaranteed: of {format_size(view.budget_bytes)} on "
            f"{view.device}, {format_size(others)} are promised to other engines; at most "
            f"{format_size(max(0, view.budget_bytes - others))} are left.",
        )


def _bound(argument: str, value: Size | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, str) and value.strip().lower() == NONE:
        return -1
    return _size(argument, value, f"{NONE} for no bound")


def _size(argument: str, value: Size, otherwise: str) -> int:
    size: object = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            size = parse_size(value)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < LARGEST:
        raise BadLimit(
            argument,
            f"{value!r} is not accepted: give a size from 0 up, such as 512MiB or 2GiB, "
            f"or {otherwise}.",
        )
    return size


def _weight(value: float | str) -> float:
    number = math.nan
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        number = float(value)
    if isinstance(value, bool) or not SMALLEST_WEIGHT <= number <= LARGEST_WEIGHT:
        raise BadLimit(
            "weight",
            f"{value!r} is not accepted: give a number from {SMALLEST_WEIGHT:g} to "
            f"{LARGEST_WEIGHT:g}; 1 is what engines have by default.",
        )
    return number
