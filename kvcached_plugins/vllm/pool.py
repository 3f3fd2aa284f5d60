"""vLLM's block pool over an elastic pool: the engine keeps its hashing, events and counts."""

from __future__ import annotations

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from kvcached_vmm.pool import ElasticPool


class FreeQueue:
    """Stands in for vLLM's free queue and answers from an elastic pool.

    vLLM prepends blocks whose content is of no use and appends those that are cached.
    """

    def __init__(self, pool: ElasticPool[KVCacheBlock]) -> None:
        self._pool = pool
        self.popleft = pool.take_one
        self.popleft_n = pool.take
        self.prepend_n = pool.put
        self.append_n = pool.keep
        self.remove = pool.reclaim_cached

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free_blocks

    def append(self, block: KVCacheBlock) -> None:
        self._pool.keep([block])


class ElasticBlockPool(BlockPool):  # type: ignore[misc]
    """A stock block pool until ``bind``: vLLM also makes pools of host blocks for offloading."""

    elastic: ElasticPool[KVCacheBlock] | None = None
    margin_blocks = 0
    _capacity_blocks = 0
    _counts_everything = False

    def bind(
        self, pool: ElasticPool[KVCacheBlock], capacity_blocks: int, margin_blocks: int
    ) -> None:
        """Hand out blocks by ``pool`` from now on.

        Args:
            pool: an elastic pool over ``self.blocks``.
            capacity_blocks: how many live blocks make a usage of 1.
            margin_blocks: free blocks that vLLM wants left over when it admits a request.
        """
        self.elastic = pool
        self.margin_blocks = margin_blocks
        self._capacity_blocks = capacity_blocks
        self.free_block_queue = FreeQueue(pool)

    def evict(self, blocks: list[KVCacheBlock]) -> None:
        """Forget the content of free blocks."""
        for block in blocks:
            self._maybe_evict_cached_block(block)

    def get_num_free_blocks(self) -> int:
        if self._counts_everything and self.elastic is not None:
            return int(self.num_gpu_blocks) - 1 - self.elastic.live_blocks
        return int(super().get_num_free_blocks())

    def get_usage(self) -> float:
        if self.elastic is None:
            return float(super().get_usage())
        return min(1.0, self.elastic.live_blocks / self._capacity_blocks)

    def reset_prefix_cache(self) -> bool:
        if self.elastic is None:
            return bool(super().reset_prefix_cache())
        with self.elastic.lock:
            # vLLM compares the free blocks with all blocks; the budget has no say in that.
            self._counts_everything = True
            try:
                done = bool(super().reset_prefix_cache())
            finally:
                self._counts_everything = False
            if done:
                self.elastic.forget_all()
            return done
