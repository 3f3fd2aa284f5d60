"""`kvcached list`: which engines share a budget, and what each has."""

from __future__ import annotations

from typing import Annotated

import typer

from kvcached_plugins import control, timeline
from kvcached_plugins.cli import figures
from kvcached_plugins.cli.figures import short
from kvcached_plugins.cli.options import Directory
from kvcached_vmm.records import AccountView, LedgerView
from kvcached_vmm.units import format_size

HEADINGS = ("NAME", "ENGINE", "PID", "USED", "LIVE", "CACHED", "IDLE", "LIMITS", "WAITS")
LEFT = (0, 1, 7)


def list_engines(
    directory: Directory = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One object with every figure, sizes in bytes.")
    ] = False,
) -> None:
    """Show which engines share a budget, and what each has.

    USED is committed or granted memory: LIVE in blocks that requests use,
    CACHED in free blocks whose content is kept, IDLE in extents without
    content. LIMITS are minimum-maximum, the weight as x2, the bound of the
    cache as c1G. WAITS is for how long it has wanted more than it gets.

    The keys of --json stay as they are (kvcached_plugins/timeline.py says
    what each is); the object is one line of what `kvcached record` writes.

      kvcached list

      kvcached list --json | jq '.devices[].engines[] | {name, used_bytes}'

    Exit status: 0, also if there are none; 1 if a ledger cannot be read; 2
    for a mistake.
    """
    reading = control.read(directory)
    if as_json:
        typer.echo(timeline.dumps(reading))
    elif not any(view.accounts for view in reading.ledgers):
        if not reading.faults:
            typer.echo("No engine shares a budget here.")
    else:
        width, bold = figures.terminal_width(), figures.coloured()
        taken = [view for view in reading.ledgers if view.accounts]
        for index, view in enumerate(taken):
            heading = _heading(view, width)
            typer.echo(
                ("\n" if index else "") + (typer.style(heading, bold=True) if bold else heading)
            )
            rows = [_row(account, reading.at) for account in view.accounts]
            for number, line in enumerate(figures.table(HEADINGS, rows, width, LEFT)):
                waits = number > 0 and view.accounts[number - 1].waiting_since > 0
                typer.echo(
                    typer.style(line, dim=number == 0, fg="red" if waits else None)
                    if bold and (waits or number == 0)
                    else line
                )
    for fault in reading.faults:
        typer.echo(f"kvcached: {fault}", err=True)
    if reading.faults:
        raise typer.Exit(1)


def _heading(view: LedgerView, width: int) -> str:
    fixed = sum(account.fixed_bytes for account in view.accounts)
    extra = f", {format_size(fixed)} of weights and such" if fixed else ""
    device = view.device if width > 100 else figures.device_name(view.device)
    return (
        f"{device}: {format_size(view.used_bytes)} of {format_size(view.capacity_bytes)} used"
        f"{extra}"
    )


def _row(account: AccountView, now: float) -> tuple[str, ...]:
    since = account.waiting_since
    return (
        figures.printable(account.name) or "-",
        figures.printable(account.engine) or "-",
        str(account.pid),
        short(account.used_bytes),
        short(account.live_bytes),
        short(account.cached_bytes),
        short(account.idle_bytes),
        figures.limits(account),
        figures.seconds(max(0.0, now - since)) if since else "-",
    )
