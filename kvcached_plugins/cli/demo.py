"""`kvcached demo`: two stock engines in one memory budget, live, against a static split of it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from enum import Enum
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from kvcached_plugins.cli.options import finite
from kvcached_plugins.demo import picture, report
from kvcached_plugins.demo.models import write_model
from kvcached_plugins.demo.profiles import Profile, installed_profile
from kvcached_plugins.demo.screen import Screen
from kvcached_plugins.demo.servers import ServerError
from kvcached_plugins.demo.session import Outcome, elastic, measure, static
from kvcached_vmm.errors import SettingsError
from kvcached_vmm.units import format_size, parse_size

MODEL_NAMES = ("model-a", "model-b")


class EngineName(str, Enum):
    vllm = "vllm"
    sglang = "sglang"


def demo(
    budget: Annotated[
        str | None, typer.Option(help="KV memory for both, such as 512MiB.", show_default="fitting")
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            min=1, max=600, callback=finite, help="How long to send bursts, in each of the modes."
        ),
    ] = 56.0,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo-timeline.png"),
    engine: Annotated[EngineName, typer.Option(help="Which engine.")] = EngineName.vllm,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all that was measured.")
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="Measure the static split as well.", show_default=True)
    ] = True,
) -> None:
    """Run two models in one memory budget and see KV memory follow the load.

    Starts two stock engines with small random-weight models, sends bursts to each in turn, and
    ends with a table and a picture: elastic against the same budget split in half. Without a
    terminal it prints lines.

      kvcached demo --budget 512MiB --seconds 60 --json demo.json
    """
    profile = installed_profile(engine.value)
    try:
        budget_bytes = parse_size(budget) if budget else profile.budget_bytes
    except ValueError as error:
        raise SettingsError(f"--budget: {error}.") from error
    if budget_bytes < profile.smallest_budget_bytes:
        least = format_size(profile.smallest_budget_bytes)
        raise SettingsError(f"--budget {budget} is too small for the demo's models: use {least}.")
    signal.signal(signal.SIGTERM, _end_as_ctrl_c)
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="kvcached-demo-"))
    try:
        outcomes = _measure(profile, budget_bytes, seconds, compare, folder, console)
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        console.print("Stopped; both engines have ended.")
        raise typer.Exit(130) from None
    except ServerError:
        console.print(f"All logs of the engines: {folder / 'logs'}", soft_wrap=True)
        raise
    bursts = profile.bursts(budget_bytes, seconds)
    failed = _failures(outcomes)
    if compare and not failed:
        ours, theirs = (report.figures(outcome, bursts) for outcome in outcomes)
        console.print(report.comparison(ours, theirs))
    if json_file:
        setup = _setup(profile, budget_bytes, seconds)
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report.as_json(setup, bursts, outcomes), indent=1) + "\n")
        console.print(f"All that was measured: {json_file.absolute()}", soft_wrap=True)
    if picture.can_draw():
        caption = picture.caption(profile.engine.device, budget_bytes, bursts[0].requests)
        picture.draw(out, outcomes, bursts, budget_bytes, caption)
        console.print(f"Timeline: {out.absolute()}", soft_wrap=True)
    else:
        console.print("No picture: matplotlib is not installed (extra: demo).")
    if failed:
        raise ServerError(f"{failed} The logs of the engines: {folder / 'logs'}")
    shutil.rmtree(folder)


def _measure(
    profile: Profile,
    budget_bytes: int,
    seconds: float,
    compare: bool,
    folder: Path,
    console: Console,
) -> list[Outcome]:
    started = time.monotonic()
    bursts = profile.bursts(budget_bytes, seconds)
    need_bytes = sum(profile.prompt_tokens + profile.output_tokens) / 2
    need_bytes *= profile.shape.kv_bytes_per_token * bursts[0].requests
    console.print(
        f"Two models, {format_size(budget_bytes)} of KV memory for both ({profile.engine.device});"
        f" {len(bursts)} bursts of {bursts[0].requests} requests, one every {profile.period_s:g} s"
        f" to each model in turn; a burst needs about {format_size(round(need_bytes))}.",
        soft_wrap=True,
    )
    models = [write_model(folder / name, profile.shape) for name in MODEL_NAMES]
    modes = [elastic(profile, models, budget_bytes, folder / "ledger")]
    if compare:
        modes.append(static(profile, models, budget_bytes))
    outcomes = []
    for mode in modes:
        with Screen(console, MODEL_NAMES, budget_bytes) as screen:
            outcomes.append(measure(mode, profile, bursts, folder / "logs", screen))
    console.print(f"All of it took {time.monotonic() - started:.0f} s.", highlight=False)
    return outcomes


def _failures(outcomes: list[Outcome]) -> str:
    """One sentence about requests that failed; empty when none did."""
    for outcome in outcomes:
        errors = report.failed(outcome)
        if errors:
            return f"{len(errors)} requests failed in mode {outcome.mode}, the first: {errors[0]}."
    return ""


def _setup(profile: Profile, budget_bytes: int, seconds: float) -> dict[str, Any]:
    """With which hardware, versions and options the figures were made."""
    engine = profile.engine
    return {
        "command": " ".join(["kvcached", *sys.argv[1:]]),
        "device": engine.device,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "engine": f"{engine.name}: {engine.distribution} {engine.version}",
        "kvcached-plugins": metadata.version("kvcached-plugins"),
        "budget_bytes": budget_bytes,
        "seconds": seconds,
        "shape": profile.shape._asdict(),
        "kv_bytes_per_token": profile.shape.kv_bytes_per_token,
        "arguments": list(engine.arguments),
    }


def _end_as_ctrl_c(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
