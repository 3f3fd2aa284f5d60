"""`kvcached top`: a live screen of where the memory is, or lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from kvcached_plugins import control, timeline
from kvcached_plugins.cli import screen
from kvcached_plugins.cli.history import History
from kvcached_plugins.cli.keys import Keys
from kvcached_plugins.cli.options import Directory, finite
from kvcached_plugins.control import Reading
from kvcached_vmm.errors import SettingsError

_LOOK_S = 0.2
"""How soon a changed size of the terminal is noticed."""


def top(
    interval: Annotated[
        float,
        typer.Option(
            min=0.05, max=3600, callback=finite, metavar="SECONDS", help="Between two looks."
        ),
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, print it and end.")] = False,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Play what `kvcached record` wrote, at its pace."),
    ] = None,
    sort: Annotated[
        str, typer.Option(metavar="|".join(screen.SORTS), help="Order of engines.")
    ] = "used",
    directory: Directory = None,
) -> None:
    """Show live where the memory is, who waits, and what happens.

    The bar is the device: fixed bytes (weights), then the parts of all KV
    caches: live and cached blocks, gaps between them, idle extents, reserved
    bytes, and what is free. Below each engine its own parts, on one scale.
    Keys: u, l, c, w, n sort; d shows the next device; q quits.

    Not on a terminal it prints one line per engine at each look.

      kvcached top --interval 0.5 --sort cached

      kvcached top --once | grep waits

      kvcached top --replay timeline.json

    Exit status: 0; 2 for a mistake; 130 after Ctrl-C.
    """
    if sort not in screen.SORTS:
        raise SettingsError(f"--sort: {sort!r} is none of {', '.join(screen.SORTS)}.")
    recorded = timeline.load(replay) if replay else None
    console = Console()
    history = History()
    blocks = "utf" in (console.encoding or "").lower()
    picture = screen.Screen(history, sort, blocks)
    if once:
        _once(recorded or [control.read(directory)], history, picture, console)
    elif not console.is_terminal:
        _print_lines(recorded, history, interval, directory)
    elif recorded:
        _play(recorded, history, picture, console)
    else:
        _watch(history, picture, console, interval, directory)


def _once(
    readings: Sequence[Reading],
    history: History,
    picture: screen.Screen,
    console: Console,
) -> None:
    for reading in readings:
        history.add(reading)
    if console.is_terminal:
        most = max((len(view.accounts) for view in readings[-1].ledgers), default=0)
        height = 2 * most + 8 + len(readings[-1].ledgers) + len(readings[-1].faults)
        drawn = picture.draw(console.width, height)
        body = drawn[: drawn.plain.rfind("\n")]
        body.rstrip()
        console.print(body, soft_wrap=True)
    else:
        _print(history)


def _print_lines(
    recorded: Sequence[Reading] | None,
    history: History,
    interval_s: float,
    directory: Directory,
) -> None:
    if recorded:
        for reading in recorded:
            history.add(reading)
            _print(history)
        return
    due = time.monotonic()
    while True:
        history.add(control.read(directory))
        _print(history)
        due = max(due + interval_s, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


def _print(history: History) -> None:
    reading = history.now
    assert reading is not None
    for fault in reading.faults:
        print(f"kvcached: {fault}", file=sys.stderr)
    for line in screen.lines(history):
        print(line)
    sys.stdout.flush()


def _watch(
    history: History,
    picture: screen.Screen,
    console: Console,
    interval_s: float,
    directory: Directory,
) -> None:
    with Keys() as keys, _live(console) as live:
        due = time.monotonic()
        while True:
            history.add(control.read(directory))
            due = max(due + interval_s, time.monotonic())
            if not _show_until(due, keys, live, picture, console):
                return


def _play(
    recorded: Sequence[Reading], history: History, picture: screen.Screen, console: Console
) -> None:
    """At the recorded pace; the last picture stays until the user quits."""
    with Keys() as keys, _live(console) as live:
        for index, reading in enumerate(recorded):
            history.add(reading)
            picture.note = f"replay {index + 1}/{len(recorded)}"
            following = recorded[index + 1].at if index + 1 < len(recorded) else float("inf")
            end = time.monotonic() + max(0.0, following - reading.at)
            if not _show_until(end, keys, live, picture, console):
                return


def _show_until(
    end: float, keys: Keys, live: Live, picture: screen.Screen, console: Console
) -> bool:
    """Show the picture and obey keys until ``end`` on the monotonic clock; False: quit."""
    shown = None
    while True:
        size = console.size
        if size != shown:
            live.update(picture.draw(size.width, size.height), refresh=True)
            shown = size
        left = end - time.monotonic()
        if left <= 0:
            return True
        for key in keys.wait(min(left, _LOOK_S)):
            shown = None
            if key in "qQ":
                return False
            if key in "dD":
                picture.device += 1
            picture.sort = _SORT_OF.get(key.lower(), picture.sort)


def _live(console: Console) -> Live:
    return Live(
        console=console,
        screen=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )


_SORT_OF = {name[0]: name for name in screen.SORTS}
