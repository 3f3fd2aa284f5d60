"""How a start is refused: one sentence and an exit code, no traceback."""

from __future__ import annotations


class Refusal(SystemExit):
    """Ends the process; Python and multiprocessing print the sentence to standard error.

    vLLM catches and logs ``Exception`` in many places and goes on or prints a traceback; it lets
    ``SystemExit`` through.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(f"kvcached: {sentence}")
