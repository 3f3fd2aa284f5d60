"""What we change in SGLang is what we say, and each release that we promise has it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from kvcached_plugins import contract
from kvcached_plugins.refusal import Refusal
from kvcached_plugins.sglang.plugin import FIRST_PROCESS_HOOKS, HOOKS, expected, register
from kvcached_plugins.sglang.refusal import refuse_unsupported, unsupported

ALL = (*FIRST_PROCESS_HOOKS, *HOOKS)
RELEASES = [contract.load("sglang", name).version for name in contract.supported("sglang")]


def test_the_list_of_symbols_has_exactly_what_the_plugin_hooks() -> None:
    listed = [
        f"{use.module}.{name}"
        for use in contract.uses("sglang")
        if use.kind in ("wrap", "replace")
        for name in use.names
    ]
    assert sorted(hook.target for hook in ALL) == sorted(listed)


@pytest.mark.parametrize("version", RELEASES)
def test_every_release_has_what_is_hooked_in_it(version: str) -> None:
    manifest = contract.load("sglang", version)
    used = {s.name: s.kind for s in manifest.symbols if s.kind in ("wrap", "replace")}
    wanted = {
        hook.target: "replace" if hook.replaces else "wrap" for hook in expected(ALL, version)
    }
    assert wanted == used


def test_without_the_toggle_nothing_is_even_imported() -> None:
    program = (
        "import sys, kvcached_plugins.sglang.plugin as plugin\n"
        "plugin.register()\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('sglang', 'torch')])\n"
    )
    for value in ("", "0", "false", "no", "off", " OFF "):
        ran = subprocess.run(
            [sys.executable, "-c", program],
            env={"ENABLE_KVCACHED": value, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stdout == "[]\n"


def test_a_wrong_toggle_stops_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENABLE_KVCACHED", "maybe")
    with pytest.raises(Refusal, match="ENABLE_KVCACHED='maybe'"):
        register()


STOCK = {
    "device": "cuda",
    "disaggregation_mode": "null",
    "pp_size": 1,
    "tp_size": 2,
    "kv_canary": "none",
    "enable_memory_saver": True,
}


def test_a_plain_server_is_served() -> None:
    assert unsupported(SimpleNamespace(**STOCK)) is None


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"device": "npu"}, "npu"),
        ({"disaggregation_mode": "prefill"}, "disaggregation"),
        ({"speculative_algorithm": "EAGLE"}, "speculative"),
        ({"enable_hierarchical_cache": True}, "HiCache"),
        ({"enable_lmcache": True}, "LMCache"),
        ({"enable_flexkv": True}, "external"),
        ({"enable_hisparse": True}, "HiSparse"),
        ({"enable_unified_memory": True}, "unified memory"),
        ({"enable_page_major_kv_layout": True}, "page-major"),
        ({"pp_size": 2}, "pipeline"),
        ({"dcp_size": 2}, "context parallelism"),
        ({"enable_dp_attention": True}, "data-parallel attention"),
        ({"use_ray": True}, "Ray"),
        ({"nnodes": 2}, "other machines"),
        ({"radix_cache_backend": "mine"}, "mine"),
        ({"kv_canary": "log"}, "canary"),
        ({"dllm_algorithm": "x"}, "diffusion"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_sentence_with_the_way_out(
    asked: dict[str, object], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCACHED_DIR", "/nowhere")
    with pytest.raises(Refusal) as refused:
        refuse_unsupported(SimpleNamespace(**{**STOCK, **asked}))
    sentence = str(refused.value)
    assert word in sentence
    assert sentence.endswith("unset ENABLE_KVCACHED to run without an elastic KV cache.")
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "1"),
        ("SGLANG_MOONCAKE_CUSTOM_MEM_POOL", "NVLINK"),
    ],
)
def test_other_ways_to_place_kv_are_refused(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    reason = unsupported(SimpleNamespace(**STOCK))
    assert reason is not None
    assert variable in reason


def test_a_wrong_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCACHED_BUDGET", "plenty")
    with pytest.raises(Refusal, match="KVCACHED_BUDGET='plenty'"):
        refuse_unsupported(SimpleNamespace(**STOCK))
