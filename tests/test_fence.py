"""Memory leaves only when the device is done with it, and nobody waits for that."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_vmm.fence import Mark, Passed, Quarantine, StepClock


class FakeMark:
    """A mark that passes when told to, and fails the test if someone waits who should not."""

    def __init__(self, passed: bool = False, may_wait: bool = False) -> None:
        self.passed = passed
        self.may_wait = may_wait
        self.waits = 0

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        assert self.may_wait, "somebody waits for the device"
        self.waits += 1
        self.passed = True


def quarantine(*marks: Mark) -> Quarantine:
    """A quarantine that sets ``marks`` in turn."""
    coming = deque(marks)
    return Quarantine(coming.popleft)


def test_a_quarantine_tells_which_step_has_waited_longest() -> None:
    first, second = FakeMark(), FakeMark(passed=True)
    waiting = quarantine(first, second)
    assert waiting.oldest_step is None
    waiting.put(3, [1])
    waiting.put(4, [])
    waiting.put(5, [2])
    assert waiting.oldest_step == 3
    first.passed = True
    waiting.take(0)
    assert waiting.oldest_step is None


def test_a_step_is_quiet_when_it_and_all_before_it_have_finished() -> None:
    clock = StepClock()
    assert clock.quiet(0)
    first, second, third = clock.launch(), clock.launch(), clock.launch()
    assert (first, second, third) == (1, 2, 3)
    clock.finish(second)
    assert clock.quiet(first)
    assert clock.quiet(second)
    assert not clock.quiet(third)


def test_late_news_of_an_early_step_does_not_turn_the_clock_back() -> None:
    clock = StepClock()
    first, second = clock.launch(), clock.launch()
    clock.finish(second)
    clock.finish(first)
    assert clock.quiet(second)


def test_an_engine_at_rest_has_no_step_in_flight() -> None:
    clock = StepClock()
    for _ in range(3):
        clock.launch()
    clock.rest()
    assert clock.quiet(clock.launched)
    assert not clock.quiet(clock.launch())


def test_extents_come_out_in_the_order_in_which_they_were_ordered_away() -> None:
    held = quarantine(FakeMark(passed=True), FakeMark(passed=True))
    held.put(1, [7, 3])
    held.put(2, [5])
    assert len(held) == 3
    assert held.take(overdue_step=0) == [7, 3, 5]
    assert len(held) == 0


def test_nothing_overtakes_an_extent_that_is_still_in_use() -> None:
    busy, done = FakeMark(), FakeMark(passed=True)
    held = quarantine(busy, done)
    held.put(1, [1])
    held.put(2, [2])
    assert held.take(overdue_step=0) == []
    busy.passed = True
    assert held.take(overdue_step=0) == [1, 2]


def test_an_overdue_extent_is_waited_for_and_a_fresh_one_is_not() -> None:
    overdue, fresh = FakeMark(may_wait=True), FakeMark()
    held = quarantine(overdue, fresh)
    held.put(4, [1])
    held.put(5, [2])
    assert held.take(overdue_step=4) == [1]
    assert overdue.waits == 1
    assert len(held) == 1


def test_no_mark_is_set_for_nothing() -> None:
    held = quarantine()
    held.put(1, [])
    assert held.take(overdue_step=1) == []


def test_a_device_that_does_everything_at_once_holds_nothing_back() -> None:
    held = Quarantine(Passed)
    held.put(9, [4])
    assert held.take(overdue_step=0) == [4]
    Passed().synchronize()


def test_a_device_error_loses_no_extent() -> None:
    class Broken(FakeMark):
        def query(self) -> bool:
            raise RuntimeError("the device is gone")

    held = quarantine(FakeMark(passed=True), Broken())
    held.put(1, [1])
    held.put(2, [2])
    with pytest.raises(RuntimeError):
        held.take(overdue_step=0)
    assert len(held) == 2


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.booleans()), max_size=40))
def test_every_extent_comes_out_once_in_order_and_only_when_quiet(
    script: list[tuple[int, int, bool]],
) -> None:
    """Each step orders some extents away, lets the device pass some marks, then collects."""
    marks: list[FakeMark] = []

    def mark() -> FakeMark:
        marks.append(FakeMark())
        return marks[-1]

    held = Quarantine(mark)
    orders: list[tuple[list[int], FakeMark]] = []
    number, out = 0, 0
    for step, (count, passing, collect) in enumerate(script, start=1):
        extents = list(range(number, number + count))
        number += count
        held.put(step, extents)
        if extents:
            orders.append((extents, marks[-1]))
        for one in [m for m in marks if not m.passed][:passing]:
            one.passed = True
        if collect:
            quiet = held.take(overdue_step=0)
            assert quiet == list(range(out, out + len(quiet)))
            out += len(quiet)
            for extents, its_mark in orders:
                assert its_mark.passed == (extents[-1] < out)
    for one in marks:
        one.may_wait = True
    assert held.take(overdue_step=len(script)) == list(range(out, number))
