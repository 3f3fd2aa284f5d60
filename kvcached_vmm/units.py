"""Sizes as people write them, and rounding."""

from __future__ import annotations

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
LARGEST = 1 << 60
"""No size that people write reaches this; the ledger counts in signed 64-bit numbers."""

_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d+)?)\s*(?:([kmgt])i?)?b?\s*", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes in ``text``: ``512MiB``, ``512M``, ``1.5 GiB``, ``4096``. Units are powers of 1024.

    Raises:
        ValueError: ``text`` is not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 512MiB or 2GiB")
    number, power = match.groups(default="")
    whole, _, part = number.partition(".")
    unit = 1 << 10 * _POWER[power.lower()]
    tenths: int = 10 ** len(part)
    size = int(whole) * unit + int(part or 0) * unit // tenths
    if size >= LARGEST:
        raise ValueError(f"{text!r} is more than any machine has")
    return size


def format_size(size_bytes: int) -> str:
    """``size_bytes`` in the largest binary unit that keeps it at least 1: ``1.5 GiB``."""
    value = float(size_bytes)
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    unit = units[0]
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def ceil_to(value: int, step: int) -> int:
    """The smallest multiple of ``step`` that is not below ``value``."""
    return -(-value // step) * step


def floor_to(value: int, step: int) -> int:
    """The largest multiple of ``step`` that is not above ``value``."""
    return value // step * step
