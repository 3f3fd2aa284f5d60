"""Readings that are taken while something else happens."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def sampled(measure: Callable[[], int], every_s: float = 0.05) -> Iterator[list[int]]:
    """The values of `measure` while the block runs; an error in it is raised at the end."""
    values: list[int] = []
    errors: list[Exception] = []
    done = threading.Event()

    def sample() -> None:
        try:
            while not done.wait(every_s):
                values.append(measure())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield values
    finally:
        done.set()
        thread.join()
    if errors:
        raise errors[0]
