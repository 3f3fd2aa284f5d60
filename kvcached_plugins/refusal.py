"""How a start is refused: one sentence and exit code 1, no traceback."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOTE = "KVCACHED_REFUSAL_NOTE"
"""Names the file in which a refusal reaches the process that the user started. Ours, not a
setting: vLLM's parent process only learns that a child has ended."""


class Refusal(SystemExit):
    """Ends the process; Python and multiprocessing print the sentence to standard error.

    vLLM catches and logs ``Exception`` in many places and goes on or prints a traceback; it lets
    ``SystemExit`` through.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(f"kvcached: {sentence}")
        note = os.environ.get(NOTE, "")
        if note and not note.endswith(f"-{os.getpid()}"):
            with contextlib.suppress(OSError), open(note, "x", opener=_private) as file:
                file.write(sentence)


def expect_refusals(directory: Path) -> None:
    """Let child processes leave their refusal in ``directory``, which is ours alone."""
    note = directory / f"refused-{os.getpid()}"
    note.unlink(missing_ok=True)
    os.environ[NOTE] = str(note)


def wait_for_engine_startup(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Say why a child refused, in place of vLLM's traceback about a child that failed."""
    try:
        return original(*args, **kwargs)
    except RuntimeError:
        note = Path(os.environ.get(NOTE, "/nonexistent"))
        try:
            sentence = note.read_text()
            note.unlink()
        except OSError:
            sentence = ""
        if sentence:
            raise Refusal(sentence) from None
        raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
