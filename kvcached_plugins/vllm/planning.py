"""Before vLLM places its KV cache: what we refuse, which layout, how large extents are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvcached_plugins.refusal import Refusal, expect_refusals
from kvcached_plugins.refusal import wait_for_engine_startup as wait_for_engine_startup
from kvcached_plugins.settings import Settings
from kvcached_plugins.vllm.geometry import ATTRIBUTE, plan
from kvcached_vmm.errors import EngineUnsupported, KVCachedError
from kvcached_vmm.extents import EXTENT_BYTES, OWN_EXTENT_BYTES, ExtentMap
from kvcached_vmm.host_driver import GRANULARITY as HOST_GRANULARITY
from kvcached_vmm.locks import private_directory
from kvcached_vmm.units import MIB, format_size

GPU_GRANULARITY = 2 * MIB
"""What every NVIDIA GPU since Pascal answers; the worker's own driver has the last word."""

_TURN_OFF = "unset ENABLE_KVCACHED to run without an elastic KV cache."


def create_engine_config(
    original: Callable[..., Any], arguments: Any, *args: Any, **kwargs: Any
) -> Any:
    config = original(arguments, *args, **kwargs)
    reason = unsupported(config)
    if reason is not None:
        raise Refusal(f"{reason}; {_TURN_OFF}")
    try:
        expect_refusals(private_directory(Settings.read().directory))
    except KVCachedError as error:
        raise Refusal(str(error)) from error
    return config


def unsupported(config: Any) -> str | None:
    """Why an engine with this ``VllmConfig`` cannot have an elastic cache; None if it can."""
    from vllm.platforms import current_platform

    parallel = config.parallel_config
    checks = (
        (
            not (current_platform.is_cuda() or current_platform.is_cpu()),
            f"the platform {current_platform.device_type!r} is not supported (CUDA and CPU are)",
        ),
        (
            config.kv_transfer_config is not None,
            f"KV connector {getattr(config.kv_transfer_config, 'kv_connector', '')} (KV "
            "offloading is one too) may register the whole KV buffer, all of it with memory",
        ),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism is not supported"),
        (
            getattr(parallel, "decode_context_parallel_size", 1) > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "context parallelism is not supported",
        ),
        (
            parallel.distributed_executor_backend == "ray" or getattr(parallel, "nnodes", 1) > 1,
            "workers on other machines or under Ray cannot share a ledger",
        ),
        (
            getattr(parallel, "enable_elastic_ep", False),
            "elastic expert parallelism is not supported",
        ),
        (
            getattr(parallel, "enable_fault_tolerance", False),
            "vLLM's fault tolerance drops steps without a word to the scheduler",
        ),
        (
            getattr(config.attention_config, "hisparse_config", None) is not None,
            "HiSparse keeps KV blocks on the host and is not supported",
        ),
    )
    return next((reason for applies, reason in checks if applies), None)


def resolve_kv_cache_layout(
    original: Callable[..., Any],
    vllm_config: Any,
    supported: list[list[str]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Prefer the layout that keeps all layers of a block together, where the backend takes it: then
    one driver handle backs a run of blocks whatever the number of layers."""
    return original(
        vllm_config, [block_outermost_first(names) for names in supported], *args, **kwargs
    )


def block_outermost_first(names: Sequence[str]) -> list[str]:
    """``names`` with the block-outermost sibling of the most preferred layout in front.

    A layout is named by the order of its dimensions, such as LBNHC: layer, block, token, head.
    """
    preferred = names[0]
    siblings = [preferred.replace("LBNHC", "BLNHC").replace("LBHNC", "BLHNC")]
    siblings += [name for name in names if name.startswith("B")]
    first = next((name for name in siblings if name in names), preferred)
    return [first, *(name for name in names if name != first)]


def get_kv_cache_configs(
    original: Callable[..., list[Any]],
    vllm_config: Any,
    kv_cache_specs: list[dict[str, Any]],
    available: list[int],
    *args: Any,
    **kwargs: Any,
) -> list[Any]:
    """Check that the budget holds a request, and attach the plan that workers must agree on."""
    if not any(kv_cache_specs):
        return original(vllm_config, kv_cache_specs, available, *args, **kwargs)
    settings = Settings.read()
    on_gpu = vllm_config.device_config.device_type == "cuda"
    ranks = 1 if on_gpu else len(kv_cache_specs)
    try:
        for specs in kv_cache_specs:
            _refuse_unsupported_layers(specs)
        request = max(
            sum(spec.max_memory_usage_bytes(vllm_config) for spec in specs.values())
            for specs in kv_cache_specs
        )
        _refuse_small_budget(vllm_config, request * ranks, settings)
        configs = original(vllm_config, kv_cache_specs, available, *args, **kwargs)
        granularity = GPU_GRANULARITY if on_gpu else HOST_GRANULARITY
        limits = (settings.budget_bytes, settings.maximum_bytes)
        limit = min([*available, *(limit // ranks for limit in limits if limit is not None)])
        most = OWN_EXTENT_BYTES if gives_own_extents(vllm_config) else EXTENT_BYTES
        chosen = plan(configs, granularity, limit, settings.extent_bytes, request, most)
    except KVCachedError as error:
        raise Refusal(str(error)) from error
    for config in configs:
        setattr(config, ATTRIBUTE, chosen)
    return configs


def gives_own_extents(vllm_config: Any) -> bool:
    """Whether long requests get extents of their own: a prefix cache keeps extents anyway."""
    return not vllm_config.cache_config.enable_prefix_caching


def refuse_small_limit(limit_bytes: int, extents: ExtentMap, request_bytes: int) -> None:
    """An engine that could never run the longest request does not start.

    Raises:
        EngineUnsupported: ``limit_bytes`` of each worker are less than the ``request_bytes`` of
            one request and the null block need, in whole extents.
    """
    blocks = 1 + -(-request_bytes // extents.block_bytes)
    needed = -(-blocks // extents.blocks_per_extent) * extents.largest_bytes
    if limit_bytes < needed:
        raise EngineUnsupported(
            f"Each worker may use {format_size(limit_bytes)} for its KV cache, but one "
            f"request of the longest length needs {format_size(needed)} in whole extents; raise "
            "KVCACHED_BUDGET or KVCACHED_MAX, or lower --max-model-len or KVCACHED_EXTENT."
        )


def _refuse_unsupported_layers(specs: dict[str, Any]) -> None:
    from vllm.v1 import kv_cache_interface as interface

    allowed = (interface.FullAttentionSpec, interface.MLAAttentionSpec)
    for layer, spec in specs.items():
        if type(spec) not in allowed:
            raise Refusal(
                f"layer {layer} keeps its state as {type(spec).__name__}, and an elastic KV cache "
                f"supports full attention only so far; {_TURN_OFF}"
            )


def _refuse_small_budget(vllm_config: Any, needed_bytes: int, settings: Settings) -> None:
    for variable, limit in (
        ("KVCACHED_BUDGET", settings.budget_bytes),
        ("KVCACHED_MAX", settings.maximum_bytes),
    ):
        if limit is not None and limit < needed_bytes:
            length = vllm_config.model_config.max_model_len
            raise Refusal(
                f"{variable} is {format_size(limit)}, but one request of {length} tokens needs "
                f"{format_size(needed_bytes)} of KV cache; raise it or lower --max-model-len."
            )
