"""From vLLM's placement of layers to regions and extents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvcached_vmm.errors import EngineUnsupported
from kvcached_vmm.extents import EXTENT_BYTES, ExtentMap, Region, blocks_per_extent
from kvcached_vmm.units import ceil_to

ATTRIBUTE = "kvcached"
"""Name of what we attach to vLLM's own messages: they are plain dataclasses that keep it."""

EXTENTS_PER_BUDGET = 64
"""A small budget gets small extents, so that an idle engine never holds much of it."""


@dataclass(frozen=True)
class Plan:
    """What every worker must agree on; travels on the ``KVCacheConfig``.

    Attributes:
        blocks_per_extent: size of extents.
        request_bytes: what one request of the longest length needs on one worker.
    """

    blocks_per_extent: int
    request_bytes: int = 0


@dataclass(frozen=True)
class Orders:
    """What workers are to do beside a step; travels on the ``SchedulerOutput``.

    Attributes:
        step: number of the step.
        release: extents to release once the work given to the device before this step is done.
        commit: extents to commit after the step is launched, ahead of need.
    """

    step: int
    release: tuple[int, ...] = ()
    commit: tuple[int, ...] = ()


def regions(kv_cache_config: Any) -> list[Region]:
    """Where blocks lie in vLLM's buffer: one region if all layers of a block are together, else one
    for each layer. Groups of layers may lie over each other: a block belongs to one at a time.

    Raises:
        EngineUnsupported: blocks lie in a way that extents cannot follow.
    """
    count = kv_cache_config.num_blocks
    found = set()
    for tensor in kv_cache_config.kv_cache_tensors:
        if count * tensor.block_stride == tensor.size:
            found.add(Region(0, tensor.block_stride))
        else:
            found.update(
                Region(tensor.offset + layer * tensor.layer_stride, tensor.block_stride)
                for layer in range(len(tensor.layers))
            )
    sizes = {tensor.size for tensor in kv_cache_config.kv_cache_tensors}
    if sizes != {count * sum(region.stride_bytes for region in found)}:
        raise EngineUnsupported(
            "vLLM lays this model's KV cache out in a way that an elastic cache cannot follow "
            f"({kv_cache_config.kv_cache_tensors[0]}); unset ENABLE_KVCACHED to run it."
        )
    return sorted(found, key=lambda region: region.offset_bytes)


def plan(
    kv_cache_configs: Sequence[Any],
    granularity: int,
    limit_bytes: int,
    extent: int | None,
    request_bytes: int = 0,
    most_bytes: int = EXTENT_BYTES,
) -> Plan:
    """The size of extents for all workers: about ``extent`` bytes; if that is None, ``most_bytes``
    or what suits the limit."""
    target = extent or min(most_bytes, ceil_to(limit_bytes // EXTENTS_PER_BUDGET, granularity))
    return Plan(
        max(
            blocks_per_extent(regions(config), granularity, max(target, granularity))
            for config in kv_cache_configs
        ),
        request_bytes,
    )


def extent_map(kv_cache_config: Any, plan: Plan, granularity: int) -> ExtentMap:
    """The extents of one worker's buffer."""
    return ExtentMap(
        kv_cache_config.num_blocks, regions(kv_cache_config), granularity, plan.blocks_per_extent
    )
