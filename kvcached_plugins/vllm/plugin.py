"""The entry point ``vllm.general_plugins: kvcached``. vLLM calls it once in each of its processes.

``PATCHES`` is the whole of what we change in vLLM; ``patches/vllm`` says why, and what each looked
like in the versions that we know.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from kvcached_plugins import OFF, TOGGLE


class Patch(NamedTuple):
    """A function or method of vLLM that ours is wrapped around, named ``module:attribute``.

    ``since`` names the first minor version that has it, if not all that we support do. Where
    ``hot`` is set, ours gets the original once and returns the wrapper: one call less each time.
    """

    target: str
    around: str
    since: str = ""
    hot: bool = False


PATCHES = (
    Patch("vllm.engine.arg_utils:EngineArgs.create_engine_config", "planning:create_engine_config"),
    Patch("vllm.v1.engine.utils:wait_for_engine_startup", "planning:wait_for_engine_startup"),
    Patch("vllm.v1.engine.core:resolve_kv_cache_layout", "planning:resolve_kv_cache_layout"),
    Patch("vllm.v1.engine.core:get_kv_cache_configs", "planning:get_kv_cache_configs"),
    Patch("vllm.v1.engine.core:EngineCore._initialize_kv_caches", "engine:initialize_kv_caches"),
    Patch("vllm.v1.engine.core:EngineCore.post_step", "engine:post_step"),
    Patch("vllm.v1.engine.core:EngineCore.shutdown", "engine:engine_core_shutdown"),
    Patch("vllm.v1.executor.abstract:Executor.sleep", "engine:executor_sleep"),
    Patch("vllm.v1.executor.abstract:Executor.wake_up", "engine:executor_wake_up"),
    Patch("vllm.v1.executor.abstract:Executor.discard", "engine:executor_discard", since="0.31"),
    Patch("vllm.v1.core.sched.scheduler:Scheduler.__init__", "engine:scheduler_init"),
    Patch("vllm.v1.core.sched.scheduler:Scheduler.schedule", "engine:schedule"),
    Patch("vllm.v1.core.sched.scheduler:Scheduler.update_from_output", "engine:update_from_output"),
    Patch(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.get_num_blocks_to_allocate",
        "engine:get_num_blocks_to_allocate",
        hot=True,
    ),
    Patch("vllm.v1.worker.worker_base:resolve_obj_by_qualname", "plugin:resolve_worker_class"),
    Patch("vllm.entrypoints.serve.instrumentator.metrics:attach_router", "metrics:attach_router"),
)

WORKER_PATCHES = (
    Patch("vllm.utils.mem_utils:MemorySnapshot.measure", "worker:measure"),
    Patch("vllm.v1.worker.gpu_worker:request_memory", "worker:request_memory"),
    Patch(
        "vllm.v1.worker.gpu_worker:Worker.determine_available_memory",
        "worker:determine_available_memory",
    ),
    Patch(
        "vllm.v1.worker.gpu_worker:Worker.initialize_from_config", "worker:initialize_from_config"
    ),
    Patch("vllm.v1.worker.gpu_worker:Worker.execute_model", "worker:execute_model"),
    Patch("vllm.v1.worker.gpu_worker:Worker.sample_tokens", "worker:sample_tokens"),
    Patch("vllm.v1.worker.gpu.attn_utils:allocate_kv_cache", "worker:allocate_kv_cache"),
    Patch("vllm.v1.worker.gpu_model_runner:allocate_kv_cache", "worker:allocate_kv_cache"),
)
"""Applied when a worker is made: they import what only a worker needs."""

CPU_WORKER_PATCHES = (
    Patch("vllm.v1.worker.cpu_worker:get_memory_node_info", "worker:get_memory_node_info"),
    Patch(
        "vllm.v1.worker.cpu_worker:CPUWorker.determine_available_memory",
        "worker:determine_available_memory",
    ),
)

WORKER_METHODS = ("obey", "start", "sleep", "wake")
"""Methods that workers gain, called by name over vLLM's own RPC as ``kvcached_...``."""


def register() -> None:
    """Make vLLM's KV cache elastic if ``ENABLE_KVCACHED`` says so; else touch nothing.

    Raises:
        Refusal: the settings or the installed vLLM are not what we can work with.
    """
    if os.environ.get(TOGGLE, "").strip().lower() in OFF or _inspects_a_model():
        return
    _check()
    from vllm.v1.core import block_pool, kv_cache_coordinator

    from kvcached_plugins.vllm.pool import ElasticBlockPool

    if kv_cache_coordinator.BlockPool is block_pool.BlockPool:
        kv_cache_coordinator.BlockPool = ElasticBlockPool
    apply(PATCHES)


def _check() -> None:
    from kvcached_plugins import contract, settings
    from kvcached_plugins.refusal import Refusal
    from kvcached_vmm.errors import KVCachedError

    try:
        settings.enabled()
        read = settings.Settings.read()
        contract.verify("vllm")
    except KVCachedError as error:
        raise Refusal(str(error)) from error
    logging.getLogger("vllm.kvcached").setLevel(read.log_level)
    for name in ("kvcached", "kvcached_vmm"):
        logging.getLogger(name).parent = logging.getLogger("vllm.kvcached")


def apply(patches: tuple[Patch, ...]) -> None:
    """Wrap each target once."""
    for patch in patches:
        module, _, path = patch.target.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        if patch.since and not hasattr(owner, name):
            continue
        original = getattr(owner, name)
        if getattr(original, "__kvcached__", None) != patch.around:
            around_module, _, around = patch.around.partition(":")
            adapter = importlib.import_module(f"kvcached_plugins.vllm.{around_module}")
            ours: Any = getattr(adapter, around)
            wrapper: Any = ours(original) if patch.hot else _wrapper(original, ours)
            functools.update_wrapper(wrapper, original)
            wrapper.__kvcached__ = patch.around
            setattr(owner, name, wrapper)


def resolve_worker_class(original: Callable[[str], Any], qualified_name: str) -> Any:
    """vLLM looks its worker class up right after it has loaded plugins in a worker's process."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        apply(CPU_WORKER_PATCHES)
    apply(WORKER_PATCHES)
    from vllm.v1.worker.gpu_worker import Worker

    from kvcached_plugins.vllm import worker

    for name in WORKER_METHODS:
        setattr(Worker, f"kvcached_{name}", getattr(worker, f"worker_{name}"))
    return original(qualified_name)


def _wrapper(original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    return wrapper


def _inspects_a_model() -> bool:
    """vLLM looks at model classes in a short-lived process of its own, which has no KV cache."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return getattr(spec, "name", None) == "vllm.model_executor.models.registry"
