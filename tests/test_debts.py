"""Who gives back what, so that those who wait are served and nobody else goes short."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_vmm.fairness import SILENCE_SECONDS, Claim, claim_of, debts, fair_shares
from kvcached_vmm.records import AGES, AccountView, Counters, LedgerView
from kvcached_vmm.units import MIB

NOW = 1000.0


def engine(slot: int = 0, **figures: object) -> AccountView:
    """An engine that has just reported; nothing is left of what ``figures`` do not mention."""
    plain = AccountView(
        slot=slot,
        name=f"engine-{slot}",
        engine="",
        pid=slot + 1,
        namespace=1,
        started=0.0,
        joined=0.0,
        minimum_bytes=0,
        maximum_bytes=None,
        weight=1.0,
        cache_bytes=None,
        trims=0,
        committed_bytes=0,
        reserved_bytes=0,
        fixed_bytes=0,
        arena_bytes=0,
        live_bytes=0,
        cached_bytes=0,
        evictable_bytes=0,
        idle_bytes=0,
        leaving_bytes=0,
        wanted_bytes=0,
        coveted_bytes=0,
        demand_bytes=0,
        waiting_since=0.0,
        heartbeat=NOW,
        ages=(0.0,) * AGES,
        counters=Counters(),
    )
    return replace(plain, **figures)  # type: ignore[arg-type]


def ledger(budget: int, *accounts: AccountView) -> LedgerView:
    return LedgerView("host", budget, True, accounts)


def aged(*ages: float) -> tuple[float, ...]:
    """Last uses of the parcels, the last one repeated."""
    return (*ages, *ages[-1:] * (AGES - len(ages)))


@st.composite
def machines(draw: st.DrawFn) -> LedgerView:
    """Any ledger of up to five engines, crowded or not; guarantees fit, as the ledger sees to."""
    accounts = []
    for slot in range(draw(st.integers(1, 5))):
        live, evictable, idle = (draw(st.integers(0, 40)) for _ in range(3))
        wanted = draw(st.sampled_from([0, 0, 5, 60]))
        accounts.append(
            engine(
                slot,
                minimum_bytes=draw(st.sampled_from([0, 0, 20])),
                weight=draw(st.sampled_from([0.5, 1.0, 2.0])),
                committed_bytes=live + evictable + idle,
                live_bytes=live,
                evictable_bytes=evictable,
                cached_bytes=evictable,
                idle_bytes=idle,
                wanted_bytes=wanted,
                coveted_bytes=0 if wanted else draw(st.sampled_from([0, 0, 9])),
                demand_bytes=live + wanted,
                heartbeat=NOW - draw(st.sampled_from([0.0, 0.1, SILENCE_SECONDS + 1])),
                ages=tuple(sorted(draw(st.lists(st.integers(1, 99), min_size=8, max_size=8)))),
            )
        )
    used = sum(each.used_bytes for each in accounts)
    return ledger(max(100, used) + draw(st.integers(0, 30)), *accounts)


@given(machines())
def test_nobody_is_asked_for_what_it_needs_or_was_promised(machine: LedgerView) -> None:
    owed = debts(machine, NOW)
    shares = fair_shares(machine.capacity_bytes, [claim_of(each) for each in machine.accounts])
    for each, share in zip(machine.accounts, shares, strict=True):
        asked = owed.get(each.slot, 0)
        assert asked >= 0
        if asked:
            assert not each.wanted_bytes or each.used_bytes - asked >= share, "it waits itself"
            assert NOW - each.heartbeat < SILENCE_SECONDS, "the silent are not counted on"
            assert asked <= each.idle_bytes + each.evictable_bytes
            assert each.used_bytes - asked >= each.minimum_bytes


@given(machines())
def test_no_more_is_asked_for_than_is_missing(machine: LedgerView) -> None:
    missing = sum(each.wanted_bytes + each.coveted_bytes for each in machine.accounts)
    assert sum(debts(machine, NOW).values()) <= max(0, missing - machine.free_bytes)


@given(machines())
def test_who_waits_within_its_share_waits_only_if_nobody_has_anything_to_spare(
    machine: LedgerView,
) -> None:
    shares = fair_shares(machine.capacity_bytes, [claim_of(each) for each in machine.accounts])
    firm = sum(
        max(0, min(each.wanted_bytes, share - each.used_bytes))
        for each, share in zip(machine.accounts, shares, strict=True)
        if NOW - each.heartbeat < SILENCE_SECONDS
    )
    spare = sum(
        min(each.idle_bytes + each.evictable_bytes, max(0, each.used_bytes - each.minimum_bytes))
        for each in machine.accounts
        if not each.wanted_bytes and NOW - each.heartbeat < SILENCE_SECONDS
    )
    owed = sum(debts(machine, NOW).values())
    assert owed >= min(firm - machine.free_bytes, spare)


def test_what_holds_nothing_goes_before_what_holds_cache() -> None:
    cache = engine(0, committed_bytes=50, evictable_bytes=50, ages=aged(1.0))
    empty = engine(1, committed_bytes=50, idle_bytes=30)
    waiter = engine(2, wanted_bytes=20, demand_bytes=20)
    assert debts(ledger(100, cache, empty, waiter), NOW) == {1: 20}


def test_the_furthest_above_its_share_gives_first() -> None:
    modest = engine(0, committed_bytes=40, idle_bytes=40, demand_bytes=40)
    greedy = engine(1, committed_bytes=60, idle_bytes=60, demand_bytes=60)
    waiter = engine(2, wanted_bytes=25, demand_bytes=25)
    assert debts(ledger(100, modest, greedy, waiter), NOW) == {1: 25}


def test_the_oldest_cache_on_the_machine_goes_first_whoever_has_it() -> None:
    mixed = engine(0, committed_bytes=40, evictable_bytes=40, ages=aged(10.0, 20.0, 50.0))
    old = engine(1, committed_bytes=40, evictable_bytes=40, ages=aged(11.0, 12.0, 90.0))
    waiter = engine(2, wanted_bytes=18, demand_bytes=18)
    assert debts(ledger(80, mixed, old, waiter), NOW) == {0: 5 + 3, 1: 5 + 5}


def test_who_could_evict_its_own_gets_only_older_cache_of_others() -> None:
    coveter = engine(0, committed_bytes=40, evictable_bytes=40, ages=aged(30.0), coveted_bytes=40)
    neighbour = engine(1, committed_bytes=40, evictable_bytes=40, ages=aged(10.0, 20.0, 30.0))
    assert debts(ledger(80, coveter, neighbour), NOW) == {1: 10}


def test_who_grows_and_has_too_little_cache_gets_that_of_others_however_young() -> None:
    """What is left of an old cache would be gone with the next prompt, and the one after waits."""
    coveter = engine(0, committed_bytes=40, evictable_bytes=9, ages=aged(30.0), coveted_bytes=10)
    neighbour = engine(1, committed_bytes=40, evictable_bytes=40, ages=aged(NOW - 0.2))
    assert debts(ledger(80, coveter, neighbour), NOW) == {1: 10}
    has_enough = replace(coveter, evictable_bytes=10)
    assert debts(ledger(80, has_enough, neighbour), NOW) == {}


def test_who_covets_serves_others_that_do_but_not_itself() -> None:
    busy = engine(0, committed_bytes=60, evictable_bytes=40, ages=aged(30.0), coveted_bytes=8)
    growing = engine(1, committed_bytes=20, live_bytes=20, coveted_bytes=10)
    assert debts(ledger(80, busy, growing), NOW) == {0: 10}
    assert debts(ledger(60, busy), NOW) == {}


def test_who_grows_and_has_no_cache_gets_that_of_others_before_it_runs_out() -> None:
    growing = engine(0, committed_bytes=40, live_bytes=36, idle_bytes=4, coveted_bytes=10)
    neighbour = engine(1, committed_bytes=40, evictable_bytes=40, ages=aged(NOW - 0.2))
    assert debts(ledger(80, growing, neighbour), NOW) == {1: 10}


def test_the_reserve_of_one_that_serves_is_for_those_who_wait_not_for_those_who_covet() -> None:
    """Or two that serve would hand one reserve to and fro."""
    serving = engine(0, committed_bytes=40, live_bytes=30, idle_bytes=10)
    resting = engine(1, committed_bytes=8, idle_bytes=8)
    coveter = engine(2, committed_bytes=32, live_bytes=32, coveted_bytes=10)
    assert debts(ledger(80, serving, resting, coveter), NOW) == {1: 8}
    waiter = replace(coveter, coveted_bytes=0, wanted_bytes=10, demand_bytes=42)
    assert sum(debts(ledger(80, serving, resting, waiter), NOW).values()) == 10


def test_one_who_may_not_give_does_not_stand_before_one_who_may() -> None:
    guarded = engine(0, committed_bytes=40, minimum_bytes=40, evictable_bytes=40, ages=aged(1.0))
    free = engine(1, committed_bytes=40, evictable_bytes=40, ages=aged(2.0))
    waiter = engine(2, wanted_bytes=8, demand_bytes=8)
    assert debts(ledger(80, guarded, free, waiter), NOW) == {1: 8}


def test_nobody_clears_out_for_an_engine_that_has_stopped() -> None:
    cache = engine(0, committed_bytes=50, evictable_bytes=50)
    stopped = engine(1, wanted_bytes=20, demand_bytes=20, heartbeat=NOW - 2 * SILENCE_SECONDS)
    assert debts(ledger(50, cache, stopped), NOW) == {}


def test_nobody_gives_while_there_is_enough() -> None:
    cache = engine(0, committed_bytes=50 * MIB, evictable_bytes=50 * MIB)
    waiter = engine(1, wanted_bytes=20 * MIB, demand_bytes=20 * MIB)
    assert debts(ledger(70 * MIB, cache, waiter), NOW) == {}


def test_cache_goes_to_who_waits_even_beyond_its_share() -> None:
    """What a request needs is worth more than what nobody needs now, whoever has had how much."""
    cache = engine(0, committed_bytes=50, live_bytes=40, demand_bytes=50, evictable_bytes=10)
    greedy = engine(1, committed_bytes=50, live_bytes=50, wanted_bytes=10, demand_bytes=60)
    assert debts(ledger(100, cache, greedy), NOW) == {0: 10}


def test_who_waits_gives_what_is_above_its_share_to_who_has_less() -> None:
    more = engine(0, committed_bytes=70, evictable_bytes=30, wanted_bytes=90, demand_bytes=160)
    less = engine(1, committed_bytes=30, wanted_bytes=90, demand_bytes=120)
    assert debts(ledger(100, more, less), NOW) == {0: 20}


def test_what_is_on_its_way_out_is_not_asked_for_again() -> None:
    """An engine that serves gives with its next step; until then it must not give as much again."""
    giver = engine(0, committed_bytes=80, leaving_bytes=15, evictable_bytes=65)
    waiter = engine(1, wanted_bytes=40, demand_bytes=40)
    assert debts(ledger(100, giver, waiter), NOW) == {0: 5}


def test_nobody_gives_for_an_engine_that_may_have_no_more() -> None:
    cache = engine(0, committed_bytes=50, evictable_bytes=50)
    full = engine(1, committed_bytes=50, wanted_bytes=10, demand_bytes=60, maximum_bytes=50)
    assert debts(ledger(100, cache, full), NOW) == {}


@pytest.mark.parametrize(
    ("maximum", "minimum", "demand", "cap"), [(None, 0, 9, 9), (5, 0, 9, 5), (None, 20, 9, 20)]
)
def test_a_claim_is_what_an_engine_needs_within_its_limits(
    maximum: int | None, minimum: int, demand: int, cap: int
) -> None:
    one = engine(maximum_bytes=maximum, minimum_bytes=minimum, demand_bytes=demand)
    assert claim_of(one) == Claim(1.0, minimum, cap)
