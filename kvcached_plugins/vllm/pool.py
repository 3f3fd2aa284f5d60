"""vLLM's block pool over an elastic pool: the engine keeps its hashing, events and counts."""

from __future__ import annotations

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from kvcached_vmm.pool import ElasticPool


class ElasticFreeQueue(ElasticPool[KVCacheBlock]):
    """An elastic pool under the names that vLLM's free queue has.

    vLLM prepends blocks whose content is of no use and appends those that are cached.
    """

    popleft_n = ElasticPool.take
    prepend_n = ElasticPool.put
    append_n = ElasticPool.keep
    remove = ElasticPool.reclaim_cached

    def popleft(self) -> KVCacheBlock:
        return self.take(1)[0]

    def append(self, block: KVCacheBlock) -> None:
        self.keep([block])


class ElasticBlockPool(BlockPool):  # type: ignore[misc]
    """A stock block pool until ``bind``: vLLM also makes pools of host blocks for offloading."""

    elastic: ElasticFreeQueue | None = None
    margin_blocks = 0

    def bind(self, pool: ElasticFreeQueue, margin_blocks: int) -> None:
        """Hand out blocks by ``pool`` from now on.

        Args:
            pool: an elastic pool over ``self.blocks``.
            margin_blocks: free blocks that vLLM wants left over when it admits a request.
        """
        self.elastic = pool
        self.margin_blocks = margin_blocks
        self.free_block_queue = pool

    def evict(self, blocks: list[KVCacheBlock]) -> None:
        """Forget the content of free blocks."""
        if self.enable_caching:
            for block in blocks:
                self._maybe_evict_cached_block(block)

    def get_usage(self) -> float:
        if self.elastic is None:
            return float(super().get_usage())
        return min(1.0, self.elastic.live_blocks / self.elastic.admission.capacity_blocks)

    def reset_prefix_cache(self) -> bool:
        if self.elastic is None:
            return bool(super().reset_prefix_cache())
        with self.elastic.lock:
            # vLLM compares the free blocks with all blocks; the budget has no say in that.
            unused = self.num_gpu_blocks - 1 - self.elastic.live_blocks
            self.get_num_free_blocks = lambda: unused
            try:
                done = bool(super().reset_prefix_cache())
            finally:
                del self.get_num_free_blocks
            if done:
                self.elastic.forget_all()
            return done
