"""One steward per engine ties its pool, the ledger and its workers together."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from kvcached_plugins.settings import Settings
from kvcached_plugins.vllm.geometry import ATTRIBUTE, Orders, Plan, extent_map
from kvcached_plugins.vllm.memory import (
    PATIENCE_SECONDS,
    Progress,
    WorkerMemory,
    WorkerReport,
)
from kvcached_plugins.vllm.pool import ElasticBlockPool, ElasticFreeQueue
from kvcached_plugins.vllm.shares import Shares
from kvcached_vmm.errors import EngineUnsupported
from kvcached_vmm.extents import ExtentMap
from kvcached_vmm.fence import StepClock
from kvcached_vmm.ledger import Account, Ledger
from kvcached_vmm.policy import Policy
from kvcached_vmm.units import format_size

logger = logging.getLogger("vllm.kvcached")

IDLE_BATCH = 128
"""Extents given back at a time when there is no step to hold up."""

RESERVE_EXTENTS = 8
"""Committed behind the back of a running step, so that a prompt of 1,000 tokens finds its memory
there: a commit in front of a step costs time to first token."""

QUIET_SECONDS = 0.1
"""An engine that has not launched a step for this long does not release memory beside its steps."""

ASK_SECONDS = 0.02
"""How often an engine looks whether another one waits for memory."""

REPORT_SECONDS = 0.05
"""How often the ledger learns what our bytes are good for."""


class Steward:
    """Runs an engine's elastic cache. Made with the engine's scheduler, when warm-up is over."""

    def __init__(self, core: Any, scheduler: Any, settings: Settings) -> None:
        config = core.vllm_config
        self._core = core
        self._executor = core.model_executor
        in_process = type(self._executor).__name__ == "UniProcExecutor"
        self._local: WorkerMemory | None = (
            self._executor.driver_worker.worker.kvcached if in_process else None
        )
        reports: list[WorkerReport] = self._executor.collective_rpc("kvcached_start")
        name = settings.name or str(
            config.model_config.served_model_name or config.model_config.model
        )
        self._budget = Shares(
            [
                (self._join(settings, name, device, reports), ranks)
                for device, ranks in Counter(report.device for report in reports).items()
            ],
            self._driver_free_bytes if self._local else None,
        )
        manager = scheduler.kv_cache_manager
        block_pool: ElasticBlockPool = manager.block_pool
        self.clock = StepClock()
        kv_cache_config = scheduler.kv_cache_config
        plan: Plan = getattr(kv_cache_config, ATTRIBUTE)
        extents = extent_map(kv_cache_config, plan, reports[0].granularity)
        reserve = settings.reserve_bytes
        limit = self._budget.limit_bytes()
        _refuse_small_limit(limit, extents, plan.request_bytes)
        self.pool = ElasticFreeQueue(
            block_pool.blocks,
            extents,
            self._budget,
            self.clock,
            block_pool.evict,
            Policy(
                decay_seconds=settings.decay_seconds,
                cache_seconds=settings.cache_seconds,
                cache_bytes=settings.cache_bytes,
                reserve_bytes=min(limit // 32, RESERVE_EXTENTS * extents.largest_bytes)
                if reserve is None
                else reserve,
            ),
        )
        self._leaving: deque[tuple[int, Sequence[int]]] = deque()
        self._reported = self._launched_at = self._asked = 0.0
        self._next_look = 0.0
        self._waits = False
        self._stopped = threading.Event()
        self._get_first_extent()
        capacity = min(limit // extents.block_bytes, extents.num_blocks - 1)
        block_pool.bind(self.pool, max(1, capacity), int(getattr(manager, "watermark_blocks", 0)))
        logger.info(
            "kvcached: elastic cache of %r: %s virtual, %d blocks, extents of %s, up to %s, on %s",
            name,
            format_size(extents.size_bytes),
            extents.num_blocks,
            format_size(extents.largest_bytes),
            format_size(limit),
            ", ".join(sorted({report.device for report in reports})),
        )
        watched = weakref.ref(self)
        threading.Thread(
            target=_reclaimer, args=(watched, self._stopped), name="kvcached-reclaimer", daemon=True
        ).start()

    def launched(self, scheduler_output: Any) -> None:
        """A step has been scheduled: number it and give it its orders."""
        commit = self.pool.settle()
        release = self.pool.tick()
        release += self._answer_pressure()
        step = self.clock.launch()
        self._launched_at = time.monotonic()
        scheduler_output.kvcached = Orders(step, tuple(release), tuple(commit))
        if release:
            self._leaving.append((step, release))

    def finished(self, scheduler_output: Any) -> None:
        """The results of a step are here, so the one before it has released what it was told to."""
        orders: Orders | None = getattr(scheduler_output, ATTRIBUTE, None)
        if orders is None:
            return
        self.clock.finish(orders.step)
        self._confirm(orders.step)
        self._report()

    def idle(self, *_: Any) -> None:
        """Release what is due though the engine takes no steps.

        An engine used in process may leave its last step's results unread, so it is the workers who
        say which steps are done.
        """
        with self.pool.lock:
            if self._stopped.is_set() or time.monotonic() - self._launched_at < QUIET_SECONDS:
                return
            step = self.clock.launched
            release = self.pool.tick(IDLE_BATCH)
            release += self._answer_pressure()
            if release:
                self._leaving.append((step, release))
            if self._leaving or self.clock.finished < step:
                progress: list[Progress] = self._executor.collective_rpc(
                    "kvcached_obey", args=(Orders(step, tuple(release)),)
                )
                self.clock.finish(min(worker.done_step for worker in progress))
                if not any(worker.waiting_extents for worker in progress):
                    self._confirm(step + 1)
            self._report()

    def sleep(self) -> None:
        """vLLM has gone to sleep: take the KV cache to zero bytes."""
        with self.pool.lock:
            if self.pool.live_blocks:
                logger.warning("kvcached: requests still hold KV blocks; their memory stays")
                return
            self._executor.collective_rpc("kvcached_sleep")
            self._leaving.clear()
            self.pool.sleep()
            self._report(now=True)

    def wake(self) -> None:
        """vLLM is about to wake: its null block needs memory first."""
        self._get_first_extent()
        self._executor.collective_rpc("kvcached_wake")

    def close(self) -> None:
        """The engine has ended: give its memory back and leave the ledger."""
        with self.pool.lock:
            if not self._stopped.is_set():
                self._stopped.set()
                if self._local is not None:
                    self._local.close()
                self._budget.close()

    def _get_first_extent(self) -> None:
        """Wait until neighbours have made room for the null block."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.pool.wake():
            self._budget.report(0, 0, self.pool.extents.largest_bytes)
            if time.monotonic() > deadline:
                raise EngineUnsupported(
                    f"The budget had no room for an extent in {PATIENCE_SECONDS:.0f} s; stop an "
                    "engine or raise KVCACHED_BUDGET."
                )
            time.sleep(0.01)
        self._budget.report(0, 0, 0)

    def _driver_free_bytes(self) -> int:
        """A foreign process on the device shrinks what we may grant, whatever the ledger says."""
        assert self._local is not None
        return self._local.driver.memory().free_bytes

    def _confirm(self, step: int) -> None:
        """What was ordered before ``step`` has been released."""
        while self._leaving and self._leaving[0][0] < step:
            self.pool.released(self._leaving.popleft()[1])

    def _join(
        self, settings: Settings, name: str, device: str, reports: Sequence[WorkerReport]
    ) -> Account:
        here = [report for report in reports if report.device == device]
        account = Ledger.open(settings.directory, device).join(
            name,
            settings.budget_bytes,
            settings.minimum_bytes,
            settings.maximum_bytes,
            default_budget_bytes=here[0].default_budget_bytes,
        )
        account.fix(sum(report.fixed_bytes for report in here))
        return account

    def _answer_pressure(self) -> list[int]:
        """Spare what another engine waits for, unless we wait ourselves."""
        moment = time.monotonic()
        if moment - self._asked < ASK_SECONDS or self._waits:
            return []
        self._asked = moment
        wanted = self._budget.wanted_by_others()
        return self.pool.reclaim(wanted) if wanted else []

    def _report(self, now: bool = False) -> None:
        moment = time.monotonic()
        if now or moment - self._reported > REPORT_SECONDS:
            self._reported = moment
            block = self.pool.extents.block_bytes
            wanted = self.pool.take_shortage()
            self._waits = wanted > 0
            self._budget.report(
                self.pool.live_blocks * block, self.pool.cached_blocks * block, wanted
            )

    def look(self) -> None:
        """Called from time to time by the reclaimer thread, for an idle engine takes no steps.

        A worker of its own process must be spoken to from the engine's main thread, which waits for
        requests; one in this process may be released from here.
        """
        moment = time.monotonic()
        if not self.pool.has_spare and not self._leaving:
            return
        if moment < self._next_look and not self._budget.wanted_by_others():
            return
        self._next_look = moment + min(1.0, max(0.05, self.pool.policy.decay_seconds / 4))
        if self._local is not None:
            self.idle()
        else:
            self._call_from_main_thread()

    def _call_from_main_thread(self) -> None:
        callbacks = getattr(self._core, "_idle_state_callbacks", None)
        if hasattr(self._core, "input_queue") and callbacks is not None and not callbacks:
            from vllm.v1.engine import EngineCoreRequestType

            callbacks.append(self.idle)
            self._core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))


def _reclaimer(watched: weakref.ref[Steward], stopped: threading.Event) -> None:
    """Does not keep an engine alive that its user has dropped."""
    while not stopped.wait(ASK_SECONDS):
        steward = watched()
        if steward is None:
            return
        steward.look()
        del steward


def _refuse_small_limit(limit_bytes: int, extents: ExtentMap, request_bytes: int) -> None:
    blocks = 1 + -(-request_bytes // extents.block_bytes)
    needed = -(-blocks // extents.blocks_per_extent) * extents.largest_bytes
    if limit_bytes < needed:
        raise EngineUnsupported(
            f"Each worker may use {format_size(limit_bytes)} for its KV cache, but one "
            f"request of the longest length needs {format_size(needed)} in whole extents; raise "
            "KVCACHED_BUDGET or KVCACHED_MAX, or lower --max-model-len or KVCACHED_EXTENT."
        )
