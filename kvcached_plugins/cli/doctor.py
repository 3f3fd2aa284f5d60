"""`kvcached doctor`: what is in the way of an elastic cache here, and what to do."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from kvcached_plugins.cli import figures
from kvcached_plugins.cli.options import Directory
from kvcached_plugins.doctor import FAIL, NOTE, OK, Finding, examine

COLOURS = {OK: "green", NOTE: "yellow", FAIL: "red"}


def doctor(
    directory: Directory = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list of what was found.")] = False,
) -> None:
    """Check everything that an elastic cache needs, and say what to do.

    The switch and the settings, the folder of the ledgers and each ledger,
    driver and GPUs, host memory, the engines that are installed and whether
    they are as we expect them. On each GPU it maps 2 MiB for a moment.

      kvcached doctor

      ENABLE_KVCACHED=1 KVCACHED_BUDGET=20GiB kvcached doctor

    Exit status: 0; 1 if something fails.
    """
    found = []
    for finding in examine(directory):
        found.append(finding)
        if not as_json:
            _print(finding)
    failed = sum(finding.state == FAIL for finding in found)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found]))
    else:
        typer.echo()
        typer.echo(
            f"{failed} of {len(found)} checks failed." if failed else "Nothing is in the way."
        )
    if failed:
        raise typer.Exit(1)


def _print(finding: Finding) -> None:
    state = f"{finding.state:<5}"
    if figures.coloured():
        state = typer.style(state, fg=COLOURS[finding.state], bold=finding.state == FAIL)
    figures.paragraph(f"{finding.subject}: {figures.printable(finding.found)}", state, " " * 5)
    if finding.advice:
        figures.paragraph(f"-> {finding.advice}", " " * 5, " " * 8)
