"""One steward per engine ties its pool, the ledger and its workers together."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvcached_plugins import hub
from kvcached_plugins.backing import PATIENCE_SECONDS
from kvcached_plugins.settings import Settings
from kvcached_plugins.shares import FreeBytes, Shares, join
from kvcached_plugins.tenant import LOOK_SECONDS, Tenant
from kvcached_plugins.vllm.demand import computes_first_token, queued_blocks
from kvcached_plugins.vllm.geometry import ATTRIBUTE, Orders, Plan, extent_map
from kvcached_plugins.vllm.memory import Progress, WorkerMemory, WorkerReport
from kvcached_plugins.vllm.planning import gives_own_extents, refuse_small_limit
from kvcached_plugins.vllm.pool import ElasticBlockPool, ElasticFreeQueue
from kvcached_plugins.vllm.reclaimer import HEARTBEAT_SECONDS, start_reclaimer
from kvcached_vmm.account import Account
from kvcached_vmm.errors import EngineUnsupported
from kvcached_vmm.fence import StepClock
from kvcached_vmm.host_driver import HostDriver
from kvcached_vmm.policy import Policy
from kvcached_vmm.units import MIB, format_size

logger = logging.getLogger("vllm.kvcached")

IDLE_BATCH = 128
"""Extents given back at a time when there is no step to hold up."""

RESERVE_BYTES = 512 * MIB
"""At most so much is committed behind the back of a running step, so that prompts find their memory
there: a commit in front of a step costs time to first token."""

QUIET_SECONDS = 0.1
"""An engine that has not launched a step for this long does not release memory beside its steps."""

FIRST_TOKEN_SECONDS = 0.1
"""So long what need not hold up a step waits for first tokens that are being computed, at most."""

PACE_SECONDS = 0.02
"""How often it is done at most: a step without a first token takes a few milliseconds, and little
of the reserve."""


class _Leaving(NamedTuple):
    """Extents whose release was ordered with ``step``; ``owed_at`` is when others were owed them,
    0 if they were not."""

    step: int
    extents: Sequence[int]
    owed_at: float


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
        kv_cache_config = scheduler.kv_cache_config
        plan: Plan = getattr(kv_cache_config, ATTRIBUTE)
        extents = extent_map(kv_cache_config, plan, reports[0].granularity)
        self._shares = Shares(
            [
                (_join(settings, name, device, reports, extents.size_bytes), ranks)
                for device, ranks in Counter(report.device for report in reports).items()
            ],
            self._free_bytes(reports),
        )
        manager = scheduler.kv_cache_manager
        self._block_pool: ElasticBlockPool = manager.block_pool
        self.clock = StepClock()
        reserve = settings.reserve_bytes
        limit = self._shares.limit_bytes()
        refuse_small_limit(limit, extents, plan.request_bytes)
        self.pool = ElasticFreeQueue(
            self._block_pool.blocks,
            extents,
            self._shares,
            self.clock,
            self._block_pool.evict,
            Policy(
                decay_seconds=settings.decay_seconds,
                cache_seconds=settings.cache_seconds,
                cache_bytes=settings.cache_bytes,
                reserve_bytes=min(limit // 32, RESERVE_BYTES) if reserve is None else reserve,
                own_extents=gives_own_extents(config),
            ),
        )
        self._scheduler = scheduler
        self._block_tokens = int(config.cache_config.block_size)
        self._tenant = Tenant(self._shares, self.pool, self._queued_bytes)
        self._leaving: deque[_Leaving] = deque()
        self._launched_at = self._next_look = 0.0
        self._caught_up_at = self._held_since = 0.0
        self._first_token_step = 0
        self._stopped = threading.Event()
        if self._local is not None:
            self._local.is_led = True
        self._get_first_extent()
        self._block_pool.bind(self.pool, int(getattr(manager, "watermark_blocks", 0)))
        logger.info(
            "kvcached: elastic cache of %r: %s virtual, %d blocks, extents of %s, up to %s, on %s",
            name,
            format_size(extents.size_bytes),
            extents.num_blocks,
            format_size(extents.largest_bytes),
            format_size(limit),
            ", ".join(sorted({report.device for report in reports})),
        )
        hub.plugins()  # so that the first who waits does not wait for other packages to load
        start_reclaimer(self, self._shares)

    def launched(self, scheduler_output: Any) -> None:
        """A step has been scheduled: number it and give it its orders. A worker in this process is
        told in ``stepped`` what to commit ahead."""
        commit = self._settle() if self._local is None else ()
        release = self.pool.tick()
        owed = self._tenant.owed()
        step = self.clock.launch()
        self._launched_at = time.monotonic()
        if computes_first_token(scheduler_output):
            self._first_token_step = step
        scheduler_output.kvcached = Orders(step, (*release, *owed), tuple(commit))
        self._leave(step, release, owed)

    def finished(self, scheduler_output: Any) -> None:
        """The results of a step are here.

        The one before it has released what it was told to. A worker in this process tells what it
        has released since, and releases at once what others wait for.
        """
        orders: Orders | None = getattr(scheduler_output, ATTRIBUTE, None)
        if orders is None:
            return
        self.clock.finish(orders.step)
        if self._local is None:
            self._confirm(orders.step)
        elif self._leaving:
            owed = any(each.owed_at for each in self._leaving)
            self._confirm(self._local.open_step(release=owed))

    def stepped(self) -> None:
        """The engine core has told the results of a step, and the next one may be under way: do
        what need not hold up either, if the worker is in this process.

        A step's results are told when the one after it has been launched. If they are first tokens,
        nothing comes before that which can wait.
        """
        if self._local is None:
            return
        now = time.monotonic()
        if not self.pool.admission.is_short:
            if self.clock.finished < self._first_token_step:
                self._held_since = self._held_since or now
                if now - self._held_since < FIRST_TOKEN_SECONDS:
                    return
            elif now - self._caught_up_at < PACE_SECONDS and not self._leaving:
                return
        with self.pool.lock:
            if not self._stopped.is_set():
                self._catch_up()

    def answer(self) -> None:
        """Release what others are owed beside a running step, if the worker is in this process.

        No scheduling round is under way, since that holds the pool's lock.
        """
        with self.pool.lock:
            if self._local is None or self._stopped.is_set():
                return
            owed, step = self._tenant.owed(urgent=True), self.clock.launched
            if owed:
                self._leave(step, (), owed)
                self._local.obey(Orders(step, tuple(owed)))
            if self._leaving:
                self._confirm(self._local.open_step(release=bool(owed)))

    def idle(self, *_: Any) -> None:
        """Release what is due though the engine takes no steps.

        An engine used in process may leave its last step's results unread, so it is the workers who
        say which steps are done.
        """
        with self.pool.lock:
            if self._stopped.is_set() or self._is_stepping():
                return
            if self._is_behind:
                self._catch_up()
            step, release = self.clock.launched, self.pool.tick(IDLE_BATCH)
            owed = self._tenant.owed(urgent=True)
            self._leave(step, release, owed)
            if self._leaving or self.clock.finished < step:
                progress: list[Progress] = self._executor.collective_rpc(
                    "kvcached_obey", args=(Orders(step, (*release, *owed)),)
                )
                self.clock.finish(min(worker.done_step for worker in progress))
                if not any(worker.waiting_extents for worker in progress):
                    self._confirm(step + 1)
                seconds = max(worker.driver_seconds for worker in progress)
                self._shares.counters.driver_seconds = seconds
            self._tenant.report()

    def sleep(self) -> None:
        """vLLM has gone to sleep: take the KV cache to zero bytes."""
        with self.pool.lock:
            if self.pool.live_blocks:
                logger.warning("kvcached: requests still hold KV blocks; their memory stays")
                return
            self._executor.collective_rpc("kvcached_sleep")
            self._leaving.clear()
            self.pool.sleep()
            self._tenant.report(force=True)

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
                self._shares.close()

    def look(self, heard: int) -> None:
        """Called from time to time by the reclaimer thread, for an idle engine takes no steps.

        A worker of its own process must be spoken to from the engine's main thread, which waits for
        requests; one in this process may be released from here.

        Args:
            heard: what the bell says. What the main thread has heard as well, maybe because it
                rang, needs no second look: it would take the interpreter from a launch.
        """
        now = time.monotonic()
        if now - self._tenant.reported_at >= HEARTBEAT_SECONDS:
            with self.pool.lock:
                if not self._stopped.is_set():
                    if not self._is_stepping():
                        self.pool.admission.forget()
                    self._tenant.report(force=True)
        if heard == self._tenant.heard and self._is_stepping():
            return
        due = self.pool.has_spare or self._leaving or self._is_behind
        spare = now >= self._next_look and due
        if not (spare or self.is_releasing or self._tenant.must_answer()):
            return
        self._next_look = now + min(1.0, max(LOOK_SECONDS, self.pool.policy.decay_seconds / 4))
        if self._local is None:
            self._call_from_main_thread()
        elif self._is_stepping():
            self.answer()
        else:
            self.idle()

    @property
    def is_calm(self) -> bool:
        """Whether the engine takes steps, which report for it, and nobody needs it to look."""
        return self._is_stepping() and not self._tenant.must_answer()

    @property
    def is_releasing(self) -> bool:
        """Whether the engine takes no steps and has yet to give back what it was told to."""
        return bool(self._leaving) and not self._is_stepping()

    @property
    def _is_behind(self) -> bool:
        return self._local is not None and self._local.is_behind

    @property
    def stopped(self) -> bool:
        """Whether the engine has ended."""
        return self._stopped.is_set()

    def _settle(self) -> list[int]:
        """A scheduling round is over: ask for the reserve, and tell the others how we are. Returns
        extents to commit ahead of need."""
        ahead = self.pool.settle()
        self._tenant.report()
        return ahead

    def _catch_up(self) -> None:
        # The lock is held until all is committed: what is given back meanwhile, at the wish of
        # others, would have its memory afterwards, and nobody would know.
        self._caught_up_at, self._held_since = time.monotonic(), 0.0
        if self._local is not None:
            self._local.after_step()
            self._local.commit_ahead(self._settle())
            self._shares.counters.driver_seconds = self._local.driver_seconds

    def _is_stepping(self) -> bool:
        """Whether a next step will take our orders along, soon."""
        if time.monotonic() - self._launched_at >= QUIET_SECONDS:
            return False
        in_flight = self.clock.finished < self.clock.launched
        return in_flight or bool(self._scheduler.has_requests())

    def _queued_bytes(self) -> int:
        """What requests need that wait and could run beside the others.

        Known to the neighbours at once, it spares as many rounds of asking and giving, and they
        keep to fair shares from the start.
        """
        blocks = queued_blocks(self._scheduler, self._block_tokens)
        return blocks * self.pool.extents.block_bytes

    def _leave(self, step: int, release: Sequence[int], owed: Sequence[int]) -> None:
        if release:
            self._leaving.append(_Leaving(step, release, 0.0))
        if owed:
            self._leaving.append(_Leaving(step, owed, time.monotonic()))

    def _confirm(self, step: int) -> None:
        """What was ordered before ``step`` has been released."""
        while self._leaving and self._leaving[0].step < step:
            _, extents, owed_at = self._leaving.popleft()
            before = self.pool.committed_bytes
            self.pool.released(extents)
            counters = self._shares.counters
            counters.releases += len(extents)
            if owed_at:
                counters.reclaims += 1
                counters.reclaimed_bytes += before - self.pool.committed_bytes
                counters.reclaim_seconds += time.monotonic() - owed_at

    def _get_first_extent(self) -> None:
        """Wait until neighbours have made room for the null block."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.pool.wake():
            self._shares.report(self.pool.spending(), self.pool.extents.largest_bytes, 0)
            if time.monotonic() > deadline:
                raise EngineUnsupported(
                    f"The budget had no room for an extent in {PATIENCE_SECONDS:.0f} s; stop an "
                    "engine or raise KVCACHED_BUDGET."
                )
            time.sleep(0.01)
        self._tenant.report(force=True)

    def _free_bytes(self, reports: Sequence[WorkerReport]) -> Callable[[], int] | None:
        """A foreign process on the device shrinks what we may grant, whatever the ledger says.

        Not known for GPUs of worker processes: asking would make a CUDA context here.
        """
        if self._local is not None:
            return FreeBytes(self._local.driver)
        if all(report.device == HostDriver.device for report in reports):
            return FreeBytes(HostDriver())
        return None

    def _call_from_main_thread(self) -> None:
        callbacks = getattr(self._core, "_idle_state_callbacks", None)
        if hasattr(self._core, "input_queue") and callbacks is not None and not callbacks:
            from vllm.v1.engine import EngineCoreRequestType

            callbacks.append(self.idle)
            self._core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))


def _join(
    settings: Settings,
    name: str,
    device: str,
    reports: Sequence[WorkerReport],
    arena_bytes: int,
) -> Account:
    here = [report for report in reports if report.device == device]
    account = join(
        settings,
        name,
        device,
        engine="vllm",
        default_budget_bytes=here[0].default_budget_bytes,
        arena_bytes=arena_bytes * len(here),
    )
    account.fix(sum(report.fixed_bytes for report in here))
    return account
