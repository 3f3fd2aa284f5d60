"""Figures and tables as the commands print them."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size

from kvcached_vmm.records import AccountView, LedgerView

PLAIN_WIDTH = 200
"""Columns of a table that goes to a file or another program: nothing is cut off there."""


class Parts(NamedTuple):
    """What memory is good for, in bytes. They add up to all that there is.

    ``gaps`` are free blocks without content in extents that hold other blocks, ``idle`` extents
    without content: kept for reuse, or about to be released.
    """

    fixed: int
    live: int
    cached: int
    gaps: int
    idle: int
    reserved: int
    free: int

    @classmethod
    def of_engine(cls, account: AccountView) -> Parts:
        """An engine reports what its extents hold a little later than how many it has; the parts
        are cut to what it has."""
        left = account.committed_bytes
        found = []
        for part in (
            account.live_bytes,
            account.cached_bytes,
            account.idle_bytes + account.leaving_bytes,
        ):
            found.append(min(part, left))
            left -= found[-1]
        live, cached, idle = found
        return cls(account.fixed_bytes, live, cached, left, idle, account.reserved_bytes, 0)

    @classmethod
    def of_device(cls, view: LedgerView) -> Parts:
        """Of everything that is in the ledger: fixed bytes, and what KV caches may use."""
        each = [cls.of_engine(account) for account in view.accounts]
        sums = cls(*(map(sum, zip(*each, strict=True)) if each else (0,) * 7))
        return sums._replace(free=max(0, view.capacity_bytes - view.used_bytes))


def short(size_bytes: int) -> str:
    """A size in at most five characters: ``0``, ``64K``, ``1.25G``; powers of 1024."""
    value, unit = float(size_bytes), ""
    for unit in ("", "K", "M", "G", "T"):
        if value < 999.5 or unit == "T":
            break
        value /= 1024
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    text = f"{value:.0f}" if value == int(value) else f"{value:.{digits}f}"
    return text + unit


def limits(account: AccountView) -> str:
    """What an engine may have, without what is as it is by default: ``1G-4G x2 cache 512M``."""
    least = short(account.minimum_bytes)
    parts = []
    if account.maximum_bytes is not None:
        parts.append(f"{least}-{short(account.maximum_bytes)}")
    elif account.minimum_bytes:
        parts.append(f"{least}-")
    if account.weight != 1:
        parts.append(f"x{account.weight:g}")
    if account.cache_bytes is not None:
        parts.append(f"c{short(account.cache_bytes)}")
    return " ".join(parts) or "-"


def seconds(duration_s: float) -> str:
    """A duration in at most five characters: ``0.4s``, ``12s``, ``3m``, ``5h``."""
    for unit, size in (("s", 1.0), ("m", 60.0), ("h", 3600.0)):
        value = duration_s / size
        if value < 99.5 or unit == "h":
            return f"{value:.1f}{unit}" if value < 9.95 else f"{value:.0f}{unit}"
    raise AssertionError


def count(number: int, what: str) -> str:
    """So many of something."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def clock(at: float) -> str:
    """A time of day."""
    return datetime.fromtimestamp(at).strftime("%H:%M:%S")


def printable(name: str) -> str:
    """A name as it may be sent to a terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in name)


def device_name(device: str) -> str:
    """A device in at most twelve characters: the first part of a GPU's UUID."""
    return device[:12] if device.startswith("GPU-") else device


def fit(text: str, width: int, right: bool = False) -> str:
    """``text`` in exactly ``width`` columns, at least 1; what is cut out leaves an ellipsis.

    It is cut in its middle: names often differ at their ends.
    """
    length = cell_len(text)
    if length > width:
        head = set_cell_size(text, width // 2)
        tail = set_cell_size(text[::-1], width - 1 - width // 2)[::-1]
        return f"{head}\u2026{tail}"
    return " " * (width - length) + text if right else text + " " * (width - length)


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int,
    left: Sequence[int],
    gap: int = 2,
) -> list[str]:
    """Rows in columns, ``gap`` spaces apart. Where ``width`` is not enough, the first one gives.

    Args:
        headings: one per column.
        width: of a line.
        left: columns that start at the left; the others end at the right.
    """
    every = [headings, *rows]
    widths = [max(cell_len(row[index]) for row in every) for index in range(len(headings))]
    spare = width - sum(widths) - gap * (len(widths) - 1)
    widths[0] = max(min(widths[0], 8), widths[0] + min(0, spare))
    return [
        (" " * gap).join(fit(cell, widths[i], i not in left) for i, cell in enumerate(row)).rstrip()
        for row in every
    ]


def coloured() -> bool:
    """Whether what we print goes to somebody who wants colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def terminal_width() -> int:
    """Columns of the terminal; many where there is none."""
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return PLAIN_WIDTH
    try:
        return int(os.environ["COLUMNS"])
    except (KeyError, ValueError):
        pass
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def paragraph(text: str, first: str = "", indent: str = "") -> None:
    """Print a text in lines that fit; where there is no terminal, in one.

    Args:
        first: what its first line begins with, of the same width as ``indent``; may be coloured.
        indent: what the other lines begin with.
    """
    width = terminal_width()
    if width < PLAIN_WIDTH:
        text = textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)
        text = text[len(indent) :]
    print(first + text)
