"""What the steward does between SGLang's rounds, seen from a scheduler that only looks like one."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from integration.sglang_engine import needs_sglang
from integration.test_sglang_allocators import SPAN, World
from kvcached_plugins.settings import Settings
from kvcached_vmm.account import Account
from kvcached_vmm.host_driver import GRANULARITY
from kvcached_vmm.ledger import Ledger

pytestmark = [pytest.mark.engine, needs_sglang]

EXTENT_BYTES = SPAN * GRANULARITY
PAGES = 39
"""Ten extents, one page of which is the sink."""


class Alone:
    """One rank agrees with itself."""

    ranks = 1

    def __call__(self, *values: int) -> list[int]:
        return list(values)


class Batch:
    """A batch of requests that each need a page for their next token."""

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self.batch_is_full = False

    def batch_size(self) -> int:
        return self.size

    def is_empty(self) -> bool:
        return self.size == 0

    def new_tokens_required_next_decode(self) -> int:
        return self.size


class Tree:
    """A prefix cache: pages that are in use and may be evicted, least recently used first."""

    def __init__(self, allocator: Any) -> None:
        self.allocator = allocator
        self.cached: list[Any] = []

    def evictable_size(self) -> int:
        return sum(len(indices) for indices in self.cached)

    def evict(self, parameters: Any) -> None:
        evicted = 0
        while self.cached and evicted < parameters.num_tokens:
            evicted += len(self.cached[0])
            self.allocator.free(self.cached.pop(0))


class Case:
    """A steward over a pool of PAGES pages of one token, beside a neighbour in the same ledger."""

    def __init__(self, budget_extents: int = 10, agree: Any = None, **variables: str) -> None:
        self.world = World(PAGES, 1, budget_extents)
        from kvcached_plugins.sglang.steward import Steward

        allocator = self.world.elastic
        self.scheduler = SimpleNamespace(
            token_to_kv_pool_allocator=allocator,
            running_batch=Batch(),
            last_batch=None,
            waiting_queue=[],
            chunked_req=None,
            chunked_prefill_size=None,
            max_prefill_tokens=16,
            max_req_len=30,
            max_req_input_len=25,
            max_running_requests=8,
            tree_cache=Tree(allocator),
        )
        self.allocator = allocator
        self.memory = self.world.memory
        settings = Settings.read({"KVCACHED_DIR": "/nowhere", **variables})
        self.steward = Steward(self.scheduler, settings, agree or Alone())
        self.neighbour: Account = Ledger.open(Path(self.world.folder.name) / "ledger", "host").join(
            "neighbour", None
        )

    def wait(self, tokens: int) -> None:
        self.scheduler.waiting_queue = [Asked(tokens)]

    def look(self, times: int = 4) -> None:
        """Rounds with nothing to run, far enough apart to look each time."""
        for _ in range(times):
            for mark in self.world.marks:
                mark.passed = True
            self.steward._next_look = 0.0
            self.steward.begin_round()
            self.steward.end_round()

    def take_all_but(self, extents: int) -> None:
        """The neighbour uses what is left of the budget, less ``extents``."""
        wanted = (self.memory.room() - extents) * EXTENT_BYTES
        assert self.neighbour.reserve(wanted, EXTENT_BYTES) == wanted
        self.neighbour.commit(wanted, wanted)
        self.look(1)

    def committed(self) -> int:
        return len(self.memory.arena.committed)

    def close(self) -> None:
        self.neighbour.close()
        self.world.close()


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


class Asked(SimpleNamespace):
    """A request of so many tokens, some of which were found in the prefix cache."""

    def __init__(self, tokens: int, cached: int = 0) -> None:
        super().__init__(origin_input_ids=[0] * tokens, output_ids=[], prefix_indices=[0] * cached)


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


class Together:
    """The agreement of two ranks that are threads of this process."""

    ranks = 2

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.said: dict[int, tuple[int, ...]] = {}

    def __call__(self, *values: int) -> list[int]:
        self.said[threading.get_ident()] = values
        self.barrier.wait()
        least = [min(pair) for pair in zip(*self.said.values(), strict=True)]
        self.barrier.wait()
        return least


def test_ranks_stay_in_step_though_their_devices_differ(cases: Callable[..., Case]) -> None:
    """Each replays the same requests, with a neighbour of its own that comes and goes."""
    cases()  # imports SGLang, which two threads cannot do at once
    together, seen = Together(), {}

    def rank(number: int) -> None:
        case = Case(10, agree=together, KVCACHED_DECAY="0", KVCACHED_CACHE_TTL="0.05")
        same, own = random.Random(7), random.Random(number)
        held: list[Any] = []
        log = seen[number] = []
        taken = 0
        try:
            for _ in range(300):
                if own.random() < 0.2:
                    case.neighbour.release(taken)
                    granted = case.neighbour.reserve(own.randrange(9) * EXTENT_BYTES, EXTENT_BYTES)
                    case.neighbour.commit(granted, granted)
                    taken = granted
                    time.sleep(own.random() / 100)
                wanted = same.randrange(12)
                case.wait(wanted) if wanted else case.scheduler.waiting_queue.clear()
                case.steward.begin_round()
                available = case.allocator.available_size()
                got = case.allocator.alloc(min(wanted, available))
                case.steward.end_round()
                case.scheduler.running_batch = Batch(len(held))
                held.append(got)
                if same.random() < 0.5:
                    case.scheduler.tree_cache.cached.append(held.pop(same.randrange(len(held))))
                while len(held) > 3:
                    case.allocator.free(held.pop(0))
                log.append((available, sorted(got.tolist()), case.allocator.free_pages.tolist()))
            live = {p for indices in held + case.scheduler.tree_cache.cached for p in indices}
            case.world.check({int(page) for page in live})
        except BaseException:
            together.barrier.abort()
            raise
        finally:
            case.close()

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(rank, range(2)))
    assert len(seen[0]) == 300
    assert seen[0] == seen[1]
    assert len({available for available, _, _ in seen[0]}) > 10, "budgets did change"


RANK = """
import sys
from integration.sglang_engine import use_shim
use_shim()
import torch.distributed as dist
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
from kvcached_plugins.sglang.ranks import Agreement
agree = Agreement(dist.group.WORLD)
print(agree.ranks, agree(5 + rank, 9 - rank, -rank))
"""


def test_ranks_agree_on_the_least(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["2 [5, 8, -1]\n"] * 2
