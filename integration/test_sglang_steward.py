"""What the steward does between SGLang's rounds, seen from a scheduler that only looks like one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from integration.sglang_case import EXTENT_BYTES, PAGES, Asked, Batch, Case
from integration.sglang_engine import needs_sglang
from integration.test_sglang_allocators import SPAN
from kvcached_plugins.tenant import LOOK_SECONDS
from kvcached_vmm.host_driver import GRANULARITY

pytestmark = [pytest.mark.engine, needs_sglang]


@pytest.fixture
def cases() -> Iterator[Callable[..., Case]]:
    made: list[Case] = []

    def make(budget_extents: int = 10, **variables: str) -> Case:
        made.append(Case(budget_extents, **variables))
        return made[-1]

    yield make
    for case in made:
        case.close()


def test_a_round_has_grants_for_all_that_it_may_allocate_and_leaves_none_behind(
    cases: Callable[..., Case],
) -> None:
    case = cases()
    case.wait(tokens=12)
    case.steward.begin_round()
    granted = case.memory.book.credit
    assert granted * SPAN + len(case.allocator.free_pages) >= 13
    assert len(case.allocator.alloc(4)) == 4
    assert case.memory.book.credit == granted - 1
    case.steward.end_round()
    view = case.world.ledger.snapshot()
    assert view.accounts[0].reserved_bytes == 0
    assert view.accounts[0].committed_bytes == case.memory.arena.committed_bytes


def test_prefixes_go_for_what_a_neighbour_took_in_the_middle_of_a_round(
    cases: Callable[..., Case],
) -> None:
    """And for what SGLang allocates beyond what it could be expected to."""
    case = cases()
    case.allocator.steward = case.steward
    case.scheduler.tree_cache.cached = [case.allocator.alloc(8)]
    free = case.allocator.available_size()
    case.take_all_but(0)
    case.memory.book.room = 2
    assert case.allocator.available_size() < free
    assert len(case.allocator.alloc(7)) == 7
    assert case.scheduler.tree_cache.evictable_size() == 0


def test_what_a_neighbour_took_is_not_available(cases: Callable[..., Case]) -> None:
    case = cases()
    assert case.allocator.available_size() == PAGES
    case.take_all_but(2)
    assert case.allocator.available_size() == 3 + 2 * SPAN
    case.wait(tokens=30)
    case.steward.begin_round()
    assert case.allocator.available_size() == 3 + 2 * SPAN
    assert len(case.allocator.alloc(3 + 2 * SPAN)) == 3 + 2 * SPAN
    assert case.allocator.alloc(1) is None


def test_a_shortage_is_told_to_the_neighbours_until_it_is_over(cases: Callable[..., Case]) -> None:
    case = cases()
    case.take_all_but(0)
    case.wait(tokens=16)
    case.look(1)
    assert case.world.ledger.snapshot().accounts[0].wanted_bytes >= 13 // SPAN * EXTENT_BYTES
    assert case.neighbour.others_wait()
    case.scheduler.waiting_queue = []
    case.look(1)
    assert not case.neighbour.others_wait()


def test_a_missing_reserve_is_told_to_the_neighbours_before_a_batch_needs_it(
    cases: Callable[..., Case],
) -> None:
    case = cases()
    case.take_all_but(0)
    case.scheduler.running_batch = Batch(1)
    case.steward.launched()
    case.look(1)
    assert case.neighbour.others_covet()
    assert not case.neighbour.others_wait()
    case.neighbour.release(2 * EXTENT_BYTES)
    case.look(1)
    case.steward.launched()
    assert len(case.memory.book.idle_extents) == 1
    case.look(1)
    assert not case.neighbour.others_covet()


def test_a_full_batch_takes_more_when_a_neighbour_makes_room(cases: Callable[..., Case]) -> None:
    """SGLang would wait for one of its own requests to end; there may be none."""
    case = cases()
    case.take_all_but(0)
    case.wait(tokens=16)
    case.scheduler.running_batch = Batch(1)
    case.look(1)
    case.scheduler.running_batch.batch_is_full = True
    case.look(1)
    assert case.scheduler.running_batch.batch_is_full, "nothing has changed"
    case.neighbour.release(4 * EXTENT_BYTES)
    case.look(1)
    assert not case.scheduler.running_batch.batch_is_full


def test_an_empty_batch_is_never_full(cases: Callable[..., Case]) -> None:
    case = cases()
    case.take_all_but(0)
    case.wait(tokens=16)
    case.scheduler.running_batch.batch_is_full = True
    case.look(1)
    assert not case.scheduler.running_batch.batch_is_full


def test_cached_prefixes_are_given_to_a_neighbour_that_waits(cases: Callable[..., Case]) -> None:
    case = cases()
    case.scheduler.tree_cache.cached = [case.allocator.alloc(3) for _ in range(13)]
    assert case.committed() == 10
    case.neighbour.report(0, 0, 4 * EXTENT_BYTES)
    case.look()
    assert case.committed() in (5, 6), "prefixes do not end where extents do"
    assert case.scheduler.tree_cache.evictable_size() >= 12


def test_an_engine_that_rests_does_not_let_a_neighbour_wait(cases: Callable[..., Case]) -> None:
    """Prefixes, then their pages, then the device: that takes several looks, one after another."""
    case = cases()
    case.scheduler.tree_cache.cached = [case.allocator.alloc(39)]
    case.look()
    began = time.monotonic()
    case.neighbour.report(0, 0, 4 * EXTENT_BYTES)
    while case.neighbour.reserve(4 * EXTENT_BYTES, EXTENT_BYTES) < 4 * EXTENT_BYTES:
        assert time.monotonic() - began < 5, "nothing was given back"
        case.steward.begin_round()
        case.steward.end_round()
        time.sleep(0.001)
        for mark in case.world.marks:
            mark.passed = True
    assert time.monotonic() - began < LOOK_SECONDS


def test_live_pages_are_never_given_to_a_neighbour(cases: Callable[..., Case]) -> None:
    case = cases()
    live = set(case.allocator.alloc(PAGES).tolist())
    case.neighbour.report(0, 0, 4 * EXTENT_BYTES)
    case.look()
    case.world.check(live)
    assert case.committed() == 10


def test_an_engine_that_waits_itself_gives_nothing(cases: Callable[..., Case]) -> None:
    case = cases()
    case.scheduler.tree_cache.cached = [case.allocator.alloc(8)]
    case.take_all_but(0)
    case.wait(tokens=16)
    case.neighbour.report(0, 0, 4 * EXTENT_BYTES)
    case.look(2)
    assert case.scheduler.tree_cache.evictable_size() == 8


def test_prefixes_that_an_idle_engine_kept_for_long_enough_are_forgotten(
    cases: Callable[..., Case],
) -> None:
    case = cases(KVCACHED_CACHE_TTL="0.2", KVCACHED_DECAY="0")
    case.scheduler.tree_cache.cached = [case.allocator.alloc(20)]
    case.scheduler.last_batch = Batch(1)
    case.look(1)
    case.scheduler.last_batch = None
    case.look()
    assert case.scheduler.tree_cache.evictable_size() == 20
    time.sleep(0.25)
    case.look()
    assert case.scheduler.tree_cache.evictable_size() == 0
    assert case.committed() == 1


def test_a_trim_and_a_lower_maximum_take_what_can_be_spared(cases: Callable[..., Case]) -> None:
    case = cases()
    case.scheduler.tree_cache.cached = [case.allocator.alloc(20)]
    ledger = case.world.ledger
    ledger.set_terms(ledger.snapshot().accounts[0], maximum_bytes=2 * EXTENT_BYTES)
    assert case.memory.shares.rings != case.steward._heard
    case.look()
    assert case.committed() <= 2
    ledger.set_terms(ledger.snapshot().accounts[0], trim=True)
    case.look()
    assert case.committed() == 1


def test_a_trim_takes_prefixes_and_their_memory_with_the_next_looks(
    cases: Callable[..., Case],
) -> None:
    """Without waiting for memory without content to decay."""
    case = cases(KVCACHED_DECAY="60", KVCACHED_CACHE_TTL="60")
    live = case.allocator.alloc(5)
    case.scheduler.tree_cache.cached = [case.allocator.alloc(34)]
    ledger = case.world.ledger
    ledger.set_terms(ledger.snapshot().accounts[0], trim=True)
    case.look(3)
    assert case.committed() == 2
    case.world.check({int(page) for page in live})
    case.scheduler.tree_cache.cached = [case.allocator.alloc(8)]
    case.look(3)
    assert case.scheduler.tree_cache.evictable_size() == 8, "once is once"


def test_a_bound_on_cached_prefixes_holds_while_requests_run(cases: Callable[..., Case]) -> None:
    case = cases()
    ledger = case.world.ledger
    ledger.set_terms(ledger.snapshot().accounts[0], cache_bytes=8 * GRANULARITY)
    case.scheduler.running_batch = Batch(1)
    case.scheduler.tree_cache.cached = [case.allocator.alloc(4) for _ in range(5)]
    case.look()
    assert case.scheduler.tree_cache.evictable_size() == 8


def test_memory_is_committed_ahead_of_need_while_requests_run(cases: Callable[..., Case]) -> None:
    case = cases()
    case.scheduler.running_batch = Batch(1)
    case.allocator.alloc(3)
    assert case.committed() == 1
    case.steward.launched()
    assert case.committed() == 2
    case.steward.launched()
    assert case.committed() == 2


def test_a_batch_without_a_single_page_waits_for_a_neighbour(cases: Callable[..., Case]) -> None:
    """SGLang would abort the last request that does not fit."""
    case = cases()
    case.take_all_but(0)
    case.allocator.alloc(3)
    case.scheduler.running_batch = Batch(1)
    helper = threading.Timer(0.2, lambda: case.neighbour.release(EXTENT_BYTES))
    helper.start()
    began = time.monotonic()
    case.steward.begin_round()
    helper.join()
    assert 0.15 < time.monotonic() - began < 0.9
    assert case.allocator.available_size() == SPAN


def test_the_rest_of_a_prompt_is_as_long_as_there_is_memory_for(
    cases: Callable[..., Case],
) -> None:
    """SGLang's adder would take a whole chunk where it counts none left, and end the engine when it
    is not to be had."""
    case = cases()
    case.take_all_but(1)
    spare = case.allocator.available_size()
    asked = case.go_on_reading()
    assert asked == spare == 3 + SPAN
    assert len(case.allocator.alloc(asked)) == asked


def test_the_rest_of_a_prompt_waits_while_there_is_none_and_holds_up_nobody(
    cases: Callable[..., Case],
) -> None:
    case = cases()
    case.take_all_but(0)
    case.allocator.alloc(3)
    case.scheduler.chunked_req = Asked(9)
    began = time.monotonic()
    case.steward.begin_round()
    assert case.go_on_reading() == 0
    assert time.monotonic() - began < 0.5
    assert case.allocator.available_size() == 0, "nor does anybody else begin"

    case.neighbour.release(EXTENT_BYTES)
    case.steward.begin_round()
    assert case.go_on_reading() == SPAN


def test_a_batch_that_waited_in_vain_goes_back_to_sglang(cases: Callable[..., Case]) -> None:
    case = cases()
    case.take_all_but(0)
    case.allocator.alloc(3)
    case.scheduler.running_batch = Batch(2)
    began = time.monotonic()
    case.steward.begin_round()
    assert 0.9 < time.monotonic() - began < 5.0
    assert case.allocator.available_size() == 0


def test_the_last_request_waits_for_longer_for_sglang_would_abort_it(
    cases: Callable[..., Case],
) -> None:
    case = cases()
    case.take_all_but(0)
    case.allocator.alloc(3)
    case.scheduler.running_batch = Batch(1)
    helper = threading.Timer(1.5, lambda: case.neighbour.release(EXTENT_BYTES))
    helper.start()
    case.steward.begin_round()
    helper.join()
    assert case.allocator.available_size() == SPAN


def test_while_others_wait_no_request_begins_beyond_the_fair_share(
    cases: Callable[..., Case],
) -> None:
    """As vLLM: what its own requests give up goes to whoever waits, not to the next of its own."""
    case = cases()
    live = case.allocator.alloc(28)
    assert case.steward.admits(Asked(8), 0)
    case.neighbour.report(0, 0, 9 * EXTENT_BYTES)
    case.scheduler.waiting_queue = [Asked(8)]
    case.scheduler.running_batch = Batch(1)
    case.look(1)
    assert case.steward.admission.share_bytes == 5 * EXTENT_BYTES, "half of ten"
    assert not case.steward.admits(Asked(1), 0), "it has more than its share"
    case.allocator.free(live[16:])
    assert case.steward.admits(Asked(4), 0)
    assert case.steward.admits(Asked(11, cached=7), 0), "what is cached has its memory"
    assert not case.steward.admits(Asked(3), 2), "chosen ones count before they have pages"
    case.neighbour.report(0, 0, 0)
    with_share = case.steward.admission.share_bytes
    case.steward._tenant._calm_at = 0.0
    case.scheduler.running_batch.batch_is_full = True
    case.look(1)
    assert with_share is not None
    assert case.steward.admission.share_bytes is None
    assert not case.scheduler.running_batch.batch_is_full, "SGLang tries again"
    assert case.steward.admits(Asked(12), 0)


def test_a_request_that_leaves_memory_to_others_counts_as_one_that_waits(
    cases: Callable[..., Case],
) -> None:
    """Though SGLang takes its batch to be full then, and tries none."""
    case = cases()
    case.allocator.alloc(28)
    case.neighbour.report(0, 0, 9 * EXTENT_BYTES)
    case.scheduler.waiting_queue = [Asked(8)]
    case.scheduler.running_batch = Batch(1)
    case.look(2)
    assert case.world.ledger.snapshot().accounts[0].wanted_bytes > 0


def test_alone_with_nothing_running_a_request_may_always_begin(cases: Callable[..., Case]) -> None:
    case = cases()
    case.neighbour.report(0, 0, 9 * EXTENT_BYTES)
    case.look(1)
    assert case.steward.admission.share_bytes is not None
    assert case.steward.admits(Asked(30), 0)
    assert not case.steward.admits(Asked(30), 1)


def test_what_was_given_to_others_is_counted(cases: Callable[..., Case]) -> None:
    case = cases()
    case.scheduler.tree_cache.cached = [case.allocator.alloc(39)]
    case.neighbour.report(0, 0, 4 * EXTENT_BYTES)
    case.look()
    counters = case.world.ledger.snapshot().accounts[0].counters
    assert counters.commits == 10
    assert counters.releases >= 4
    assert counters.reclaims >= 1
    assert counters.reclaimed_bytes >= 4 * EXTENT_BYTES
    assert counters.driver_seconds > 0


def test_requests_may_not_be_longer_than_the_limit_holds(cases: Callable[..., Case]) -> None:
    case = cases(budget_extents=3)
    case.steward.clamp_request_length()
    assert case.scheduler.max_req_len == 3 * SPAN - 2
    assert case.scheduler.max_req_input_len == 3 * SPAN - 2 - 5


def test_with_room_for_all_requests_are_as_long_as_before(cases: Callable[..., Case]) -> None:
    case = cases()
    case.steward.clamp_request_length()
    assert (case.scheduler.max_req_len, case.scheduler.max_req_input_len) == (30, 25)
