"""The entry point ``sglang.srt.plugins: kvcached``. SGLang calls it first in each of its processes.

``HOOKS`` is the whole of what we change in SGLang; ``patches/sglang`` says why, and what each
looked like in the versions that we know.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from kvcached_plugins import OFF, TOGGLE


class Hook(NamedTuple):
    """A function, method or class of SGLang, and what of ours goes around or in place of it.

    ``since`` and ``gone`` name the first release that has the target and that no longer does.
    """

    target: str
    ours: str
    replaces: bool = False
    since: str = ""
    gone: str = ""


_MANAGERS = "sglang.srt.managers"
_SCHEDULER = f"{_MANAGERS}.scheduler.Scheduler"
_PARTS = f"{_MANAGERS}.scheduler_components"
_CACHE = "sglang.srt.mem_cache"

FIRST_PROCESS_HOOKS = (
    Hook("sglang.srt.entrypoints.engine.Engine._launch_subprocesses", "engine:launch_subprocesses"),
    Hook("sglang.srt.utils.common.add_prometheus_middleware", "metrics:add_prometheus_middleware"),
)
"""Applied in the process that the user started, which makes the others."""

HOOKS = (
    Hook(
        f"{_CACHE}.allocator.token.TokenToKVPoolAllocator",
        "allocators:ElasticTokenAllocator",
        replaces=True,
    ),
    Hook(
        f"{_CACHE}.allocator.paged.PagedTokenToKVPoolAllocator",
        "allocators:ElasticPagedAllocator",
        replaces=True,
    ),
    Hook(f"{_CACHE}.memory_pool.MHATokenToKVPool._create_buffers", "pools:create_buffers"),
    Hook(f"{_CACHE}.memory_pool.MLATokenToKVPool._create_buffers", "pools:create_buffers"),
    Hook(
        "sglang.srt.model_executor.model_runner_kv_cache_mixin.ModelRunnerKVCacheMixin"
        "._profile_available_bytes",
        "capacity:profile_available_bytes",
        gone="0.5.16",
    ),
    Hook(
        f"{_CACHE}.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes",
        "capacity:profile_available_bytes",
        since="0.5.16",
    ),
    Hook(f"{_SCHEDULER}.__init__", "engine:scheduler_init"),
    Hook(f"{_SCHEDULER}.get_next_batch_to_run", "engine:get_next_batch_to_run"),
    Hook(f"{_MANAGERS}.schedule_policy.PrefillAdder.add_one_req", "engine:add_one_req"),
    Hook(f"{_MANAGERS}.schedule_policy.PrefillAdder.add_chunked_req", "engine:add_chunked_req"),
    Hook(f"{_SCHEDULER}.run_batch", "engine:run_batch"),
    Hook(f"{_SCHEDULER}.flush_cache", "engine:flush_cache"),
    Hook(f"{_SCHEDULER}.get_internal_state", "engine:get_internal_state"),
    Hook(
        f"{_PARTS}.weight_updater.SchedulerWeightUpdaterManager.release_memory_occupation",
        "engine:release_memory_occupation",
    ),
    Hook(
        f"{_PARTS}.weight_updater.SchedulerWeightUpdaterManager.resume_memory_occupation",
        "engine:resume_memory_occupation",
    ),
    Hook(
        f"{_PARTS}.invariant_checker.SchedulerInvariantChecker._check_full_pool",
        "engine:check_full_pool",
    ),
    Hook(
        f"{_PARTS}.pool_stats_observer.SchedulerPoolStatsObserver._get_token_info",
        "engine:get_token_info",
    ),
)
"""Applied in every process that can have a scheduler."""


def register() -> None:
    """Make SGLang's KV cache elastic if ``ENABLE_KVCACHED`` says so; else touch nothing.

    Raises:
        Refusal: the settings or the installed SGLang are not what we can work with. SGLang logs an
            ``Exception`` of a plugin and goes on without it; a ``SystemExit`` ends the process.
    """
    if os.environ.get(TOGGLE, "").strip().lower() in OFF:
        return
    version = _check()
    child = multiprocessing.parent_process() is not None
    if child and f"{_MANAGERS}.scheduler" not in sys.modules:
        return
    apply(HOOKS if child else (*FIRST_PROCESS_HOOKS, *HOOKS), version)


def expected(hooks: Iterable[Hook], version: str) -> list[Hook]:
    """Those of ``hooks`` whose targets an SGLang of ``version`` has."""
    from kvcached_plugins.contract import version_key

    key = version_key(version)
    return [
        hook
        for hook in hooks
        if not (hook.since and key < version_key(hook.since))
        and not (hook.gone and key >= version_key(hook.gone))
    ]


def apply(hooks: Iterable[Hook], version: str) -> None:
    """Apply ``hooks`` through SGLang's registry, and see that each was.

    SGLang itself logs a target that is missing or that somebody else has patched, and goes on.

    Raises:
        Refusal: a hook could not be applied.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from kvcached_plugins.refusal import Refusal

    wanted = expected(hooks, version)
    for hook in wanted:
        if hook.target in HookRegistry._patched:
            raise Refusal(
                f"another plugin has patched {hook.target} of SGLang before us; leave it out with "
                "SGLANG_PLUGINS, or unset ENABLE_KVCACHED."
            )
        module, _, name = hook.ours.partition(":")
        ours: Any = getattr(importlib.import_module(f"kvcached_plugins.sglang.{module}"), name)
        kind = HookType.REPLACE if hook.replaces else HookType.AROUND
        HookRegistry.register(hook.target, ours, kind)
    HookRegistry.apply_hooks()
    missing = [hook.target for hook in wanted if hook.target not in HookRegistry._patched]
    if missing:
        raise Refusal(
            f"SGLang did not let us patch {', '.join(missing)}; see its log, or unset "
            "ENABLE_KVCACHED to run it without an elastic KV cache."
        )


def _check() -> str:
    from kvcached_plugins import contract, settings
    from kvcached_plugins.refusal import Refusal
    from kvcached_vmm.errors import KVCachedError

    try:
        settings.enabled()
        read = settings.Settings.read()
        manifest = contract.verify("sglang")
    except KVCachedError as error:
        raise Refusal(str(error)) from error
    logging.getLogger("sglang.kvcached").setLevel(read.log_level)
    for name in ("kvcached", "kvcached_vmm"):
        logging.getLogger(name).parent = logging.getLogger("sglang.kvcached")
    return manifest.version
