"""What we wrap around vLLM's engine core, executor, scheduler and cache coordinator."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from kvcached_plugins.refusal import Refusal
from kvcached_plugins.settings import Settings
from kvcached_plugins.vllm.geometry import ATTRIBUTE
from kvcached_plugins.vllm.steward import Steward
from kvcached_vmm.errors import KVCachedError


def steward_of(owner: Any) -> Steward | None:
    """The steward that was attached to an engine core, scheduler or executor."""
    return getattr(owner, "kvcached", None)


_starting: list[Any] = []
"""The engine core that is being made in this process: vLLM loads plugins in its constructor, too
late to wrap that, and makes the scheduler after the KV cache."""


def initialize_kv_caches(original: Callable[..., Any], core: Any, *args: Any, **kwargs: Any) -> Any:
    kv_cache_config = original(core, *args, **kwargs)
    if hasattr(kv_cache_config, ATTRIBUTE):
        _starting[:] = [core]
    return kv_cache_config


def scheduler_init(
    original: Callable[..., None], scheduler: Any, *args: Any, **kwargs: Any
) -> None:
    original(scheduler, *args, **kwargs)
    if _starting:
        core = _starting.pop()
        try:
            steward = Steward(core, scheduler, Settings.read())
        except KVCachedError as error:
            raise Refusal(str(error)) from error
        core.kvcached = scheduler.kvcached = core.model_executor.kvcached = steward


def post_step(original: Callable[..., None], core: Any, *args: Any, **kwargs: Any) -> None:
    original(core, *args, **kwargs)
    steward = steward_of(core)
    if steward is not None:
        steward.stepped()


def engine_core_shutdown(original: Callable[..., None], core: Any) -> None:
    original(core)
    steward = steward_of(core)
    if steward is not None:
        steward.close()


def schedule(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    steward = steward_of(scheduler)
    if steward is None:
        return original(scheduler, *args, **kwargs)
    with steward.pool.lock:
        output = original(scheduler, *args, **kwargs)
        steward.launched(output)
        return output


def update_from_output(
    original: Callable[..., Any], scheduler: Any, scheduler_output: Any, *args: Any, **kwargs: Any
) -> Any:
    steward = steward_of(scheduler)
    if steward is None:
        return original(scheduler, scheduler_output, *args, **kwargs)
    with steward.pool.lock:
        steward.finished(scheduler_output)
        return original(scheduler, scheduler_output, *args, **kwargs)


def executor_sleep(original: Callable[..., Any], executor: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(executor, *args, **kwargs)
    steward = steward_of(executor)
    if steward is not None and executor.is_sleeping:
        steward.sleep()
    return result


def executor_discard(original: Callable[..., Any], executor: Any, tags: tuple[str, ...]) -> Any:
    result = original(executor, tags)
    steward = steward_of(executor)
    if steward is not None and "kv_cache" in tags and executor.is_sleeping:
        steward.sleep()
    return result


def executor_wake_up(
    original: Callable[..., Any], executor: Any, tags: list[str] | None = None
) -> Any:
    steward = steward_of(executor)
    if steward is not None and executor.is_sleeping and (not tags or "kv_cache" in tags):
        steward.wake()
    return original(executor, tags)


def get_num_blocks_to_allocate(original: Callable[..., int]) -> Callable[..., int]:
    """vLLM is about to compare this number with the free blocks: get the budget for it.

    A request that holds nothing yet and would take the engine beyond its limit, or beyond its fair
    share while others wait, is told that it needs everything: it waits.

    Called for each request of each step, nearly always for no block at all. The arguments are
    written out because passing on whatever comes costs six times as much.
    """
    inner = original
    if "prefill_end" not in inspect.signature(original).parameters:  # before 0.31

        def inner(*arguments: Any) -> int:
            return original(*arguments[:-1])

    def wrapper(
        coordinator: Any,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: tuple[Sequence[Any], ...],
        num_encoder_tokens: int,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        count = inner(
            coordinator,
            request_id,
            num_tokens,
            new_computed_blocks,
            num_encoder_tokens,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )
        return count and _prepare(coordinator, request_id, count, new_computed_blocks)

    return wrapper


def _prepare(
    coordinator: Any, request_id: str, count: int, computed: tuple[Sequence[Any], ...]
) -> int:
    pool = coordinator.block_pool
    elastic = getattr(pool, "elastic", None)
    if elastic is None or not 0 < count < pool.num_gpu_blocks:
        return count
    hits = [
        block for group in computed for block in group if block.ref_cnt == 0 and not block.is_null
    ]
    held = [m.req_to_blocks.get(request_id, ()) for m in coordinator.single_type_managers]
    if not any(held) and not elastic.admission.admits(elastic.live_blocks, count):
        return int(pool.num_gpu_blocks)
    elastic.prepare(count + pool.margin_blocks, hits, held[0] if len(held) == 1 else ())
    return count
