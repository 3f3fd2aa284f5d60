"""When is memory quiet? Unmapping waits for nothing, so whoever unmaps has to know.

Two guards, one after the other. A ``StepClock`` on the side that schedules counts the steps an
engine launched and those whose results it has seen: a block freed now may still be read or written
by every step launched so far. A ``Quarantine`` on the side that unmaps holds extents until the
device has passed a mark that was set after the last launch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol


class StepClock:
    """Counts an engine's steps; steps finish in the order in which they were launched."""

    def __init__(self) -> None:
        self.launched = 0
        self.finished = 0

    def launch(self) -> int:
        """A step is about to be sent to the device; return its number, from 1."""
        self.launched += 1
        return self.launched

    def finish(self, step: int) -> None:
        """The results of ``step`` have been seen, so it and all before it are done."""
        self.finished = max(self.finished, step)

    def quiet(self, step: int) -> bool:
        """Whether every step up to ``step`` is done."""
        return self.finished >= step

    def rest(self) -> None:
        """The engine has nothing in flight: every step is done."""
        self.finished = self.launched


class Mark(Protocol):
    """A point in the device's order of work, such as a CUDA event."""

    def query(self) -> bool:
        """Whether the device has passed this point. Never waits."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has passed this point."""
        ...


class Passed:
    """The mark of a device that does everything at once."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


class Quarantine:
    """Extents that were freed and may still be in use by work on the device, oldest first.

    Args:
        mark: sets a mark after all work given to the device so far.
    """

    def __init__(self, mark: Callable[[], Mark]) -> None:
        self._mark = mark
        self._waiting: deque[tuple[int, Mark, Sequence[int]]] = deque()

    def __len__(self) -> int:
        return sum(len(extents) for _, _, extents in self._waiting)

    @property
    def oldest_step(self) -> int | None:
        """The step at which the extents that have waited for longest were ordered."""
        return self._waiting[0][0] if self._waiting else None

    def put(self, step: int, extents: Sequence[int]) -> None:
        """Hold ``extents``, ordered at ``step``, until the work given to the device is done."""
        if extents:
            self._waiting.append((step, self._mark(), extents))

    def take(self, overdue_step: int) -> list[int]:
        """Take out the extents that are quiet, waiting for those ordered up to ``overdue_step``."""
        passed = 0
        for step, mark, _ in self._waiting:
            if step <= overdue_step:
                mark.synchronize()
            elif not mark.query():
                break
            passed += 1
        quiet: list[int] = []
        for _ in range(passed):
            quiet += self._waiting.popleft()[2]
        return quiet
