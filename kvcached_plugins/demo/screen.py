"""The live view: bars in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvcached_plugins.demo.load import Playback
from kvcached_plugins.demo.sampler import EngineSample, Sample
from kvcached_vmm.units import format_size

BAR_WIDTH = 40
PLAIN_PERIOD_S = 2.0
COLOURS = ("cyan", "magenta")


class Screen:
    """Shows samples as they come. A context manager: it owns the terminal in between."""

    def __init__(self, console: Console, names: Sequence[str], budget_bytes: int) -> None:
        self._console = console
        self._names = names
        self._budget_bytes = budget_bytes
        self._live = Live(console=console, refresh_per_second=8) if console.is_terminal else None
        self._plain_due_s = float("-inf")

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def waiting(self, what: str, gone_s: float) -> None:
        """Say that something takes its time."""
        if self._live:
            self._live.update(Text(f"{what} ... {gone_s:.0f} s", style="dim"))
        elif gone_s >= self._plain_due_s:
            self._console.print(f"{what} ... {gone_s:.0f} s", style="dim")
            self._plain_due_s = gone_s + 10

    def show(self, title: str, sample: Sample, playback: Playback) -> None:
        if self._live:
            self._live.update(self._picture(title, sample, playback))
        elif sample.at_s >= self._plain_due_s or sample.at_s < self._plain_due_s - 20:
            line = self._line(title, sample, playback)
            self._console.print(line, highlight=False, soft_wrap=True)
            self._plain_due_s = sample.at_s + PLAIN_PERIOD_S

    def _picture(self, title: str, sample: Sample, playback: Playback) -> Group:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("", f"KV memory of {format_size(self._budget_bytes)}", "held", "in use"):
            table.add_column(heading)
        for heading in ("running", "waiting", "done"):
            table.add_column(heading, justify="right")
        rows = zip(self._names, sample.engines, playback.progress, COLOURS, strict=False)
        for name, engine, progress, colour in rows:
            table.add_row(
                Text(name, style=f"bold {colour}"),
                self._bar(engine, colour),
                f"{format_size(engine.held_bytes):>9}",
                f"{format_size(engine.live_bytes):>9}",
                str(engine.running),
                str(max(engine.waiting, progress.running - engine.running)),
                f"{progress.done}/{progress.sent}",
            )
        both = Text(f"{format_size(sample.held_bytes)} held by both", style="dim")
        return Group(Text(f"{title}  {sample.at_s:5.1f} s", style="bold"), table, both)

    def _bar(self, engine: EngineSample, colour: str) -> Text:
        held = self._cells(engine.held_bytes)
        live = min(held, self._cells(engine.live_bytes))
        bar = Text()
        bar.append("█" * live, style=colour)
        bar.append("▒" * (held - live), style=colour)
        bar.append("·" * (BAR_WIDTH - held), style="dim")
        return bar

    def _cells(self, size_bytes: int) -> int:
        return min(BAR_WIDTH, round(BAR_WIDTH * size_bytes / self._budget_bytes))

    def _line(self, title: str, sample: Sample, playback: Playback) -> str:
        parts = [
            f"{name}: {format_size(engine.held_bytes)} held, {format_size(engine.live_bytes)}"
            f" in use, {engine.running} running, {progress.done}/{progress.sent} done"
            for name, engine, progress in zip(
                self._names, sample.engines, playback.progress, strict=True
            )
        ]
        return f"{title} {sample.at_s:5.1f} s | " + " | ".join(parts)
