"""What we wrap around SGLang's scheduler and its parts, and around the start of its processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.schedule_policy import AddReqResult

from kvcached_plugins.refusal import Refusal, expect_refusals, wait_for_engine_startup
from kvcached_plugins.settings import Settings
from kvcached_plugins.sglang import pools
from kvcached_plugins.sglang.allocators import ElasticPagedAllocator, ElasticTokenAllocator
from kvcached_plugins.sglang.ranks import Agreement
from kvcached_plugins.sglang.refusal import refuse_unsupported
from kvcached_plugins.sglang.steward import Steward
from kvcached_vmm.errors import KVCachedError
from kvcached_vmm.locks import private_directory

ATTRIBUTE = "kvcached"


def steward_of(scheduler: Any) -> Steward | None:
    """The steward that was attached to a scheduler."""
    return getattr(scheduler, ATTRIBUTE, None)


def launch_subprocesses(original: Callable[..., Any], cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse in the first process, before any memory is taken; repeat what a child refused."""
    server_args = kwargs.get("server_args") or args[0]
    refuse_unsupported(server_args)
    try:
        expect_refusals(private_directory(Settings.read().directory))
    except KVCachedError as error:
        raise Refusal(str(error)) from error
    return wait_for_engine_startup(original, cls, *args, **kwargs)


def scheduler_init(
    original: Callable[..., None], scheduler: Any, *args: Any, **kwargs: Any
) -> None:
    server_args = kwargs.get("server_args") or args[0]
    refuse_unsupported(server_args)
    pools.engine_name = str(server_args.served_model_name or server_args.model_path)
    original(scheduler, *args, **kwargs)
    if scheduler.draft_worker is not None or scheduler.enable_hierarchical_cache:
        raise Refusal(
            "SGLang has turned a draft model or a hierarchical cache on by itself, and an elastic "
            "KV cache supports neither; unset ENABLE_KVCACHED to run it."
        )
    allocator = scheduler.token_to_kv_pool_allocator
    if type(allocator) not in (ElasticTokenAllocator, ElasticPagedAllocator) or (
        allocator.memory is None
    ):
        raise Refusal(
            f"SGLang keeps this model's KV cache in a {type(allocator).__name__} over a "
            f"{type(allocator.get_kvcache()).__name__}, and an elastic KV cache supports full "
            "attention only so far; unset ENABLE_KVCACHED to run it."
        )
    allocator.memory.watch([scheduler.tp_worker.model_runner.forward_stream])
    steward = Steward(scheduler, Settings.read(), Agreement(scheduler.attn_tp_cpu_group))
    steward.clamp_request_length()
    scheduler.kvcached = allocator.steward = steward


def get_next_batch_to_run(
    original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any
) -> Any:
    steward = steward_of(scheduler)
    if steward is None:
        return original(scheduler, *args, **kwargs)
    steward.begin_round()
    batch = original(scheduler, *args, **kwargs)
    steward.end_round()
    return batch


def add_one_req(original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kw: Any) -> Any:
    """A request that would take the engine beyond its limit, or beyond its fair share while others
    wait, is told that there are no tokens left for it: it waits."""
    steward = _steward_of_parts(adder)
    if steward is not None and not steward.admits(req, adder.log_input_tokens):
        return AddReqResult.NO_TOKEN
    return original(adder, req, *args, **kw)


def add_chunked_req(original: Callable[..., Any], adder: Any, req: Any) -> Any:
    """A further part of a prompt is no longer than there is memory for, and is left out of the
    round if there is none: the others go on, and may free some. SGLang, which counts on a pool that
    nobody else takes from, would go on with a whole chunk. It leaves one out itself where a sliding
    window has no room. Nobody else begins in that round: for them there is not a token either."""
    steward = _steward_of_parts(adder)
    if steward is not None and adder.rem_chunk_tokens is not None:
        spare = int(adder.cur_rem_tokens)
        if spare <= 0:
            return req
        adder.rem_chunk_tokens = min(adder.rem_chunk_tokens, spare)
    return original(adder, req)


def run_batch(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(scheduler, *args, **kwargs)
    steward = steward_of(scheduler)
    if steward is not None:
        steward.launched()
    return result


def flush_cache(original: Callable[..., bool], scheduler: Any, *args: Any, **kwargs: Any) -> bool:
    done = original(scheduler, *args, **kwargs)
    steward = steward_of(scheduler)
    if done and steward is not None:
        steward.flushed()
    return done


def get_internal_state(
    original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any
) -> Any:
    answer = original(scheduler, *args, **kwargs)
    steward = steward_of(scheduler)
    if steward is not None:
        answer.internal_state[ATTRIBUTE] = steward.numbers()
    return answer


def release_memory_occupation(original: Callable[..., Any], updater: Any, request: Any) -> Any:
    answer = original(updater, request)
    steward = steward_of(updater.scheduler)
    if steward is not None and _names_kv_cache(request):
        steward.sleep()
    return answer


def resume_memory_occupation(original: Callable[..., Any], updater: Any, request: Any) -> Any:
    steward = steward_of(updater.scheduler)
    if steward is not None and _names_kv_cache(request):
        steward.wake()
    return original(updater, request)


def check_full_pool(
    original: Callable[..., Any], checker: Any, pool_stats: Any, uncached: int = 0
) -> Any:
    """SGLang adds all pages up when it is idle: count those that have no memory."""
    steward = _steward_of_parts(checker)
    if steward is not None:
        uncached += steward.withheld_tokens()
    return original(checker, pool_stats, uncached)


def get_token_info(original: Callable[..., Any], observer: Any) -> Any:
    """What is not available is not used for that: it may have no memory."""
    stats = original(observer)
    steward = _steward_of_parts(observer)
    if steward is None:
        return stats
    used = stats.full_num_used - steward.withheld_tokens()
    return dataclasses.replace(
        stats, full_num_used=used, full_token_usage=used / observer.max_total_num_tokens
    )


def _steward_of_parts(part: Any) -> Steward | None:
    return getattr(part.token_to_kv_pool_allocator, "steward", None)


def _names_kv_cache(request: Any) -> bool:
    return not request.tags or "kv_cache" in request.tags
