"""How large SGLang makes its pool: what the device could hold, not what is free by chance."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import torch

from kvcached_plugins.refusal import Refusal
from kvcached_plugins.settings import Settings
from kvcached_vmm.errors import KVCachedError
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.tensors import device_driver
from kvcached_vmm.units import GIB


def profile_available_bytes(
    original: Callable[..., int], owner: Any, *args: Any, **kwargs: Any
) -> int:
    """The size of the address range: what the user set, else what SGLang would take for itself if
    it were alone. Elastic memory of neighbours counts as free: it comes and goes."""
    try:
        settings = Settings.read()
        others = _others_bytes(settings, torch.device(owner.device))
    except KVCachedError as error:
        raise Refusal(str(error)) from error
    namespace: dict[str, Any] = inspect.unwrap(original).__globals__
    measure: Callable[..., float] = namespace["get_available_gpu_memory"]

    def roomy(*measure_args: Any, **measure_kwargs: Any) -> float:
        free_gib = measure(*measure_args, **measure_kwargs)
        extra = torch.tensor(float(others))
        if measure_kwargs.get("distributed"):
            group = measure_kwargs["cpu_group"]
            torch.distributed.all_reduce(extra, torch.distributed.ReduceOp.MIN, group=group)
        return free_gib + float(extra) / GIB

    namespace["get_available_gpu_memory"] = roomy
    try:
        available = original(owner, *args, **kwargs)
    finally:
        namespace["get_available_gpu_memory"] = measure
    if settings.maximum_bytes is not None:
        return settings.maximum_bytes
    if settings.budget_bytes is not None:
        return min(available, settings.budget_bytes)
    return available


def _others_bytes(settings: Settings, device: torch.device) -> int:
    ledger = Ledger.open(settings.directory, device_driver(device).device)
    try:
        accounts = ledger.snapshot().accounts
        return sum(a.committed_bytes for a in accounts if a.pid != os.getpid())
    finally:
        ledger.close()
