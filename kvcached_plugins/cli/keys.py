"""Single keys of a terminal, read without waiting for Enter."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import termios
import time
import tty
from types import FrameType, TracebackType

_SEQUENCE = re.compile(r"\x1b(?:\[[0-9;]*[~A-Za-z]|O[A-Za-z])?")


class Keys:
    """Reads keys in a ``with``; afterwards the terminal is as it was, whatever happened within.

    Ctrl-C raises ``KeyboardInterrupt`` as ever; a request to end (SIGTERM, SIGHUP) raises
    ``SystemExit``, so that the ``with`` is left. Ctrl-Z does nothing meanwhile. Where standard
    input is no terminal there are no keys, and ``wait`` only waits.
    """

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin.isatty() else -1
        self._saved: list[object] = []
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> Keys:
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, _end)
        if self._fd >= 0:
            self._saved = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
            mode = termios.tcgetattr(self._fd)
            mode[6][termios.VSUSP] = b"\0"
            termios.tcsetattr(self._fd, termios.TCSANOW, mode)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._saved:
            termios.tcsetattr(self._fd, termios.TCSAFLUSH, self._saved)  # type: ignore[arg-type]
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def wait(self, timeout_s: float) -> str:
        """The keys that are pressed within ``timeout_s``, as soon as there are any; else none.

        Escape sequences, of cursor keys say, are passed over.
        """
        if self._fd < 0:
            time.sleep(max(0.0, timeout_s))
            return ""
        ready, _, _ = select.select([self._fd], [], [], max(0.0, timeout_s))
        if not ready:
            return ""
        raw = os.read(self._fd, 64)
        if not raw:
            raise SystemExit(0)
        return _SEQUENCE.sub("", raw.decode(errors="ignore"))


def _end(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)
