"""`kvcached record`: what happens, as JSON for `top --replay`, or as a picture."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from kvcached_plugins import control, timeline
from kvcached_plugins.cli import figures, picture
from kvcached_plugins.cli.options import Directory, finite
from kvcached_plugins.control import Reading
from kvcached_vmm.errors import SettingsError

JSON, PNG = (".json", ".jsonl"), ".png"


def record(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="*.json or *.png.")],
    seconds: Annotated[
        float | None,
        typer.Option(min=0, callback=finite, help="For how long.", show_default="until Ctrl-C"),
    ] = None,
    interval: Annotated[
        float,
        typer.Option(
            min=0.01, max=3600, callback=finite, metavar="SECONDS", help="Between two looks."
        ),
    ] = 0.5,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Take what was recorded before, to draw it."),
    ] = None,
    directory: Directory = None,
) -> None:
    """Write down what engines have, as JSON or as a picture.

    JSON has a line for each look, as `kvcached list --json` prints it, and
    is written as it comes; `kvcached top --replay FILE` plays it. A picture
    (PNG, needs matplotlib) is drawn at the end. A file that exists is
    replaced.

      kvcached record timeline.json --seconds 60

      kvcached record timeline.png --replay timeline.json

    Exit status: 0; 1 if there was no engine; 2 for a mistake; 130 if Ctrl-C
    came before --seconds were over (what was recorded is kept).
    """
    suffix = file.suffix.lower()
    if suffix not in (*JSON, PNG):
        raise SettingsError(f"{file}: give a name that ends in .json or .png.")
    if suffix == PNG and not picture.can_draw():
        raise SettingsError(
            "A picture needs matplotlib: pip install 'kvcached-plugins[demo]'; or record *.json "
            "and draw it elsewhere with --replay."
        )
    looks = _Looks(
        timeline.load(replay) if replay else watched(interval, seconds, directory),
    )
    if suffix == PNG:
        readings = list(looks)
        if any(view.accounts for reading in readings for view in reading.ledgers):
            picture.draw(file, readings)
    else:
        timeline.save(file, looks)
    if not looks.engines:
        typer.echo("No engine shared a budget meanwhile.", err=True)
        raise typer.Exit(1)
    what = f"{figures.count(looks.count, 'reading')} of {figures.count(looks.engines, 'engine')}"
    typer.echo(f"{what}: {file.absolute()}")
    if looks.interrupted and seconds is not None:
        raise typer.Exit(130)


def watched(interval_s: float, seconds: float | None, directory: Directory) -> Iterator[Reading]:
    """Readings at regular times, for so long, or for ever."""
    begin = due = time.monotonic()
    while seconds is None or due - begin <= seconds:
        time.sleep(max(0.0, due - time.monotonic()))
        yield control.read(directory)
        due = max(due + interval_s, time.monotonic())


class _Looks:
    """Passes readings on and counts them. Ctrl-C is their end."""

    def __init__(self, readings: Iterable[Reading]) -> None:
        self.count = 0
        self.interrupted = False
        self._readings = readings
        self._engines: set[tuple[str, int, float]] = set()

    @property
    def engines(self) -> int:
        """How many there were."""
        return len(self._engines)

    def __iter__(self) -> Iterator[Reading]:
        try:
            for reading in self._readings:
                self.count += 1
                self._engines |= {
                    (view.device, account.slot, account.joined)
                    for view in reading.ledgers
                    for account in view.accounts
                }
                yield reading
        except KeyboardInterrupt:
            self.interrupted = True
