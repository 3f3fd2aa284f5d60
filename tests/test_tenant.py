"""Engines in one budget, each a pool and an account: what they owe, and when they say so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import PAGE
from test_pool import Block

from kvcached_plugins import tenant
from kvcached_plugins.shares import Shares
from kvcached_plugins.tenant import Tenant
from kvcached_vmm.account import Account
from kvcached_vmm.extents import ExtentMap, Region
from kvcached_vmm.fence import StepClock
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.policy import Policy
from kvcached_vmm.pool import ElasticPool
from kvcached_vmm.records import AccountView

LAYOUT = ExtentMap(400, [Region(0, PAGE)], PAGE, 4)
"""Extents of four blocks, a page each."""
UNIT = 4 * PAGE
BUDGET = 20 * UNIT


class Engine:
    """A pool that spends shares of a ledger, and a tenant that keeps it honest."""

    def __init__(self, folder: Path, name: str, reserve_bytes: int = 0, **terms: int) -> None:
        self.name = name
        self.account: Account = Ledger.open(folder, "host").join(name, BUDGET, **terms)
        self.queued = 0
        self.blocks = [Block(number) for number in range(LAYOUT.num_blocks)]
        shares = Shares([(self.account, 1)])
        policy = Policy(decay_seconds=60, cache_seconds=60, reserve_bytes=reserve_bytes)
        self.pool = ElasticPool(
            self.blocks, LAYOUT, shares, StepClock(), lambda blocks: None, policy
        )
        self.tenant = Tenant(shares, self.pool, lambda: self.queued)
        self.tenant.report(force=True)

    def admit(self, extents: int) -> list[Block]:
        """A request of so many extents, if it may begin and there is memory; else nothing."""
        count = 4 * extents
        if not self.pool.admission.admits(self.pool.live_blocks, count):
            self.tenant.report()
            return []
        self.pool.prepare(count)
        enough = count <= self.pool.num_free_blocks
        blocks = self.pool.take(count) if enough else []
        self.pool.settle()
        self.tenant.report()
        return blocks

    def give_back(self) -> int:
        """Answer whoever waits; returns how many extents left."""
        leaving = self.tenant.owed(urgent=True)
        self.pool.released(leaving)
        self.tenant.report(force=True)
        return len(leaving)

    def cache(self, extents: int) -> None:
        """Serve a request, and keep what it has computed."""
        self.pool.keep(self.admit(extents))
        self.pool.tick()
        self.tenant.report(force=True)

    @property
    def seen(self) -> AccountView:
        return next(each for each in self.account.view().accounts if each.name == self.name)


@pytest.fixture
def engines(folder: Path) -> Iterator[tuple[Engine, Engine]]:
    pair = Engine(folder, "ada"), Engine(folder, "bob")
    yield pair
    for engine in pair:
        engine.account.close()


def test_what_one_only_keeps_goes_to_one_that_waits(engines: tuple[Engine, Engine]) -> None:
    ada, bob = engines
    ada.cache(16)
    assert bob.admit(10) == []
    assert ada.give_back() > 0
    assert len(bob.admit(10)) == 40


def test_what_one_uses_stays_and_the_other_waits(engines: tuple[Engine, Engine]) -> None:
    ada, bob = engines
    used = ada.admit(16)
    assert bob.admit(10) == []
    assert ada.give_back() == 0
    ada.pool.put(used)
    ada.pool.tick()
    assert ada.give_back() > 0
    assert len(bob.admit(10)) == 40


def test_a_guarantee_is_kept_though_others_wait(folder: Path) -> None:
    ada, bob = Engine(folder, "ada", minimum_bytes=12 * UNIT), Engine(folder, "bob")
    ada.cache(16)
    bob.admit(18)
    ada.give_back()
    assert 12 * UNIT <= ada.pool.committed_bytes <= 13 * UNIT
    ada.account.close()
    bob.account.close()


def test_a_need_is_known_at_once_with_all_that_queues_behind_it(
    engines: tuple[Engine, Engine],
) -> None:
    ada, bob = engines
    ada.admit(16)
    bob.queued = 17 * UNIT
    heard = ada.account._ledger.bell.rings
    bob.admit(10)
    assert bob.seen.wanted_bytes == 17 * UNIT
    assert ada.account._ledger.bell.rings != heard


def test_a_bell_that_we_rang_ourselves_is_no_reason_to_look(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenant, "LOOK_SECONDS", 3600.0)
    monkeypatch.setattr(tenant, "ASK_SECONDS", 3600.0)
    ada, bob = engines
    ada.cache(16)
    bob.tenant.owed()
    looked: list[str] = []
    shares = bob.tenant._shares
    monkeypatch.setattr(shares, "others_wait", lambda: looked.append("bob") or False)

    assert bob.admit(10) == []
    assert bob.tenant.owed() == []
    assert looked == [], "its own need has rung the bell"

    ada.account.report(0, 0, wanted_bytes=UNIT)
    bob.tenant.owed()
    assert looked == ["bob"]


def test_who_has_more_than_its_share_admits_nothing_while_others_wait(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenant, "CALM_SECONDS", 0.0)
    ada, bob = engines
    held = [ada.admit(2) for _ in range(9)]
    bob.queued = BUDGET
    assert bob.admit(2) == []
    ada.give_back()
    for blocks in held[5:]:
        ada.pool.put(blocks)
    ada.pool.tick()
    assert ada.admit(2) == []
    ada.give_back()
    bob.queued = 0
    assert len(bob.admit(2)) == 8
    bob.tenant.report(force=True)
    ada.give_back()
    assert len(ada.admit(2)) == 8, "nobody waits any more"


def test_one_request_is_always_admitted_whatever_the_share(engines: tuple[Engine, Engine]) -> None:
    ada, bob = engines
    ada.cache(6)
    bob.queued = BUDGET
    bob.admit(19)
    ada.give_back()
    assert ada.pool.admission.share_bytes is not None
    ada.pool.admission.share_bytes = UNIT
    assert ada.pool.admission.admits(ada.pool.live_blocks, 12)


@pytest.mark.parametrize("maximum", [0, UNIT, 5 * UNIT])
def test_a_lower_maximum_takes_what_can_be_spared_and_stops_new_requests(
    engines: tuple[Engine, Engine], maximum: int
) -> None:
    ada, bob = engines
    running = ada.admit(3)
    ada.cache(6)
    bob.account._ledger.set_terms(ada.seen, maximum_bytes=maximum)
    assert ada.tenant.must_answer()
    ada.give_back()
    assert ada.pool.committed_bytes <= max(maximum, 4 * UNIT)
    assert ada.admit(4) == []
    ada.pool.put(running)
    ada.pool.tick()
    ada.give_back()
    assert ada.pool.committed_bytes <= max(maximum, UNIT)

    bob.account._ledger.set_terms(ada.seen, no_maximum=True)
    ada.give_back()
    assert len(ada.admit(8)) == 32


def test_what_is_on_its_way_out_is_not_taken_again_for_a_lower_maximum(
    engines: tuple[Engine, Engine],
) -> None:
    """An engine that serves releases with its next step, and looks again before that."""
    ada, bob = engines
    ada.cache(12)
    bob.account._ledger.set_terms(ada.seen, maximum_bytes=8 * UNIT)
    leaving = ada.tenant.owed(urgent=True)
    assert leaving
    assert ada.tenant.owed(urgent=True) == []
    ada.pool.released(leaving)
    assert 6 * UNIT <= ada.pool.committed_bytes <= 8 * UNIT


def test_a_trim_takes_all_that_can_be_spared_once(engines: tuple[Engine, Engine]) -> None:
    ada, bob = engines
    running = ada.admit(3)
    ada.cache(6)
    bob.account._ledger.set_terms(ada.seen, trim=True)
    assert ada.give_back() >= 5
    ada.cache(2)
    assert ada.give_back() == 0
    assert len(running) == 12


def test_a_bound_of_the_cache_holds_for_an_idle_engine(engines: tuple[Engine, Engine]) -> None:
    ada, bob = engines
    ada.cache(9)
    bob.account._ledger.set_terms(ada.seen, cache_bytes=2 * UNIT)
    assert ada.tenant.must_answer()
    ada.give_back()
    ada.pool.tick()
    assert ada.pool.cached_blocks <= 8


def test_older_cache_of_others_goes_before_ones_own(engines: tuple[Engine, Engine]) -> None:
    """Who lacks memory and could evict what it has just used gets what nobody has used for long."""
    ada, bob = engines
    ada.cache(10)
    bob.cache(8)
    assert len(bob.admit(4)) == 16, "its own cache made up for it"
    assert bob.seen.coveted_bytes > 0
    before = bob.pool.cached_blocks
    assert ada.give_back() > 0
    assert len(bob.admit(3)) == 12
    assert bob.pool.cached_blocks == before, "this time it grew"


def test_who_grows_into_a_neighbours_cache_is_refused_nothing_once_it_has_begun(
    folder: Path,
) -> None:
    """A request that runs and is refused a block is preempted and computed again."""
    ada, bob = Engine(folder, "ada"), Engine(folder, "bob", reserve_bytes=3 * UNIT)
    ada.cache(18)
    assert bob.admit(2) == []
    ada.give_back()
    grown = 0
    while bob.admit(1 + grown % 2):
        ada.give_back()
        grown += 1
    assert grown >= 9, "up to the last extent that ada could spare"
    assert bob.pool.live_blocks >= 4 * 14
    ada.account.close()
    bob.account.close()


def test_who_grows_is_not_held_to_a_cache_that_it_has_used_up(folder: Path) -> None:
    """Others looked at what it could have evicted a second ago, and kept what is younger."""
    ada, bob = Engine(folder, "ada"), Engine(folder, "bob", reserve_bytes=3 * UNIT)
    bob.cache(5)
    bob.pool.look_at_cache()
    ada.cache(9)
    ada.pool.look_at_cache()
    ada.tenant.report(force=True)
    bob.tenant.report(force=True)
    assert ada.seen.evictable_bytes > 0
    assert bob.seen.evictable_bytes > 0
    grown = 0
    while bob.admit(2):
        bob.tenant.report(force=True)  # as it does every 50 ms
        ada.give_back()
        grown += 1
    assert grown >= 8, "up to the last extent that ada could spare"
    ada.account.close()
    bob.account.close()


def test_two_that_serve_leave_each_other_their_reserves(folder: Path) -> None:
    pair = [Engine(folder, name, reserve_bytes=4 * UNIT) for name in ("ada", "bob")]
    for _ in range(20):
        for engine in pair:
            engine.admit(1)
    released = 0
    for _ in range(20):
        for engine in pair:
            engine.pool.settle()
            engine.tenant.report(force=True)
            released += engine.give_back()
    assert released == 0
    for engine in pair:
        assert engine.pool.live_blocks > 0
        engine.account.close()


def test_who_has_its_maximum_covets_nothing(folder: Path) -> None:
    ada = Engine(folder, "ada", reserve_bytes=4 * UNIT, maximum_bytes=6 * UNIT)
    while ada.admit(1):
        pass
    ada.pool.settle()
    ada.tenant.report(force=True)
    assert ada.seen.coveted_bytes == 0
    ada.account.close()


def test_counters_tell_what_has_happened(engines: tuple[Engine, Engine]) -> None:
    ada, bob = engines
    ada.admit(16)
    bob.admit(10)
    bob.tenant.report(force=True)
    bob.admit(10)
    bob.tenant.report(force=True)
    counters = bob.seen.counters
    assert counters.refusals >= 2
    assert counters.waits == 1
    assert counters.wait_seconds > 0
    ada.tenant.report(force=True)
    assert ada.seen.counters.commits >= 16
