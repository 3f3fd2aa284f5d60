"""Ranks of one tensor-parallel group, each with a ledger of its own, take the same decisions."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from integration.sglang_case import EXTENT_BYTES, Batch, Case
from integration.sglang_engine import needs_sglang

pytestmark = [pytest.mark.engine, needs_sglang]


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


def test_ranks_stay_in_step_though_their_devices_differ() -> None:
    """Each replays the same requests, with a neighbour of its own that comes and goes."""
    Case().close()  # imports SGLang, which two threads cannot do at once
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
