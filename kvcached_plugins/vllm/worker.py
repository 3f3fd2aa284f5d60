"""What we wrap around vLLM's workers, and the methods that they gain."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch

from kvcached_plugins.refusal import Refusal
from kvcached_plugins.settings import Settings
from kvcached_plugins.vllm.geometry import ATTRIBUTE, Orders
from kvcached_plugins.vllm.memory import Progress, WorkerMemory, WorkerReport
from kvcached_vmm.errors import KVCachedError
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.tensors import device_driver
from kvcached_vmm.units import GIB

CONTEXT_BYTES = GIB
"""CUDA context, libraries and graphs of one engine, which torch does not count (H200: 0.8 to 1.3
GiB). Only for a KV size that the user gave, where vLLM measures nothing."""

_serving: WorkerMemory | None = None


class _Torch:
    """The torch module for ``allocate_kv_cache``, whose ``zeros`` is the arena."""

    def __init__(self, memory: WorkerMemory) -> None:
        self._memory = memory
        self.served = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, size_bytes: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert dtype == torch.int8
        self.served += 1
        return self._memory.tensor(size_bytes)


def allocate_kv_cache(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Let vLLM lay its layers out over the arena; profiling runs get memory of their own."""
    memory = _serving
    if memory is None:
        return original(*args, **kwargs)
    namespace = original.__globals__
    stand_in = _Torch(memory)
    namespace["torch"] = stand_in
    try:
        caches = original(*args, **kwargs)
    finally:
        namespace["torch"] = torch
    start, end = memory.arena.base, memory.arena.base + memory.arena.size_bytes
    if stand_in.served != 1 or not all(start <= t.data_ptr() < end for t in caches.values()):
        raise Refusal("vLLM did not lay its KV cache out over the arena; unset ENABLE_KVCACHED.")
    return caches


def initialize_from_config(
    original: Callable[..., Any], worker: Any, kv_cache_config: Any, *args: Any, **kwargs: Any
) -> Any:
    global _serving
    if not hasattr(kv_cache_config, ATTRIBUTE):
        return original(worker, kv_cache_config, *args, **kwargs)
    try:
        worker.kvcached = _serving = WorkerMemory(worker, kv_cache_config, Settings.read())
        return original(worker, kv_cache_config, *args, **kwargs)
    except KVCachedError as error:
        raise Refusal(str(error)) from error
    finally:
        _serving = None


def execute_model(original: Callable[..., Any], worker: Any, scheduler_output: Any) -> Any:
    memory: WorkerMemory | None = getattr(worker, "kvcached", None)
    if memory is None:
        return original(worker, scheduler_output)
    memory.before_step(scheduler_output)
    output = original(worker, scheduler_output)
    if output is not None:  # else vLLM samples next, which must not wait for us
        memory.launch_is_over()
    return output


def sample_tokens(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    output = original(worker, *args, **kwargs)
    memory: WorkerMemory | None = getattr(worker, "kvcached", None)
    if memory is not None:
        memory.launch_is_over()
    return output


def determine_available_memory(original: Callable[..., int], worker: Any) -> int:
    """The size of the address range: the budget, else what vLLM would take for itself. A maximum
    does not bound it, for it can be raised later."""
    settings = Settings.read()
    on_gpu = worker.device.type == "cuda"
    available = original(worker)
    if on_gpu:
        used = getattr(worker, "total_consumed", 0) + getattr(worker, "peak_activation_memory", 0)
        if not used:
            used = torch.cuda.memory_reserved(worker.device) + CONTEXT_BYTES
        worker.kvcached_fixed_bytes = used
    ranks = 1 if on_gpu else worker.parallel_config.world_size
    if settings.maximum_bytes is not None:
        available = max(available, settings.maximum_bytes // ranks)
    if settings.budget_bytes is not None:
        available = min(available, settings.budget_bytes // ranks)
    return available


def get_memory_node_info(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """vLLM refuses to start unless its whole KV cache fits in what is free now; ours need not."""
    status = copy.copy(original(*args, **kwargs))
    object.__setattr__(status, "available_memory", status.total_memory)
    return status


def request_memory(original: Callable[..., int], snapshot: Any, *args: Any, **kwargs: Any) -> int:
    """A neighbour's memory is no reason not to start: weights and activations must fit, no more."""
    roomy = copy.copy(snapshot)
    roomy.free_memory = snapshot.total_memory
    return original(roomy, *args, **kwargs)


def measure(original: Callable[..., None], snapshot: Any) -> None:
    """Count the elastic memory of neighbours as free: it comes and goes while vLLM profiles."""
    original(snapshot)
    device = snapshot.device_
    if device.type == "cuda":
        others = _others_bytes(device)
        snapshot.free_memory += others
        snapshot.cuda_memory -= others
        snapshot.non_torch_memory -= others


def _others_bytes(device: torch.device) -> int:
    ledger = Ledger.open(Settings.read().directory, device_driver(device).device)
    try:
        accounts = ledger.snapshot().accounts
        return sum(a.committed_bytes for a in accounts if a.pid != os.getpid())
    finally:
        ledger.close()


def worker_obey(worker: Any, orders: Orders) -> Progress:
    progress: Progress = worker.kvcached.obey(orders)
    return progress


def worker_start(worker: Any) -> WorkerReport:
    report: WorkerReport = worker.kvcached.start()
    return report


def worker_sleep(worker: Any) -> None:
    worker.kvcached.sleep()


def worker_wake(worker: Any) -> None:
    worker.kvcached.wake()
