"""The arena behind a worker's KV cache, and what a step needs resident in it."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from kvcached_plugins.backing import Backing
from kvcached_plugins.settings import Settings
from kvcached_plugins.shares import default_budget, join_beside
from kvcached_plugins.vllm.geometry import ATTRIBUTE, Orders, Plan, extent_map
from kvcached_vmm.account import Account
from kvcached_vmm.errors import DriverError
from kvcached_vmm.extents import Footprint
from kvcached_vmm.fence import Mark, Passed, Quarantine
from kvcached_vmm.poison import PoisonedArena
from kvcached_vmm.tensors import StreamMarks, arena_tensor, device_driver, make_arena
from kvcached_vmm.units import format_size


@dataclass(frozen=True)
class Progress:
    """How far a worker's device is: the last step that is done, extents yet to be released, and
    seconds that driver calls have taken so far."""

    done_step: int
    waiting_extents: int
    driver_seconds: float


@dataclass(frozen=True)
class WorkerReport:
    """What an engine core learns of a worker.

    Attributes:
        device: the ledger's name of the device that this worker is on.
        granularity: bytes of the driver's smallest mapping.
        fixed_bytes: weights, graphs and peak activations, as far as vLLM measured them.
        default_budget_bytes: what engines on the device share if no user says.
    """

    device: str
    granularity: int
    fixed_bytes: int
    default_budget_bytes: int


class WorkerMemory:
    """The memory of one worker's KV cache.

    From start-up until ``start`` the worker answers for its bytes itself: vLLM's warm-up writes
    blocks that no pool has handed out. Afterwards the engine core has reserved whatever it names.
    """

    def __init__(self, worker: Any, kv_cache_config: Any, settings: Settings) -> None:
        plan: Plan = getattr(kv_cache_config, ATTRIBUTE)
        self.device: torch.device = worker.device
        self.driver = device_driver(self.device)
        self.fixed_bytes = int(getattr(worker, "kvcached_fixed_bytes", 0))
        on_gpu = self.device.type == "cuda"
        share = worker.cache_config.gpu_memory_utilization if on_gpu else 0.0
        self.default_budget_bytes = default_budget(self.driver, share)
        extents = extent_map(kv_cache_config, plan, self.driver.granularity)
        self.arena = make_arena(self.driver, extents, self.device, settings.poison)
        self._poisoned = self.arena if isinstance(self.arena, PoisonedArena) else None
        self._mark: Callable[[], Mark] = (
            StreamMarks(self.device) if self.device.type == "cuda" else Passed
        )
        self._quarantine = Quarantine(self._mark)
        self._last_mark: Mark | None = None
        self._ordered_step = self._launched_step = self._done_step = 0
        self._orders: Orders | None = None
        self._over: deque[Orders] = deque(maxlen=1)
        """Those of the last step whose launch is over, until ``after_step``."""
        self.is_led = False
        """Whether an engine core in this process says when to do what need not hold up a step."""
        self._settings = settings
        self._backing = Backing(self.arena, lambda: self._join("not given back"))
        self._starting: Account | None = self._join("starting")
        self._commit({0})

    @property
    def driver_seconds(self) -> float:
        """How long driver calls have taken so far."""
        return self._backing.driver_seconds

    def tensor(self, size_bytes: int) -> torch.Tensor:
        """The buffer that vLLM lays its layers out in."""
        return arena_tensor(self.arena, size_bytes, self.device)

    def before_step(self, scheduler_output: Any) -> None:
        """Make resident every block that the step names, and note what it gives back."""
        self.launch_is_over()  # of the step before, if nothing was sampled after it
        self._orders = orders = getattr(scheduler_output, ATTRIBUTE, None)
        with self._backing:
            missing = self.arena.missing(chain.from_iterable(named_blocks(scheduler_output)))
            if missing:
                self._commit(missing)
            if self._poisoned is not None:
                self._poisoned.hand_out(chain.from_iterable(named_blocks(scheduler_output)))
            if orders is not None:
                self._ordered_step = orders.step
                self._quarantine.put(orders.step, orders.release)

    @property
    def is_behind(self) -> bool:
        """Whether the launch of a step is over for which ``after_step`` has yet to be called."""
        return bool(self._over)

    def launch_is_over(self) -> None:
        """All of the step is launched, sampling too."""
        orders, self._orders = self._orders, None
        if orders is not None:
            self._over.append(orders)
            if not self.is_led:
                self.after_step()

    def after_step(self) -> None:
        """Do what need not hold up a step, once for each whose launch is over. On any thread."""
        if not self._over:
            return
        with self._backing:
            orders = self._over.pop()
            self._launched_step, self._last_mark = orders.step, None
            self._backing.release(self._quarantine.take(orders.step - 1))
        self.commit_ahead(orders.commit)

    def commit_ahead(self, extents: Sequence[int]) -> None:
        """Back ``extents`` with memory, if the driver has it now."""
        if extents:
            self._backing.commit_if_possible(extents)

    def obey(self, orders: Orders) -> Progress:
        """The engine takes no steps: release what is quiet, without waiting for the device."""
        with self._backing:
            self._quarantine.put(orders.step, orders.release)
            self._backing.release(self._quarantine.take(0))
            if self._done_step < self._launched_step:
                # Set here and not after each launch: only of an engine that rests it is asked.
                self._last_mark = self._last_mark or self._mark()
                if self._last_mark.query():
                    self._done_step = self._launched_step
            return Progress(self._done_step, len(self._quarantine), self.driver_seconds)

    def open_step(self, release: bool) -> int:
        """The first step whose orders are not all carried out.

        Args:
            release: carry out now what can be, without waiting for the device.
        """
        with self._backing:
            if release:
                self._backing.release(self._quarantine.take(0))
            waiting = self._quarantine.oldest_step
            after = self._ordered_step + 1
            return after if waiting is None else min(waiting, after)

    def start(self) -> WorkerReport:
        """Start-up is over: keep the first extent only, and leave the accounts to the engine."""
        with self._backing:
            self._mark().synchronize()
            self._backing.release(self.arena.committed - {0})
            if self._starting is not None:
                self._starting.close()
                self._starting = None
        return WorkerReport(
            self.driver.device,
            self.driver.granularity,
            self.fixed_bytes,
            self.default_budget_bytes,
        )

    def sleep(self) -> None:
        """Give everything back; only ``wake`` may follow."""
        with self._backing:
            self._mark().synchronize()
            self._backing.release([*self._quarantine.take(1 << 62), *self.arena.committed])

    def close(self) -> None:
        """The engine is gone: give the addresses back too."""
        with self._backing:
            self.sleep()
            with contextlib.suppress(DriverError):  # what it keeps is tried again
                self.arena.close()

    def wake(self) -> None:
        """Back the first extent with memory again."""
        self._commit({0})

    def _join(self, as_what: str) -> Account:
        name, device = self._settings.name or "vllm", self.driver.device
        return join_beside(self._settings, name, as_what, device, self.default_budget_bytes)

    def _commit(self, extents: set[int]) -> None:
        self._backing.commit(extents, lambda: self._account_for(extents))

    def _account_for(self, extents: Iterable[int]) -> None:
        if self._starting is None:
            return
        size = Footprint(self.arena.extents)
        wanted = sum(piece.size for extent in extents for piece in size.add(extent))
        granted = self._starting.reserve(wanted, wanted)
        self._starting.report(0, 0, wanted - granted)
        if granted < wanted:
            raise DriverError("reserve", f"the ledger has no {format_size(wanted)} to grant")
        self._starting.commit(wanted, wanted)


def named_blocks(scheduler_output: Any) -> Iterator[Iterable[int]]:
    """Block ids that a step may touch for the first time, group by group."""
    for request in scheduler_output.scheduled_new_reqs:
        yield from request.block_ids
    for new_block_ids in scheduler_output.scheduled_cached_reqs.new_block_ids:
        if new_block_ids is not None:
            yield from new_block_ids
