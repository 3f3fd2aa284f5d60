"""A steward over a small pool and a stand-in for SGLang's scheduler, beside a neighbour."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from integration.test_sglang_allocators import SPAN, World
from kvcached_plugins.settings import Settings
from kvcached_vmm.account import Account
from kvcached_vmm.host_driver import GRANULARITY
from kvcached_vmm.ledger import Ledger

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


class Asked(SimpleNamespace):
    """A request of so many tokens, some of which were found in the prefix cache."""

    def __init__(self, tokens: int, cached: int = 0) -> None:
        super().__init__(origin_input_ids=[0] * tokens, output_ids=[], prefix_indices=[0] * cached)


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

    def go_on_reading(self) -> int:
        """How many tokens SGLang takes into a round of a prompt that it has begun to read."""
        from kvcached_plugins.sglang.engine import add_chunked_req

        self.allocator.steward = self.steward
        rest, taken = Asked(PAGES), []
        tree = self.scheduler.tree_cache
        adder = SimpleNamespace(
            token_to_kv_pool_allocator=self.allocator,
            rem_chunk_tokens=PAGES,
            cur_rem_tokens=self.allocator.available_size() + tree.evictable_size(),
        )
        answer = add_chunked_req(lambda adder, _: taken.append(adder.rem_chunk_tokens), adder, rest)
        assert taken or answer is rest, "SGLang keeps what is left out for its next round"
        return sum(taken)

    def committed(self) -> int:
        return len(self.memory.arena.committed)

    def close(self) -> None:
        self.neighbour.close()
        self.world.close()
