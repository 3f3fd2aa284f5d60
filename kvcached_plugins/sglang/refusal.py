"""Configurations of SGLang that cannot have an elastic KV cache, each refused with one sentence."""

from __future__ import annotations

import os
from typing import Any

from kvcached_plugins.refusal import Refusal
from kvcached_plugins.settings import Settings
from kvcached_vmm.errors import KVCachedError

_TURN_OFF = "unset ENABLE_KVCACHED to run without an elastic KV cache."

_POST_CAPTURE = "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"
_MEMORY_POOL = "SGLANG_MOONCAKE_CUSTOM_MEM_POOL"


def refuse_unsupported(server_args: Any) -> None:
    """Check the settings and the server's arguments.

    Raises:
        Refusal: one of them is not what we can work with.
    """
    try:
        settings = Settings.read()
    except KVCachedError as error:
        raise Refusal(str(error)) from error
    if settings.poison is not None and settings.poison.spares_blocks:
        raise Refusal(
            "KVCACHED_POISON='nan' has to know when a request is first given a block, which "
            "SGLang's lists on the device do not tell; set it to large, or unset it."
        )
    reason = unsupported(server_args)
    if reason is not None:
        raise Refusal(f"{reason}; {_TURN_OFF}")


def unsupported(args: Any) -> str | None:
    """Why a server with these ``ServerArgs`` cannot have an elastic cache; None if it can.

    What SGLang versions do not have counts as not asked for.
    """

    def asked(name: str) -> Any:
        return getattr(args, name, None)

    checks = (
        (
            asked("device") not in (None, "cuda", "cpu"),
            f"the device {asked('device')!r} is not supported (CUDA and CPU are)",
        ),
        (
            (asked("disaggregation_mode") or "null") != "null",
            "prefill-decode disaggregation registers the whole KV buffer with the network, all of "
            "it with memory",
        ),
        (
            asked("speculative_algorithm") is not None,
            "speculative decoding keeps KV of a draft model, which is not elastic yet",
        ),
        (
            bool(asked("enable_hierarchical_cache") or asked("enable_lmcache")),
            "a hierarchical cache (HiCache, LMCache) copies KV beside the steps of the engine and "
            "sizes its host memory by the virtual capacity",
        ),
        (
            bool(asked("enable_unified_cache_external_linker") or asked("enable_flexkv")),
            "external KV caches copy KV beside the steps of the engine",
        ),
        (bool(asked("enable_hisparse")), "HiSparse keeps KV on the host"),
        (bool(asked("enable_unified_memory")), "SGLang's unified memory pool places KV itself"),
        (bool(asked("enable_page_major_kv_layout")), "the page-major KV layout is not supported"),
        (bool(asked("enable_pdmux")), "PD multiplexing is not supported"),
        (asked("dllm_algorithm") is not None, "diffusion language models are not supported"),
        ((asked("pp_size") or 1) > 1, "pipeline parallelism is not supported"),
        (
            max(asked("dcp_size") or 1, asked("attn_cp_size") or 1) > 1,
            "context parallelism is not supported",
        ),
        (
            bool(asked("enable_dp_attention")),
            "data-parallel attention is not supported",
        ),
        (
            bool(asked("use_ray")) or (asked("nnodes") or 1) > 1,
            "schedulers on other machines or under Ray cannot share a ledger",
        ),
        (asked("elastic_ep_backend") is not None, "elastic expert parallelism is not supported"),
        (
            asked("radix_cache_backend") is not None,
            f"the radix cache backend {asked('radix_cache_backend')!r} is not one of SGLang's own",
        ),
        (
            (asked("kv_canary") or "none") != "none",
            "the KV canary writes to KV slots that nobody was given",
        ),
        (
            os.environ.get(_POST_CAPTURE, "").lower() in ("1", "true", "yes"),
            f"{_POST_CAPTURE} lets SGLang size its KV cache once and for all",
        ),
        (
            bool(os.environ.get(_MEMORY_POOL)),
            f"{_MEMORY_POOL} takes KV memory from another allocator",
        ),
    )
    return next((reason for applies, reason in checks if applies), None)
