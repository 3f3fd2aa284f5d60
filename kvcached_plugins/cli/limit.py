"""`kvcached limit` and `kvcached trim`: what an engine may have, and what it should give back."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from kvcached_plugins import control
from kvcached_plugins.cli import figures
from kvcached_plugins.cli.options import Directory, finite
from kvcached_plugins.control import Engine
from kvcached_vmm.errors import SettingsError
from kvcached_vmm.records import AccountView
from kvcached_vmm.units import format_size

OPTIONS = {"minimum": "--min", "maximum": "--max", "weight": "--weight", "cache": "--cache"}

SETTLED_S = 0.3
"""An engine that has given nothing back for so long has given what it can."""
_LOOK_S = 0.02

Name = Annotated[str, typer.Argument(metavar="NAME", help="The engine's name, or its process id.")]


def limit(
    name: Name,
    minimum: Annotated[
        str | None, typer.Option("--min", metavar="SIZE", help="Never granted to others.")
    ] = None,
    maximum: Annotated[
        str | None,
        typer.Option("--max", metavar="SIZE|none", help="The most that it may have, 0 or more."),
    ] = None,
    weight: Annotated[
        str | None,
        typer.Option(metavar="NUMBER", help="Share under pressure, 0.01 to 100; 1 by default."),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(metavar="SIZE|none", help="The most that cached blocks may hold."),
    ] = None,
    directory: Directory = None,
) -> None:
    """Change what an engine may have, and print what is in force.

    Without options it only prints. A change is in force at once; an engine
    that has more than its new maximum gives memory back as its blocks come
    free. Where an engine has several devices, each has these limits.

      kvcached limit llama8b --min 1GiB --max 6GiB --weight 2

      kvcached limit llama8b --max none --cache 512MiB

    Exit status: 0; 2 if there is no such engine or a limit cannot be had:
    nothing is changed then.
    """
    try:
        engine = control.limit(
            name,
            minimum=minimum,
            maximum=maximum,
            weight=weight,
            cache=cache,
            directory=directory,
        )
    except control.BadLimit as error:
        raise SettingsError(f"{OPTIONS[error.argument]}: {error.reason}") from error
    for device, account in engine.accounts.items():
        typer.echo(_in_force(device, account))


def trim(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The engine's name, or its process id.")
    ] = None,
    everybody: Annotated[bool, typer.Option("--all", help="All engines.")] = False,
    wait: Annotated[
        float,
        typer.Option(
            min=0, max=600, callback=finite, metavar="SECONDS", help="How long to watch at most."
        ),
    ] = 3.0,
    directory: Directory = None,
) -> None:
    """Ask engines to give back what they can spare; print what came back.

    An engine spares memory without content and cached blocks, down to its
    minimum; blocks that requests use stay.

      kvcached trim llama8b

      kvcached trim --all

    Exit status: 0, also if nothing came back; 2 if there is no such engine.
    """
    if (name is None) != everybody:
        raise SettingsError("Give the NAME of an engine, or --all, and not both.")
    asked = control.trim(name, directory)
    if not asked:
        typer.echo("No engine shares a budget here.")
    after = _settled(asked, wait, directory)
    for engine in asked:
        for device, before in engine.accounts.items():
            now = after.get((device, before.slot, before.joined))
            typer.echo(_given_back(device, before, now))


def _in_force(device: str, account: AccountView) -> str:
    most, cache = account.maximum_bytes, account.cache_bytes
    parts = [
        f"minimum {format_size(account.minimum_bytes)}",
        f"maximum {control.NONE if most is None else format_size(most)}",
        f"weight {account.weight:g}",
        f"cache {control.NONE if cache is None else format_size(cache)}",
        f"uses {format_size(account.used_bytes)}",
    ]
    more = 0 if most is None else account.used_bytes - most
    if more > 0:
        parts[-1] += f", {format_size(more)} too much: it gives back as blocks come free"
    return f"{figures.printable(account.name)} (pid {account.pid}) on {device}: {', '.join(parts)}"


def _given_back(device: str, before: AccountView, now: AccountView | None) -> str:
    who = f"{figures.printable(before.name)} (pid {before.pid}) on {device}"
    if now is None:
        return f"{who}: has left"
    back = max(0, before.used_bytes - now.used_bytes)
    return f"{who}: {format_size(back)} given back, uses {format_size(now.used_bytes)}"


def _settled(
    asked: tuple[Engine, ...], wait_s: float, directory: Directory
) -> dict[tuple[str, int, float], AccountView]:
    """The accounts of those asked, once none has given anything back for a moment."""
    keys = {
        (device, account.slot, account.joined)
        for engine in asked
        for device, account in engine.accounts.items()
    }
    end = time.monotonic() + wait_s
    used, quiet_since = -1, time.monotonic()
    while True:
        found = {
            key: account
            for view in control.read(directory).ledgers
            for account in view.accounts
            if (key := (view.device, account.slot, account.joined)) in keys
        }
        now = time.monotonic()
        total = sum(account.used_bytes for account in found.values())
        spare = sum(
            account.idle_bytes + account.leaving_bytes + account.evictable_bytes
            for account in found.values()
        )
        if total != used:
            used, quiet_since = total, now
        if now >= end or not spare or now - quiet_since > SETTLED_S:
            return found
        time.sleep(_LOOK_S)
