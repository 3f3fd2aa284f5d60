"""SGLang's KV buffers over an arena: the same code makes them, only their bytes are ours."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from kvcached_plugins.refusal import Refusal
from kvcached_plugins.settings import Settings
from kvcached_plugins.sglang.allocators import ATTRIBUTE
from kvcached_plugins.sglang.memory import PoolMemory
from kvcached_plugins.shares import FreeBytes, Shares, default_budget, join, join_beside
from kvcached_vmm.arena import Arena
from kvcached_vmm.errors import EngineUnsupported, KVCachedError
from kvcached_vmm.extents import EXTENT_BYTES, ExtentMap, Region, blocks_per_extent
from kvcached_vmm.tensors import arena_tensor, device_driver, make_arena
from kvcached_vmm.units import ceil_to, format_size

EXTENTS_PER_BUDGET = 64
"""A small budget gets small extents, so that an idle engine never holds much of it."""

engine_name = "sglang"
"""What the engine that starts in this process is called, unless the user named it."""


class Buffer(NamedTuple):
    """A tensor that SGLang asked for with ``torch.zeros``."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def parts(self) -> int:
        """How many times it holds all pages: SGLang 0.5.23 puts a layer's keys and values into one
        buffer, keys first."""
        return 2 if self.shape[0] == 2 and len(self.shape) > 3 else 1

    @property
    def part_bytes(self) -> int:
        """Bytes of all pages in one part."""
        return math.prod(self.shape) * int(self.dtype.itemsize) // self.parts


class _Torch:
    """The torch module for ``_create_buffers``, with ``zeros`` of our own."""

    def __init__(self, zeros: Callable[[Buffer], torch.Tensor]) -> None:
        self._zeros = zeros

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: Any) -> torch.Tensor:
        return self._zeros(Buffer(tuple(shape), dtype))


def create_buffers(original: Callable[[Any], None], pool: Any) -> None:
    """Make the buffers of a pool: once to learn their shapes, once over the arena."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    if type(pool) not in (MHATokenToKVPool, MLATokenToKVPool):
        original(pool)
        return
    asked: list[Buffer] = []

    def record(buffer: Buffer) -> torch.Tensor:
        asked.append(buffer)
        return torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")

    with_torch(original, pool, record)
    try:
        memory = _memory(pool, asked)
    except KVCachedError as error:
        raise Refusal(str(error)) from error
    setattr(pool, ATTRIBUTE, memory)
    whole = arena_tensor(memory.arena, memory.arena.size_bytes, memory.device)
    extents = memory.arena.extents
    places = _places(asked, extents.num_blocks, extents.granularity)

    def place(buffer: Buffer) -> torch.Tensor:
        starts = next(places)
        flat = whole[starts[0] : starts[-1] + buffer.part_bytes].view(buffer.dtype)
        strides = list(torch.empty(buffer.shape, device="meta").stride())
        if buffer.parts > 1:
            strides[0] = (starts[1] - starts[0]) // buffer.dtype.itemsize
        return flat.as_strided(buffer.shape, strides)

    with_torch(original, pool, place)
    _check_placed(pool, memory.arena)


def with_torch(
    original: Callable[[Any], None], pool: Any, zeros: Callable[[Buffer], torch.Tensor]
) -> None:
    """Run ``original`` while its module's ``torch.zeros`` is ``zeros``."""
    namespace: dict[str, Any] = inspect.unwrap(original).__globals__
    namespace["torch"] = _Torch(zeros)
    try:
        original(pool)
    finally:
        namespace["torch"] = torch


