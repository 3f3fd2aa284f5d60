"""SGLang's own pools of buffers, made by its own code, over memory that comes and goes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.engine import MIB
from integration.sglang_engine import needs_sglang, use_shim
from kvcached_plugins import contract
from kvcached_vmm.errors import EngineUnsupported
from kvcached_vmm.ledger import Ledger

pytestmark = [pytest.mark.engine, needs_sglang]

SIZE = 4096
LAYERS = 3


@pytest.fixture(scope="module")
def hooked() -> Any:
    """SGLang's pools, hooked as in a server. Applies every hook of the plugin to this process."""
    use_shim()
    from sglang.srt.mem_cache import memory_pool

    from kvcached_plugins.sglang import plugin

    plugin.apply(plugin.HOOKS, contract.installed("sglang")[1])
    return memory_pool


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setenv("KVCACHED_DIR", str(tmp_path / "ledger"))
    monkeypatch.setenv("KVCACHED_BUDGET", f"{8 * MIB}")
    monkeypatch.setenv("KVCACHED_EXTENT", f"{MIB}")
    monkeypatch.setenv("KVCACHED_NAME", "pool")
    opened = Ledger.open(tmp_path / "ledger", "host")
    yield opened
    opened.close()


def make_mha(memory_pool: Any, page_size: int = 1, **changes: Any) -> Any:
    import torch

    arguments = {
        "size": SIZE,
        "page_size": page_size,
        "dtype": torch.float32,
        "head_num": 2,
        "head_dim": 64,
        "layer_num": LAYERS,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    return memory_pool.MHATokenToKVPool(**{**arguments, **changes})


def make_mla(memory_pool: Any, page_size: int = 1) -> Any:
    import torch

    return memory_pool.MLATokenToKVPool(
        size=SIZE,
        page_size=page_size,
        dtype=torch.float32,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )


@pytest.mark.parametrize("page_size", [1, 16])
def test_keys_and_values_lie_in_one_range_with_one_extent_of_memory(
    hooked: Any, ledger: Ledger, page_size: int
) -> None:
    pool = make_mha(hooked, page_size)
    memory = pool.kvcached
    try:
        buffers = [*pool.k_buffer, *pool.v_buffer]
        assert [tuple(b.shape) for b in buffers] == [(SIZE + page_size, 2, 64)] * (2 * LAYERS)
        assert all(buffer.is_contiguous() for buffer in buffers)
        assert pool.data_ptrs.tolist() == [buffer.data_ptr() for buffer in buffers]
        assert memory.arena.committed == {0}
        [account] = ledger.snapshot().accounts
        assert account.name == "pool"
        assert account.committed_bytes == memory.arena.committed_bytes
        for buffer in buffers:
            buffer[:page_size] = 1.0
    finally:
        memory.close()


@pytest.mark.parametrize("page_size", [1, 16])
def test_latent_keys_do_too(hooked: Any, ledger: Ledger, page_size: int) -> None:
    pool = make_mla(hooked, page_size)
    memory = pool.kvcached
    try:
        assert [tuple(b.shape) for b in pool.kv_buffer] == [(SIZE + page_size, 1, 80)] * LAYERS
        for buffer in pool.kv_buffer:
            buffer[:page_size] = 1.0
        assert memory.arena.committed == {0}
    finally:
        memory.close()


@pytest.mark.parametrize("make", [make_mha, make_mla])
@pytest.mark.parametrize("page_size", [1, 16])
def test_every_slot_of_the_pages_that_are_handed_out_can_be_written_and_read(
    hooked: Any, ledger: Ledger, page_size: int, make: Any
) -> None:
    """A slot of a page without memory would end the process with a segmentation fault."""
    from kvcached_plugins.sglang import allocators

    pool = make(hooked, page_size)
    memory = pool.kvcached
    memory.book.room = memory.room()
    try:
        if page_size == 1:
            allocator = allocators.ElasticTokenAllocator(SIZE, pool.dtype, "cpu", pool, False)
        else:
            allocator = allocators.ElasticPagedAllocator(
                SIZE, page_size, pool.dtype, "cpu", pool, False
            )
        slots = allocator.alloc(SIZE // 2)
        buffers = getattr(pool, "kv_buffer", None) or [*pool.k_buffer, *pool.v_buffer]
        for number, buffer in enumerate(buffers):
            buffer[slots] = number + 0.5
        for number, buffer in enumerate(buffers):
            assert bool((buffer[slots] == number + 0.5).all())
        assert len(memory.arena.committed) > 1
    finally:
        memory.close()


def test_pools_of_other_kinds_are_left_alone(hooked: Any, ledger: Ledger) -> None:
    class Other(hooked.MHATokenToKVPool):  # type: ignore[misc,name-defined]
        """Such as the pools that keep keys in four bits."""

    pool = Other(SIZE, 1, make_mha_dtype(), 2, 64, LAYERS, "cpu", False)
    assert not hasattr(pool, "kvcached")
    assert ledger.snapshot().accounts == ()
    gc.collect()


def make_mha_dtype() -> Any:
    import torch

    return torch.float32


def test_a_pool_that_the_budget_cannot_hold_an_extent_of_is_refused(
    hooked: Any, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvcached_plugins.refusal import Refusal

    monkeypatch.setenv("KVCACHED_BUDGET", "64KiB")
    with pytest.raises(Refusal, match="less than one extent"):
        make_mha(hooked)
    assert ledger.snapshot().accounts == ()


def test_a_pool_smaller_than_a_mapping_is_refused(hooked: Any, ledger: Ledger) -> None:
    from kvcached_plugins.refusal import Refusal

    with pytest.raises(Refusal, match="raise KVCACHED_BUDGET"):
        make_mha(hooked, size=16)


def test_keys_before_values_in_one_buffer_are_two_regions() -> None:
    """As SGLang 0.5.23 asks for them."""
    use_shim()
    import torch

    from kvcached_plugins.sglang.pools import Buffer, regions

    fused = Buffer((2, 4096 + 16, 2, 64), torch.float32)
    found = regions([fused, fused], num_blocks=257, granularity=65536)
    row = 2 * 64 * 4
    offsets = [region.offset_bytes for region in found]
    assert [region.stride_bytes for region in found] == [16 * row] * 4
    assert all(offset % 65536 == 0 for offset in offsets)
    assert offsets[1] - offsets[0] == offsets[3] - offsets[2]
    assert (offsets[1] - offsets[0]) % (16 * row) == 0, "values are whole pages after keys"
    assert min(offsets[1] - offsets[0], offsets[2] - offsets[1]) >= 4112 * row


def test_a_buffer_that_pages_do_not_divide_is_refused() -> None:
    use_shim()
    import torch

    from kvcached_plugins.sglang.pools import Buffer, regions

    with pytest.raises(EngineUnsupported, match="unset ENABLE_KVCACHED"):
        regions([Buffer((1000, 64), torch.float32)], num_blocks=257, granularity=65536)


def test_a_hook_on_what_somebody_else_has_patched_is_refused(hooked: Any) -> None:
    from kvcached_plugins.refusal import Refusal
    from kvcached_plugins.sglang import plugin

    with pytest.raises(Refusal, match="another plugin has patched"):
        plugin.apply(plugin.HOOKS[-1:], contract.installed("sglang")[1])


def test_a_hook_that_sglang_could_not_apply_is_refused(hooked: Any) -> None:
    """SGLang itself logs it and goes on."""
    from kvcached_plugins.refusal import Refusal
    from kvcached_plugins.sglang import plugin

    gone = plugin.Hook("sglang.srt.managers.scheduler.Scheduler.gone", "engine:run_batch")
    with pytest.raises(Refusal, match=r"did not let us patch .*Scheduler\.gone"):
        plugin.apply([gone], contract.installed("sglang")[1])
