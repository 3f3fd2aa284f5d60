"""What `kvcached top` shows: bars, figures and rates, drawn from readings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from rich.cells import cell_len
from rich.text import Text

from kvcached_plugins.cli import figures
from kvcached_plugins.cli.figures import Parts, short
from kvcached_plugins.cli.history import History, Rates, key_of
from kvcached_plugins.control import Reading
from kvcached_vmm.records import AccountView, LedgerView

SORTS: Mapping[str, Callable[[AccountView], tuple[float, str]]] = {
    "used": lambda account: (-account.used_bytes, account.name),
    "live": lambda account: (-account.live_bytes, account.name),
    "cached": lambda account: (-account.cached_bytes, account.name),
    "waits": lambda account: (-account.wanted_bytes, account.name),
    "name": lambda account: (0, account.name),
}
"""Orders of engines. The first letter of each is its key."""

GLYPHS = "#█▓▒░:·"
PLAIN_GLYPHS = "#@o-~:."
STYLES = ("bright_black", "green", "cyan", "magenta", "yellow", "blue", "dim")
"""A glyph and a style for each of ``Parts``."""

LEVELS = " ▁▂▃▄▅▆▇█"
PLAIN_LEVELS = " .:-=+*#@"


class Screen:
    """Draws a history. ``sort`` and ``device`` are what the user chose.

    Args:
        unicode: whether the terminal has block characters; it is readable without, and without
            colours.
    """

    def __init__(self, history: History, sort: str, unicode: bool = True) -> None:
        self.sort = sort
        self.device = 0
        self.note = ""
        self._history = history
        self._glyphs = GLYPHS if unicode else PLAIN_GLYPHS
        self._levels = LEVELS if unicode else PLAIN_LEVELS

    def draw(self, width: int, height: int) -> Text:
        """A picture of exactly ``height`` lines, none longer than ``width`` columns."""
        reading = self._history.now
        faults = [Text(fault, style="red") for fault in (reading.faults if reading else ())]
        if reading is None or not reading.ledgers:
            nobody = Text("No engine shares a budget here; waiting for one.")
            return _page([nobody, *faults], self._foot(0), width, height)
        self.device %= len(reading.ledgers)
        view = reading.ledgers[self.device]
        lines = [self._title(view, reading, width)]
        several = len(reading.ledgers) > 1
        label = max(len(figures.device_name(each.device)) for each in reading.ledgers) + 2
        for index, each in enumerate(reading.ledgers):
            mark = "> " if index == self.device else "  "
            line = Text(
                (mark + figures.device_name(each.device)).ljust(label + 1) if several else ""
            )
            line.append_text(self.bar(Parts.of_device(each), width - len(line)))
            lines.append(line)
        lines += self._legend(Parts.of_device(view), width)
        if self._history.period_s:
            lines.append(self._trend(view, width))
        lines += [*faults, Text()]
        lines += self._engines(view, reading, width, height - len(lines) - 1)
        return _page(lines, self._foot(len(reading.ledgers)), width, height)

    def bar(self, parts: Parts, width: int, total: int = 0) -> Text:
        """Parts as a bar; every part that is not 0 has a cell at least.

        Args:
            total: bytes of the whole bar, if not the sum of the parts.
        """
        whole = max(1, total or sum(parts))
        spare = max(0, width - sum(part > 0 for part in parts))
        bar, passed, edge = Text(), 0, 0
        for part, glyph, style in zip(parts, self._glyphs, STYLES, strict=True):
            passed += part
            before, edge = edge, round(spare * passed / whole)
            bar.append(glyph * ((part > 0) + edge - before), style=style)
        return bar

    def _title(self, view: LedgerView, reading: Reading, width: int) -> Text:
        waiters = [each for each in view.accounts if each.waiting_since]
        left = (
            f"{figures.device_name(view.device)}  {short(view.used_bytes)} of "
            f"{short(view.capacity_bytes)} used by {figures.count(len(view.accounts), 'engine')}"
        )
        line = Text(left, style="bold")
        if waiters:
            wanted = sum(each.wanted_bytes for each in waiters)
            line.append(f", {len(waiters)} waiting for {short(wanted)}", style="bold red")
        right = f"{self.note}  {figures.clock(reading.at)}".strip()
        return line.append(" " * max(1, width - cell_len(line.plain) - cell_len(right)) + right)

    def _legend(self, parts: Parts, width: int) -> list[Text]:
        lines = [Text()]
        for index, (name, size) in enumerate(parts._asdict().items()):
            if not size and name in ("fixed", "gaps", "reserved"):
                continue
            entry = Text.assemble((self._glyphs[index], STYLES[index]), f" {name} {short(size)}")
            if len(lines[-1]) + len(entry) + 2 > width:
                lines.append(Text())
            if len(lines[-1]):
                lines[-1].append("  ")
            lines[-1].append_text(entry)
        return lines

    def _trend(self, view: LedgerView, width: int) -> Text:
        used = self._history.used(view.device)
        shown = used[-max(1, width - 22) :]
        top = max(1, view.capacity_bytes, *shown)
        line = "".join(self._levels[-(-8 * min(each, top) // top)] for each in shown)
        span = figures.seconds(max(0.0, self._history.period_s) * max(0, len(shown) - 1))
        return Text.assemble(f"used, last {span:<5}", " ", (line, "green"))

    def _engines(self, view: LedgerView, reading: Reading, width: int, height: int) -> list[Text]:
        order = sorted(view.accounts, key=SORTS[self.sort])
        rates = self._history.rates()
        bars = len(order) * 2 + 1 <= height
        shown = order if len(order) < height else order[: max(1, height - 2)]
        rows = [_row(each, rates.get(key_of(view.device, each))) for each in shown]
        table = figures.table(HEADINGS, rows, width, (0,), gap=1)
        lines = [Text(table[0], style="bold dim")]
        most = max((sum(Parts.of_engine(each)) for each in order), default=0)
        for account, row in zip(shown, table[1:], strict=True):
            silent = reading.clock - account.heartbeat > 3
            style = "red" if account.waiting_since else "dim" if silent else ""
            lines.append(Text(row, style=style))
            if bars:
                lines.append(self._detail(account, reading, most, width, silent))
        if len(shown) < len(order):
            lines.append(Text(f"and {len(order) - len(shown)} more", style="dim"))
        return lines

    def _detail(
        self, account: AccountView, reading: Reading, most: int, width: int, silent: bool
    ) -> Text:
        """The second line of an engine: its bar, on one scale for all, and what is special."""
        notes = []
        if account.waiting_since:
            since = figures.seconds(max(0.0, reading.at - account.waiting_since))
            notes.append(f"waits {since} for {short(account.wanted_bytes)}")
        elif silent:
            notes.append(f"silent {figures.seconds(reading.clock - account.heartbeat)}")
        limits = figures.limits(account)
        if limits != "-":
            notes.append(limits)
        note = "  ".join(notes)
        room = max(10, min(width - 2, width - 4 - max(24, cell_len(note))))
        parts = Parts.of_engine(account)
        line = Text("  ")
        line.append_text(self.bar(parts._replace(free=0), room, max(1, most)))
        line.append(" " * (width - cell_len(line.plain) - cell_len(note)))
        return line.append(note, style="red" if account.waiting_since else "dim")

    def _foot(self, devices: int) -> Text:
        line = Text("sort by ", style="dim")
        for name in SORTS:
            chosen = name == self.sort
            line.append(f"[{name[0]}]{name[1:]}", style="bold" if chosen else "dim")
            line.append("*  " if chosen else "  ", style="bold" if chosen else "")
        if devices > 1:
            line.append("[d]evice  ", style="dim")
        return line.append("[q]uit", style="dim")


HEADINGS = (
    "NAME",
    "    PID",
    " USED",
    " LIVE",
    "CACHED",
    " IDLE",
    "FIXED",
    "COM/S",
    "REL/S",
    " NET/S",
)
"""As wide as their columns at least, so that they stay where they are. Extents committed and
released per second, and bytes won or lost."""


def lines(history: History) -> Iterable[str]:
    """One line for each engine of the latest reading, for a log."""
    reading = history.now
    if reading is None:
        return
    rates = history.rates()
    for view in reading.ledgers:
        for account in view.accounts:
            since = account.waiting_since
            rate = rates.get(key_of(view.device, account))
            yield "  ".join(
                [
                    figures.clock(reading.at),
                    view.device,
                    figures.printable(account.name),
                    f"pid {account.pid}",
                    f"used {short(account.used_bytes)}",
                    f"live {short(account.live_bytes)}",
                    f"cached {short(account.cached_bytes)}",
                    f"idle {short(account.idle_bytes)}",
                    f"reserved {short(account.reserved_bytes)}",
                    f"fixed {short(account.fixed_bytes)}",
                    *(
                        [
                            f"commits {_rate(rate.commits)}/s",
                            f"releases {_rate(rate.releases)}/s",
                            f"bytes {_signed(rate.bytes)}/s",
                        ]
                        if rate
                        else []
                    ),
                    *(
                        [
                            f"waits {figures.seconds(max(0.0, reading.at - since))} "
                            f"for {short(account.wanted_bytes)}"
                        ]
                        if since
                        else []
                    ),
                ]
            )


def _row(account: AccountView, rate: Rates | None) -> tuple[str, ...]:
    return (
        figures.printable(account.name) or "-",
        str(account.pid),
        short(account.used_bytes),
        short(account.live_bytes),
        short(account.cached_bytes),
        short(account.idle_bytes),
        short(account.fixed_bytes),
        _rate(rate.commits) if rate else "-",
        _rate(rate.releases) if rate else "-",
        _signed(rate.bytes) if rate else "-",
    )


def _rate(value: float) -> str:
    return f"{value:.1f}" if 0 < value < 10 else f"{value:.0f}"


def _signed(value: float) -> str:
    size = round(value)
    return "0" if size == 0 else ("+" if size > 0 else "-") + short(abs(size))


def _page(lines: list[Text], foot: Text, width: int, height: int) -> Text:
    """Lines cut and filled up to a page, with ``foot`` at its end."""
    body = lines[: max(0, height - 1)]
    body += [Text()] * (height - 1 - len(body))
    page = [*body, foot]
    for line in page:
        line.truncate(width, overflow="ellipsis" if line is not foot else "crop")
    return Text("\n", no_wrap=True, end="").join(page)
