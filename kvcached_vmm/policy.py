"""What a pool wants from its surroundings, and what it is told: blocks, a budget and a policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from kvcached_vmm.extents import ExtentMap


class Block(Protocol):
    """What the pool needs to know of an engine's block."""

    @property
    def block_id(self) -> int: ...


B = TypeVar("B", bound=Block)


class Budget(Protocol):
    """Bytes that a pool may use. ``ledger.Account`` is one."""

    def reserve(self, wanted_bytes: int, unit_bytes: int) -> int:
        """Grant at most ``wanted_bytes``, in whole units; return what was granted."""
        ...

    def commit(self, granted_bytes: int, used_bytes: int) -> None:
        """Turn ``granted_bytes`` of grants into ``used_bytes`` of memory in use."""
        ...

    def cancel(self, granted_bytes: int) -> None:
        """Give grants back unused."""
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
        reserve_bytes: idle extents kept ready while any block is live.
    """

    decay_seconds: float = 0.5
    cache_seconds: float = 60.0
    cache_bytes: int | None = None
    reserve_bytes: int = 0

    def most_cached(self, extents: ExtentMap) -> int:
        """How many blocks may be cached before new blocks evict them."""
        bound = self.cache_bytes
        return extents.num_blocks if bound is None else bound // extents.block_bytes


@dataclass(frozen=True)
class Spending:
    """What a pool's committed bytes are good for; see ``records.AccountView``."""

    live_bytes: int
    cached_bytes: int
    evictable_bytes: int
    idle_bytes: int
    leaving_bytes: int
    ages: tuple[float, ...]
