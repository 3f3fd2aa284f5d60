"""Options that several commands have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

Directory = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        metavar="FOLDER",
        help="Where the ledgers are, if not where KVCACHED_DIR says.",
        show_default=False,
    ),
]


def finite(seconds: float | None) -> float | None:
    """For a number of seconds: a range lets ``nan`` through, which is in none."""
    if seconds is not None and not math.isfinite(seconds):
        raise typer.BadParameter(f"{seconds} is not a number of seconds.")
    return seconds
