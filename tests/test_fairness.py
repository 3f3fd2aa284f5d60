"""Shares that are fair, whatever the figures: weighted max-min, in whole bytes."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_vmm.fairness import Claim, fair_shares
from kvcached_vmm.units import GIB

sizes = st.one_of(st.integers(0, 100), st.integers(0, 200 * GIB))
weights = st.one_of(st.sampled_from([1.0, 2.0, 3.0]), st.floats(0.001, 1000))


@st.composite
def claim(draw: st.DrawFn) -> Claim:
    floor = draw(st.one_of(st.just(0), sizes))
    return Claim(draw(weights), floor, floor + draw(sizes))


claims = st.lists(claim(), max_size=8)


@given(claims, sizes)
def test_floors_are_met_and_caps_respected_even_when_there_is_too_little(
    wanted: list[Claim], total: int
) -> None:
    for share, (_, floor, cap) in zip(fair_shares(total, wanted), wanted, strict=True):
        assert floor <= share <= cap


@given(claims, sizes)
def test_shares_are_of_the_total_and_leave_only_what_nobody_can_use(
    wanted: list[Claim], extra: int
) -> None:
    total = sum(each.floor for each in wanted) + extra
    shares = fair_shares(total, wanted)
    assert sum(shares) <= total
    of_use = min(total, sum(each.cap for each in wanted))
    assert of_use - sum(shares) <= len(wanted)


@given(claims, sizes)
def test_nobody_could_have_more_but_from_one_who_has_less_for_its_weight(
    wanted: list[Claim], extra: int
) -> None:
    shares = fair_shares(sum(each.floor for each in wanted) + extra, wanted)
    levels = [share / each.weight for share, each in zip(shares, wanted, strict=True)]
    for poor, each in enumerate(wanted):
        for rich, other in enumerate(wanted):
            if shares[poor] < each.cap and shares[rich] > other.floor:
                byte = (1 + len(wanted) * 2**-20) / min(each.weight, other.weight)
                assert levels[rich] <= levels[poor] + byte + levels[poor] * 1e-12


@given(claims, sizes, st.randoms())
def test_the_order_of_claims_changes_nothing(
    wanted: list[Claim], total: int, chance: random.Random
) -> None:
    order = list(range(len(wanted)))
    chance.shuffle(order)
    mixed = fair_shares(total, [wanted[index] for index in order])
    plain = fair_shares(total, wanted)
    assert mixed == [plain[index] for index in order]


@pytest.mark.parametrize(
    ("wanted", "shares"),
    [
        pytest.param([(1, 0, 100), (1, 0, 100)], [50, 50], id="equal"),
        pytest.param([(1, 0, 100), (2, 0, 100), (1, 0, 100)], [25, 50, 25], id="by-weight"),
        pytest.param([(1, 0, 10), (1, 0, 100)], [10, 90], id="what-one-does-not-need"),
        pytest.param([(1, 70, 100), (1, 0, 100)], [70, 30], id="a-floor-first"),
        pytest.param([(1, 0, 30), (1, 0, 20)], [30, 20], id="enough-for-all"),
        pytest.param([(1, 80, 100), (1, 40, 100)], [80, 40], id="promised-too-much"),
        pytest.param([], [], id="nobody"),
    ],
)
def test_shares_in_figures(wanted: list[tuple[float, int, int]], shares: list[int]) -> None:
    assert fair_shares(100, [Claim(*each) for each in wanted]) == shares


def test_shares_of_many_are_found_before_anybody_notices() -> None:
    many = [Claim(1 + index % 3, 0, (index + 1) * GIB) for index in range(256)]
    assert math.isclose(sum(fair_shares(1000 * GIB, many)), 1000 * GIB, rel_tol=1e-9)
