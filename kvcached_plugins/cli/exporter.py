"""`kvcached exporter`: the ledgers of this machine, for Prometheus."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Annotated

import typer
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.exposition import generate_latest

from kvcached_plugins.cli.options import finite
from kvcached_plugins.metrics import LedgerCollector
from kvcached_plugins.settings import Settings
from kvcached_vmm.errors import SettingsError

WAKE_SECONDS = 0.5
"""How late a wish to end may be heard; as often as Python's own HTTP server looks."""


def exporter(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 9440,
    textfile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write this file and end, in place of listening."),
    ] = None,
    every: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            max=86400,
            callback=finite,
            help="Write the file again and again.",
        ),
    ] = 0.0,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Folder of the ledgers.", show_default="KVCACHED_DIR"),
    ] = None,
) -> None:
    """Export what all engines of this user have, need and did, for Prometheus.

    Answers on http://127.0.0.1:9440/metrics until it is ended; whoever can reach another address
    that you name can read it. With --textfile it writes a file for node_exporter instead, readable
    by all. A ledger that cannot be read is `kvcached_ledger_up 0`.

      kvcached exporter --port 9440

      kvcached exporter --textfile /var/lib/node_exporter/kvcached.prom --every 15

    Exit status: 0 when it was ended, 2 if the address or file cannot be used.
    """
    registry = CollectorRegistry()
    registry.register(LedgerCollector(directory or Settings.read().directory))
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        # On another thread: this one may be about to wait, and hold the lock that ``set`` needs.
        signal.signal(number, lambda *_: threading.Thread(target=ended.set).start())
    if textfile is not None:
        write_textfile(textfile, registry)
        while every and not _is_over(ended, every):
            write_textfile(textfile, registry)
        return
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise SettingsError(
            f"Nothing can listen on {host}, port {port}: {error.strerror}; give another --host "
            "or --port."
        ) from error
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"Metrics are at http://{shown}:{server.server_port}/metrics; Ctrl-C ends.")
    _is_over(ended, math.inf)
    server.shutdown()
    server.server_close()


def _is_over(ended: threading.Event, within_s: float) -> bool:
    """Wait until ``ended`` is set, for so many seconds at most.

    Python runs a signal's handler on this thread, and one that comes just before this thread sleeps
    does not wake it: so it sleeps for a moment at a time.
    """
    end = time.monotonic() + within_s
    while (left := end - time.monotonic()) > 0:
        if ended.wait(min(left, WAKE_SECONDS)):
            return True
    return False


def write_textfile(path: Path, registry: CollectorRegistry) -> None:
    """Write what ``registry`` has to ``path`` at one stroke, readable by all.

    Raises:
        SettingsError: the file cannot be written.
    """
    if not path.name:
        raise SettingsError("--textfile: give the name of a file.")
    content = generate_latest(registry)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise SettingsError(
            f"The file {path} cannot be written: {error.strerror}; give --textfile another path."
        ) from error
