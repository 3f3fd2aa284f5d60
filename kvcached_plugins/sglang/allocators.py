"""SGLang's allocators over memory that comes and goes.

Everything that they do with pages stays SGLang's own code. We see to it that pages are on the free
list before they are taken, and that those of extents without memory are not.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages

from kvcached_plugins.sglang.memory import PoolMemory
from kvcached_vmm.fence import Mark

ATTRIBUTE = "kvcached"
"""Name under which a pool's memory hangs on SGLang's pool of buffers."""


class ElasticPages:
    """What both allocators have in common. Stock behaviour over a pool that is not elastic.

    The free list holds pages with memory only; ``available_size`` adds those that could have it.
    """

    free_pages: torch.Tensor
    page_size: int
    device: Any
    steward: Any = None
    """What looks after the pool, once SGLang's scheduler is complete."""

    _kvcache: Any
    _look: tuple[torch.Tensor, Mark] | None = None
    _known = 0
    """Length of the free list after we last saw it taken from, lengthened or cut."""
    _freed = False
    _shortest = 0
    _host: torch.Tensor | None = None
    """Where the device writes what it found."""

    @property
    def memory(self) -> PoolMemory | None:
        """The memory behind the pool, if it is elastic."""
        found = getattr(self._kvcache, ATTRIBUTE, None)
        return found if isinstance(found, PoolMemory) else None

    def available_size(self) -> int:
        size = int(super().available_size())  # type: ignore[misc]
        if self.memory is not None:
            size += self.memory.book.promised_pages * self.page_size
        return size

    def clear(self) -> None:
        super().clear()  # type: ignore[misc]
        if self.memory is not None:
            self.free_pages = self.free_pages[:0]
            resident = self.memory.book.cleared(now=0.0)
            self.gain([self.memory.book.pages(extent) for extent in resident])

    def gain(self, pages: list[range]) -> None:
        """Put pages that have memory at the end of the free list."""
        self._freed = self._freed or self._look is not None
        self._look = None
        made = [
            torch.arange(run.start, run.stop, dtype=torch.int64, device=self.device)
            for run in pages
        ]
        self._note_freed()
        self.free_pages = torch.cat((self.free_pages, *made))
        self._known = len(self.free_pages)

    def cut(self, pages: int) -> None:
        """Take ``pages`` off the end of the free list."""
        if pages:
            self._note_freed()
            self.free_pages = self.free_pages[:-pages]
            self._known = len(self.free_pages)

    def sort(self) -> None:
        """Order the free list so that extents that are in use most come first and free ones last,
        and start to find out which are free. Waits for nothing (``find``)."""
        memory = self.memory
        assert memory is not None
        book, free = memory.book, self.free_pages
        span, count = book.extents.blocks_per_extent, book.extents.num_extents
        extents = free // span
        used = torch.full((count,), span, dtype=torch.int64, device=self.device)
        used[-1] = len(book.extents.blocks(count - 1))
        used.scatter_add_(0, extents, torch.full_like(extents, -1))
        self.free_pages = free[torch.argsort(free - used[extents] * (book.total_pages + 1))]
        # The sink makes its extent look used for good.
        whole = used == 0
        if whole.is_cuda:
            if self._host is None:
                self._host = torch.empty(count, dtype=torch.bool, pin_memory=True)
            whole = self._host.copy_(whole, non_blocking=True)
        self._look = (whole, memory.mark())
        self._shortest = self._known = len(free)
        self._freed = False
        book.reordered()

    @property
    def unsorted(self) -> bool:
        """Whether pages were freed since the list was put in order."""
        self._note_freed()
        return self._freed

    @property
    def looking(self) -> bool:
        """Whether ``sort`` has begun to find something out that ``find`` has not taken up yet."""
        return self._look is not None

    def find(self, now: float, wait: bool = False) -> None:
        """Take up what ``sort`` found out, if it has; with ``wait``, when it has."""
        if self._look is None or self.memory is None:
            return
        whole, mark = self._look
        if wait:
            mark.synchronize()
        elif not mark.query():
            return
        self._look = None
        self.memory.book.found(whole.nonzero().flatten().tolist(), self._shortest, now)

    def _note_freed(self) -> None:
        self._freed = self._freed or len(self.free_pages) > self._known

    def _provide(self, pages: int) -> None:
        """``pages`` are about to be taken."""
        self._note_freed()
        short = pages - len(self.free_pages)
        if self.memory is None or not 0 < short <= self.memory.book.promised_pages:
            return
        if self.steward is not None:
            self.steward.cover(short)
            short = pages - len(self.free_pages)
        if short > 0:
            self.gain(self.memory.grow(self.memory.book.extents_for(short)))

    def _taken(self) -> None:
        if self.memory is not None:
            left = self._known = len(self.free_pages)
            self._shortest = min(self._shortest, left)
            self.memory.book.listed(left)


class ElasticTokenAllocator(ElasticPages, TokenToKVPoolAllocator):  # type: ignore[misc]
    """Pages of one token."""

    def alloc(self, need_size: int) -> Any:
        self._provide(need_size)
        taken = super().alloc(need_size)
        self._taken()
        return taken

    def free(self, free_index: torch.Tensor) -> None:
        """As stock, but what comes back is taken first: stock appends, and so would march through
        all the memory that there is before it used any again."""
        if self.memory is None:
            super().free(free_index)
            return
        listed, self.free_pages = self.free_pages, self.free_pages[:0]
        super().free(free_index)
        if len(self.free_pages):
            listed = torch.cat((self.free_pages, listed))
        self.free_pages = listed


class ElasticPagedAllocator(ElasticPages, PagedTokenToKVPoolAllocator):  # type: ignore[misc]
    """Pages of several tokens."""

    def alloc(self, need_size: int) -> Any:
        self._provide(need_size // self.page_size)
        taken = super().alloc(need_size)
        self._taken()
        return taken

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> Any:
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        self._provide(num_new_pages)
        taken = super().alloc_extend(
            prefix_lens,
            prefix_lens_cpu,
            seq_lens,
            seq_lens_cpu,
            last_loc,
            extend_num_tokens,
            num_new_pages,
        )
        self._taken()
        return taken

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> Any:
        self._provide(
            get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, decode=True)
        )
        taken = super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)
        self._taken()
        return taken
