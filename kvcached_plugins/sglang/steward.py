"""One steward per scheduler ties SGLang's allocator, the ledger and the prefix cache together."""

from __future__ import annotations

import itertools
import logging
import time
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from kvcached_plugins.backing import PATIENCE_SECONDS
from kvcached_plugins.hub import plugins
from kvcached_plugins.settings import Settings
from kvcached_plugins.sglang.allocators import ElasticPages
from kvcached_plugins.sglang.demand import demand_pages, is_idle, queued_pages, uncached_pages
from kvcached_plugins.sglang.memory import PoolMemory
from kvcached_plugins.sglang.ranks import Agreement
from kvcached_plugins.tenant import EVERYTHING, LOOK_SECONDS, Tenant
from kvcached_vmm.admission import Admission
from kvcached_vmm.policy import Spending
from kvcached_vmm.records import AGES, NO_LIMIT
from kvcached_vmm.units import GIB, format_size

logger = logging.getLogger("sglang.kvcached")

CONTEXT_BYTES = GIB
"""CUDA context, libraries and graphs of one engine, which torch does not count (H200: 0.8 to 1.3
GiB)."""

SORT_SECONDS = 0.25
"""How often the free list is put in order beside running requests that nobody presses: it takes
about ten kernels, and what it finds must stay free for ``decay_seconds`` before it goes."""

ANSWER_SECONDS = 0.002
"""How soon an engine that rests looks again when it has been asked for memory."""

LOOK_ROUNDS = 16
"""How often ranks look, which must do so in the same round; an idle SGLang makes thousands a
second."""

RELEASE_BATCH = 4
"""Extents given back at a time beside running requests: a driver call takes up to 0.2 ms while
kernels run (H200), and an extent is one mapping per layer and buffer."""

RESERVE_EXTENTS = 1
"""Committed beside a running batch, so that the next one finds memory there."""

POLL_SECONDS = 0.01
"""How often a batch that cannot go on asks again."""

STARVED_SECONDS = 1.0
"""How long a batch that cannot go on at all waits for others' memory before SGLang retracts
requests of it. The last one it would abort: that one waits for ``PATIENCE_SECONDS``."""


