"""SGLang's two paging kernels in torch: Triton's interpreter takes minutes for what they do in a
test. The extending one is SGLang's own reference, which it uses where there is no Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Kernel:
    """A function that is called like a kernel: ``kernel[grid](...)``."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._function


def install() -> None:
    """Put them in the place of the kernels that SGLang's paged allocator launches."""
    from sglang.srt.mem_cache.allocator import paged

    def extend(
        prefix_lens: Any, seq_lens: Any, last_loc: Any, free: Any, out: Any, _: int, page_size: int
    ) -> None:
        paged.alloc_extend_naive(prefix_lens, seq_lens, last_loc, free, out, page_size, free.device)

    def decode(seq_lens: Any, last_loc: Any, free: Any, out: Any, _: int, page_size: int) -> None:
        fresh = (seq_lens - 1) % page_size == 0
        out.copy_(last_loc + 1)
        out[fresh] = free[: int(fresh.sum())] * page_size

    paged.alloc_extend_kernel = Kernel(extend)
    paged.alloc_decode_kernel = Kernel(decode)
