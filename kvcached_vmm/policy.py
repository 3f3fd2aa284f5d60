"""What a pool wants from its surroundings, and what it is told: blocks, a budget and a policy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kvcached_vmm.extents import ExtentMap


class Block(Protocol):
    """What the pool needs to know of an engine's block."""

    @property
    def block_id(self) -> int: ...


B = TypeVar("B", bound=Block)

LOOK_SECONDS = 0.1
"""How often a pool's ``tick`` looks for idle or old extents; 0.2 us for each block on the stack."""

HOLES = 16
"""Whoever takes whole extents' worth of blocks leaves holes in others alone, unless there are more
of them than a sixteenth of what is live (and as many as are taken): measured with churn.py."""

APPETITE_SECONDS = 1.0
"""Prompts come in bursts: one that found no memory ready is often followed by another."""

TIGHT_SECONDS = 1.0
"""How long the whole reserve is wanted after the budget has had too little. What neighbours give
comes a round or two late, and vLLM preempts a running request that lacks a single block."""


class Budget(Protocol):
    """Bytes that a pool may use."""

    def reserve(self, wanted_bytes: int, unit_bytes: int) -> int:
        """Grant at most ``wanted_bytes``, in whole units; return what was granted."""
        ...

    def commit(self, granted_bytes: int, used_bytes: int, extents: int) -> None:
        """Turn ``granted_bytes`` of grants into ``used_bytes`` of memory in use, which are those of
        so many ``extents``; the rest goes back unused."""
        ...

    def release(self, used_bytes: int) -> None:
        """Memory is no longer in use."""
        ...


@dataclass(frozen=True)
class Policy:
    """How long memory is kept.

    Attributes:
        decay_seconds: an idle extent is kept this long for reuse.
        cache_seconds: a cached extent that nobody asks for is kept this long.
        cache_bytes: cached blocks may hold this much before new blocks evict them; None: no bound.
        reserve_bytes: idle extents kept ready while any block is live, at most (``Appetite``).
        own_extents: long requests get extents of their own (``Runs``): for engines that keep no
            cache, where an extent waits for the last request in it.
    """

    decay_seconds: float = 0.5
    cache_seconds: float = 60.0
    cache_bytes: int | None = None
    reserve_bytes: int = 0
    own_extents: bool = False

    def most_cached(self, extents: ExtentMap) -> int:
        """How many blocks may be cached before new blocks evict them."""
        bound = self.cache_bytes
        return extents.num_blocks if bound is None else bound // extents.block_bytes


class Appetite:
    """How much should be ready: what the hungriest scheduling round of the last one to two seconds
    took, or the whole reserve while the budget has too little. Times are seconds on one clock.

    Attributes:
        taken: blocks that were handed out in the round that is not over yet.
    """

    def __init__(self) -> None:
        self.taken = 0
        self._most = self._before = 0
        self._until = 0.0
        self._tight_until = -math.inf

    def settle(self, now: float) -> None:
        """A round is over."""
        if now >= self._until:
            self._before = self._most if now < self._until + APPETITE_SECONDS else 0
            self._most, self._until = 0, now + APPETITE_SECONDS
        if self.taken > self._most:
            self._most = self.taken
        self.taken = 0

    def refused(self, now: float) -> None:
        """The budget had less than was asked of it."""
        self._tight_until = now + TIGHT_SECONDS

    def is_tight(self, now: float) -> bool:
        """Whether the budget had too little of late."""
        return now < self._tight_until

    def extents(self, reserve: int, blocks_per_extent: int, now: float) -> int:
        """How many idle extents to keep ready, at most ``reserve``."""
        if self.is_tight(now):
            return reserve
        return min(reserve, 1 + max(self._most, self._before) // blocks_per_extent)

    def low(self, ready: int, now: float) -> int:
        """Below how many idle extents more are asked for, where ``ready`` are wanted.

        Neighbours are asked for half of the reserve at a time: a single extent wakes them as often.
        """
        return min(ready, ready // 2 + 1) if self.is_tight(now) else ready


@dataclass(frozen=True)
class Spending:
    """What a pool's committed bytes are good for; see ``records.AccountView``."""

    live_bytes: int
    cached_bytes: int
    evictable_bytes: int
    idle_bytes: int
    leaving_bytes: int
    ages: tuple[float, ...]