class Steward:
    """Runs the elastic cache of one scheduler, on the thread of that scheduler.

    Ranks of one tensor-parallel group replay the same decisions. Whatever may differ between them
    (clocks, ledgers, drivers) goes through ``agree`` at moments that all of them reach.

    Args:
        scheduler: SGLang's, complete.
        settings: what the user wants.
        agree: the least of each number over all ranks.
    """

    def __init__(self, scheduler: Any, settings: Settings, agree: Agreement) -> None:
        self._scheduler = scheduler
        self._settings = settings
        self._agree = agree
        self.allocator: ElasticPages = scheduler.token_to_kv_pool_allocator
        memory = self.allocator.memory
        assert memory is not None
        self.memory: PoolMemory = memory
        self.page_bytes = memory.arena.extents.block_bytes
        self.admission = Admission(memory.arena.extents)
        self._reserve = RESERVE_EXTENTS
        if settings.reserve_bytes is not None:
            self._reserve = settings.reserve_bytes // memory.unit_bytes
        self._rounds = itertools.count(1)
        self._next_look = self._next_sort = 0.0
        self._heard = memory.shares.rings
        self._active_at: float | None = None
        self._cache_bytes: int | None = settings.cache_bytes
        self._before = 0, NO_LIMIT
        self._pressure = 0
        self._pressed_at = -LOOK_SECONDS
        self._trimming = False
        if memory.device.type == "cuda":
            memory.shares.fix(torch.cuda.memory_reserved(memory.device) + CONTEXT_BYTES)
        plugins()  # so that the first who waits does not wait for other packages to load
        self._tenant = Tenant(memory.shares, self, self._queued_bytes)
        self._agree_on_terms(0.0)
        logger.info(
            "kvcached: elastic cache of %r: %s virtual, %d pages, extents of %s, up to %s, on %s",
            memory.name,
            format_size(memory.arena.size_bytes),
            memory.book.total_pages,
            format_size(memory.unit_bytes),
            format_size(memory.shares.limit_bytes()),
            memory.arena.driver.device,
        )

    def begin_round(self) -> None:
        """SGLang is about to choose a batch: get grants for whatever it may allocate in it."""
        pages = demand_pages(self._scheduler, self.allocator.page_size)
        waited, waiting = self.admission.shortage() != (0, 0), self._scheduler.waiting_queue
        self._reserve_for(pages)
        if waiting and self.admission.share_bytes is not None:
            # SGLang tries no request while it takes its batch to be full.
            self.admits(waiting[0], 0)
        self.admission.settle()
        self._tick()
        self._tenant.report(force=waited and self.admission.shortage() == (0, 0))
        if not pages:
            return
        running = self._scheduler.running_batch
        patience_s = STARVED_SECONDS if running.batch_size() > 1 else PATIENCE_SECONDS
        polls = int(patience_s / POLL_SECONDS)
        while polls and self._starved():
            self._tenant.report(force=True)
            time.sleep(POLL_SECONDS)
            self._reserve_for(pages)
            self.admission.settle()
            polls -= 1
        share = self.admission.share_bytes
        before, now = self._before, (self._spare_pages(), NO_LIMIT if share is None else share)
        if running.is_empty() or now[0] > before[0] or now[1] > before[1]:
            # SGLang takes a batch to stay full until one of its requests ends; here room may also
            # come from a neighbour, even when no request runs.
            running.batch_is_full = False
        self._before = now

    def admits(self, request: Any, chosen_tokens: int) -> bool:
        """Whether ``request`` may begin beside those that run and those that were chosen in this
        round, for whose ``chosen_tokens`` no pages are allocated yet."""
        size = self.allocator.page_size
        live = self._live_pages() + -(-chosen_tokens // size)
        return self.admission.admits(live, uncached_pages(request, size))

    def end_round(self) -> None:
        """The batch is chosen and its pages are allocated."""
        if self.memory.book.credit:
            self.memory.settle()

    def cover(self, pages: int) -> None:
        """``pages`` that are not on the free list are about to be taken. If that is more than the
        round was granted, get grants now, or forget prefixes for what others took meanwhile."""
        missing = self.memory.book.extents_for(pages) - self.memory.book.credit
        if missing > 0 and self._grant(missing) < missing:
            self._evict(pages)

    def launched(self) -> None:
        """A batch is on its way: commit ahead of need what the next one may want, or have
        neighbours told that it is missing."""
        memory = self.memory
        spare = len(memory.book.idle_extents)
        missing = min(self._reserve - spare, memory.book.empty_extents)
        if missing <= 0 or self._pressure:
            return
        if memory.book.room < missing:
            pages = missing * memory.arena.extents.blocks_per_extent
            self.admission.coveted(pages - self._evictable_pages())
        else:
            granted = self._grant(missing)
            if granted:
                self.allocator.gain(memory.grow(granted))

    def flushed(self) -> None:
        """SGLang has forgotten all that it cached: give it back now."""
        memory = self.memory
        self.allocator.cut(memory.leave(len(memory.book.idle_extents)))
        memory.collect(wait=True)
        self._tenant.report(force=True)

    def sleep(self) -> None:
        """Take the KV cache to zero bytes; no request may be there."""
        self.memory.sleep()
        self.allocator.free_pages = self.allocator.free_pages[:0]
        self._tenant.report(force=True)

    def wake(self) -> None:
        """Back the sink with memory again; the rest comes when it is needed."""
        if 0 not in self.memory.arena:
            self.allocator.gain(self.memory.grow(1))
            self._tenant.report(force=True)

    def withheld_tokens(self) -> int:
        """Tokens' worth of pages that are neither in use nor available."""
        return self.memory.book.withheld_pages * self.allocator.page_size

    @property
    def committed_bytes(self) -> int:
        """Bytes of extents that have memory."""
        return self.memory.arena.needed_bytes

    def spending(self) -> Spending:
        """What the committed bytes are good for."""
        cached, memory = self._cached_bytes(), self.memory
        return Spending(
            self._live_pages() * self.page_bytes,
            cached,
            cached,
            len(memory.book.idle_extents) * memory.unit_bytes,
            memory.leaving * memory.unit_bytes,
            (self._active_at or 0.0,) * AGES,
        )

    def look_at_cache(self) -> None:
        """SGLang counts what can be evicted itself."""

    def bound_cache(self, cache_bytes: int | None) -> None:
        """Cached pages may hold this much from now on; None: no bound."""
        self._cache_bytes = cache_bytes

    def reclaim(self, wanted_bytes: int) -> list[int]:
        """``wanted_bytes`` are to be given back, as soon as all ranks are told so: none yet."""
        self._pressure = max(self._pressure, wanted_bytes)
        return []

    def numbers(self) -> dict[str, int]:
        """What tools may want to know, in bytes and pages."""
        memory = self.memory
        free = len(self.allocator.free_pages)
        return {
            "virtual_bytes": memory.arena.size_bytes,
            "committed_bytes": memory.arena.committed_bytes,
            "limit_bytes": memory.shares.limit_bytes(),
            "extent_bytes": memory.unit_bytes,
            "live_bytes": self._live_pages() * self.page_bytes,
            "cached_bytes": self._cached_bytes(),
            "free_pages": free,
            "withheld_pages": memory.book.withheld_pages,
        }

    def clamp_request_length(self) -> None:
        """Keep requests to what the limit holds in whole extents, beside the sink.

        SGLang rejects a longer prompt and shortens a longer answer, as for a small pool.
        """
        memory, scheduler, limit = self.memory, self._scheduler, self.admission.limit_bytes
        extents = limit // memory.unit_bytes
        pages = extents * memory.arena.extents.blocks_per_extent - 1
        tokens = min(pages, memory.book.total_pages) * self.allocator.page_size - 1
        if tokens < scheduler.max_req_len:
            logger.warning(
                "kvcached: a request may have %d tokens, for %s hold no more; raise KVCACHED_BUDGET"
                " or KVCACHED_MAX for longer ones",
                tokens,
                format_size(limit),
            )
            scheduler.max_req_input_len -= scheduler.max_req_len - tokens
            scheduler.max_req_len = tokens

    def _reserve_for(self, pages: int) -> None:
        """Get grants for as many of ``pages`` as are not on the free list."""
        book = self.memory.book
        wanted = book.extents_for(pages - len(self.allocator.free_pages)) - book.credit
        if wanted > 0:
            self._grant(wanted)
            self.admission.refused(max(0, pages - self._spare_pages()))

    def _grant(self, extents: int) -> int:
        """Get grants for ``extents``, or as many as every rank gets; returns how many."""
        book = self.memory.book
        granted = self.memory.reserve(extents)
        [agreed] = self._agree(granted)
        self.memory.cancel(granted - agreed)
        book.credit += agreed
        book.room = max(0, book.room - agreed) if agreed == extents else 0
        return agreed

    def _spare_pages(self) -> int:
        """Pages that could be had now, those that would be evicted for it included."""
        free = len(self.allocator.free_pages)
        return free + self.memory.book.promised_pages + self._evictable_pages()

    def _starved(self) -> bool:
        """Whether requests run, need a page, and not one can be had."""
        running = self._scheduler.running_batch
        return (
            self._spare_pages() == 0
            and not running.is_empty()
            and running.new_tokens_required_next_decode() > 0
        )

    def _tick(self) -> None:
        """Look for what may be given back, now and then."""
        now, rings = time.monotonic(), self.memory.shares.rings
        if self._agree.ranks > 1:
            if next(self._rounds) % LOOK_ROUNDS:
                return
        elif now < self._next_look and rings == self._heard:
            return
        self._next_look, self._heard = now + LOOK_SECONDS, rings
        memory, allocator = self.memory, self.allocator
        in_step = self._agree.ranks > 1
        memory.collect(wait=in_step)
        self._pressure = EVERYTHING if self._trimming else 0
        self._tenant.owed(urgent=True)
        now = self._agree_on_terms(now)
        allocator.find(now, wait=in_step)
        idle = is_idle(self._scheduler)
        if self._active_at is None or not idle:
            self._active_at = now
        self._give_back(now, idle)
        # After ``_agree_on_terms``, so that all ranks sort in the same round.
        if allocator.unsorted and (idle or self._pressure or now >= self._next_sort):
            self._next_sort = now + SORT_SECONDS
            allocator.sort()
            if memory.device.type == "cpu":
                allocator.find(now)
        if self._pressure:
            self._pressed_at = now
        if idle and (memory.leaving or now - self._pressed_at < LOOK_SECONDS):
            # Prefixes, the pages that they held, and the device's last work go one after the other.
            self._next_look = time.monotonic() + ANSWER_SECONDS
        self._tenant.report(force=True)

    def _agree_on_terms(self, now: float) -> float:
        """Every rank goes by the least room, share, limit and bound, the highest pressure and the
        clock of the one that is behind; returns that time."""
        admission = self.admission
        now_us, room, lessened, limit, share, cache = self._agree(
            int(now * 1e6),
            self.memory.room(),
            -self._pressure,
            admission.limit_bytes,
            NO_LIMIT if admission.share_bytes is None else admission.share_bytes,
            NO_LIMIT if self._cache_bytes is None else self._cache_bytes,
        )
        self.memory.book.room, self._pressure = room, -lessened
        admission.limit_bytes = limit
        admission.share_bytes = None if share == NO_LIMIT else share
        self._cache_bytes = None if cache == NO_LIMIT else cache
        return now_us / 1e6

    def _give_back(self, now: float, idle: bool) -> None:
        memory, allocator, settings = self.memory, self.allocator, self._settings
        bytes_each = memory.unit_bytes
        if self._pressure:
            count = min(-(-self._pressure // bytes_each), len(memory.book.idle_extents))
        else:
            keep = 0 if idle else self._reserve
            count = memory.book.due(now, settings.decay_seconds, keep)
            count = count if idle else min(count, RELEASE_BATCH)
        allocator.cut(memory.leave(count, owed=self._pressure > 0))
        cached = self._cached_bytes()
        surplus = 0
        if self._pressure:
            surplus = self._pressure - memory.leaving * bytes_each
        elif idle and self._active_at is not None:
            surplus = cached if now - self._active_at >= settings.cache_seconds else 0
        if self._cache_bytes is not None:
            surplus = max(surplus, cached - self._cache_bytes)
        if surplus > 0 and cached:
            self._evict(-(-surplus // self.page_bytes))
        # Whoever asks for everything asks once, and the memory of prefixes is found to be free a
        # look later.
        busy = allocator.unsorted or allocator.looking
        self._trimming = self._pressure >= EVERYTHING and busy

    def _evict(self, pages: int) -> None:
        tokens = pages * self.allocator.page_size
        self._scheduler.tree_cache.evict(EvictParams(num_tokens=tokens))

    def _evictable_pages(self) -> int:
        return int(self._scheduler.tree_cache.evictable_size()) // self.allocator.page_size

    def _cached_bytes(self) -> int:
        return int(self._evictable_pages() * self.page_bytes)

    def _live_pages(self) -> int:
        used = self.memory.book.live_pages(len(self.allocator.free_pages))
        return used - self._evictable_pages()

    def _queued_bytes(self) -> int:
        return int(queued_pages(self._scheduler, self.allocator.page_size) * self.page_bytes)