def regions(asked: list[Buffer], num_blocks: int, granularity: int) -> list[Region]:
    """Where pages lie when ``asked`` are placed one after the other, each part on a granule.

    Raises:
        EngineUnsupported: a buffer is not made of ``num_blocks`` equal pages.
    """
    for buffer in asked:
        if buffer.part_bytes % num_blocks or buffer.shape[buffer.parts - 1] % num_blocks:
            raise EngineUnsupported(
                f"SGLang keeps this model's KV cache in buffers of shape {buffer.shape}, which "
                f"{num_blocks} pages do not divide; unset ENABLE_KVCACHED to run it."
            )
    return [
        Region(start, buffer.part_bytes // num_blocks)
        for buffer, starts in zip(asked, _places(asked, num_blocks, granularity), strict=True)
        for start in starts
    ]


def _places(asked: list[Buffer], num_blocks: int, granularity: int) -> Iterator[list[int]]:
    """Where the parts of each buffer begin: on granules, and a whole number of pages apart, for
    kernels that reach values from keys by counting pages."""
    end = 0
    for buffer in asked:
        first = ceil_to(end, granularity)
        step = math.lcm(granularity, buffer.part_bytes // num_blocks)
        starts = [first + part * ceil_to(buffer.part_bytes, step) for part in range(buffer.parts)]
        end = starts[-1] + buffer.part_bytes
        yield starts


def _memory(pool: Any, asked: list[Buffer]) -> PoolMemory:
    settings = Settings.read()
    device = torch.device(pool.device)
    driver = device_driver(device)
    if not asked:
        raise EngineUnsupported(
            "SGLang makes this model's KV cache in a way that an elastic cache cannot follow; "
            "unset ENABLE_KVCACHED to run it."
        )
    num_blocks = pool.size // pool.page_size + 1
    places = regions(asked, num_blocks, driver.granularity)
    if any(place.stride_bytes * num_blocks < driver.granularity for place in places):
        raise EngineUnsupported(
            f"A KV cache of {pool.size} tokens is smaller than the smallest piece of memory that "
            "can be mapped in every layer; raise KVCACHED_BUDGET, KVCACHED_MAX or "
            "--max-total-tokens, or unset ENABLE_KVCACHED."
        )
    limit = min(
        limit
        for limit in (
            settings.budget_bytes,
            settings.maximum_bytes,
            sum(buffer.parts * buffer.part_bytes for buffer in asked),
        )
        if limit is not None
    )
    target = settings.extent_bytes or min(EXTENT_BYTES, limit // EXTENTS_PER_BUDGET)
    span = blocks_per_extent(
        places, driver.granularity, ceil_to(max(target, 1), driver.granularity)
    )
    extents = ExtentMap(num_blocks, places, driver.granularity, min(span, num_blocks))
    name, budget = account_name(settings.name or engine_name), default_budget(driver)
    account = join(
        settings,
        name,
        driver.device,
        engine="sglang",
        default_budget_bytes=budget,
        arena_bytes=extents.size_bytes,
    )
    limit = account.limit_bytes
    if limit < extents.largest_bytes:
        account.close()
        raise EngineUnsupported(
            f"This engine may use {format_size(limit)} for its KV cache, which is "
            f"less than one extent of {format_size(extents.largest_bytes)}; raise KVCACHED_BUDGET "
            "or KVCACHED_MAX, or unset ENABLE_KVCACHED."
        )
    return PoolMemory(
        make_arena(driver, extents, device, settings.poison),
        Shares([(account, 1)], FreeBytes(driver)),
        device,
        name,
        lambda: join_beside(settings, name, "not given back", driver.device, budget),
    )


def account_name(engine: str) -> str:
    """How tools call this process: by its engine, and by its rank if there are several."""
    from sglang.srt.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return engine
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return engine
    return f"{engine} rank {parallel_state.get_tensor_model_parallel_rank()}"


def _check_placed(pool: Any, arena: Arena) -> None:
    names = ("k_buffer", "v_buffer", "kv_buffer")
    placed = [tensor for name in names for tensor in getattr(pool, name, None) or ()]
    inside = range(arena.base, arena.base + arena.size_bytes)
    if not placed or not all(tensor.data_ptr() in inside for tensor in placed):
        raise Refusal("SGLang did not lay its KV cache out over the arena; unset ENABLE_KVCACHED.")
