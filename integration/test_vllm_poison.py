"""Memory that comes and goes is poisoned: the tokens of a real engine do not change.

And it would be seen: vLLM's own kernel over an arena tells what it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest

from integration.conftest import asked_for, cases, elastic_env
from integration.engine import BLOCK_TOKENS, MIB, Generated, Request, generate, needs_vllm
from integration.test_vllm_tokens import differences

pytestmark = [pytest.mark.engine, needs_vllm]

SOME = 70
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
KINDS = ("nan", "large")


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest,
    lanes: Executor,
    plugin: None,
    model: Path,
    requests: list[Request],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Future[Generated]]:
    """What engines with poisoned memory make of the last requests: a tight budget, and memory that
    goes at once, so that nearly every block is in memory that has just come."""
    made = {}
    for kind in asked_for(request, "kind"):
        folder = tmp_path_factory.mktemp(kind)
        env = {
            **elastic_env(folder / "ledger"),
            "KVCACHED_POISON": kind,
            "KVCACHED_BUDGET": f"{20 * MIB}",
            "KVCACHED_EXTENT": f"{MIB}",
            "KVCACHED_DECAY": "0",
            "KVCACHED_CACHE_TTL": "0.2",
        }
        some = requests[-SOME:]
        made[kind] = lanes.submit(
            generate, model, some, folder, env=env, enable_prefix_caching=True
        )
    return made


@pytest.mark.parametrize("kind", cases(KINDS, {"large"}))
def test_the_tokens_are_those_of_stock_vllm(
    kind: str,
    served: dict[str, Future[Generated]],
    requests: list[Request],
    reference: list[list[int]],
) -> None:
    generated = served[kind].result()

    assert generated.peak_bytes > 10 * MIB
    assert differences(requests[-SOME:], generated.tokens, reference[-SOME:]) == []


class Cache:
    """One layer's cache over an arena, for one request, and vLLM's attention over it."""

    def __init__(self, kind: str, blocks: int = 6) -> None:
        import torch

        from kvcached_vmm.extents import ExtentMap, Region
        from kvcached_vmm.host_driver import HostDriver
        from kvcached_vmm.poison import LARGE, NAN, PoisonedArena
        from kvcached_vmm.tensors import arena_tensor, filler

        shape = (blocks, KV_HEADS, 2 * BLOCK_TOKENS, HEAD_DIM)
        stride = KV_HEADS * 2 * BLOCK_TOKENS * HEAD_DIM * 4
        driver, cpu = HostDriver(), torch.device("cpu")
        extents = ExtentMap(blocks, [Region(0, stride)], driver.granularity, 1)
        poison = {"nan": NAN, "large": LARGE}[kind]
        self.arena = PoisonedArena(driver, extents, poison, filler(cpu))
        self.arena.commit([0])
        tensor = arena_tensor(self.arena, blocks * stride, cpu)
        self._keys, self._values = tensor.view(torch.float32).view(shape).chunk(2, dim=2)

    def take(self, blocks: list[int]) -> None:
        self.arena.commit(blocks)
        self.arena.hand_out(blocks)

    def attention(self, blocks: list[int], tokens: int, write: bool = True) -> list[float]:
        """What the last of ``tokens`` in ``blocks`` attends to."""
        import torch
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        isa = _get_attn_isa(torch.float32, BLOCK_TOKENS, HEAD_DIM)
        chance = torch.Generator().manual_seed(tokens)
        key, value = torch.randn(2, tokens, KV_HEADS, HEAD_DIM, generator=chance)
        query = torch.randn(1, HEADS, HEAD_DIM, generator=chance)
        output = torch.empty_like(query)
        table = torch.tensor([blocks], dtype=torch.int32)
        slots = table.long()[0, :, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)
        if write:
            places = slots.flatten()[:tokens].contiguous()
            ops.cpu_attn_reshape_and_cache(key, value, self._keys, self._values, places, isa)
        length = torch.tensor([tokens], dtype=torch.int32)
        begin = torch.tensor([0, 1], dtype=torch.int32)
        plan = ops.cpu_attn_get_scheduler_metadata(
            *(1, HEADS, KV_HEADS, HEAD_DIM, length, torch.float32, begin, True, -1, isa, True)
        )
        ops.cpu_attention_with_kv_cache(
            *(query, self._keys, self._values, output, begin, length, HEAD_DIM**-0.5, True),
            *(None, -1, table, 0.0, plan, None),
        )
        return [float(each) for each in output.flatten()]


@pytest.fixture(params=KINDS)
def cache(request: pytest.FixtureRequest) -> Iterator[Cache]:
    made = Cache(request.param)
    yield made
    made.arena.close()


def finite(output: list[float]) -> bool:
    return all(abs(each) < 100 for each in output)


def test_a_request_with_blocks_of_its_own_sees_no_poison(cache: Cache) -> None:
    cache.take([2, 4])
    assert finite(cache.attention([2, 4], BLOCK_TOKENS + 40))


@pytest.mark.parametrize("lost", [2, 4])
def test_a_block_whose_memory_was_away_spoils_the_result(cache: Cache, lost: int) -> None:
    """As if it had been given back while a request used it. Zeros would give a number like any."""
    cache.take([2, 4])
    cache.attention([2, 4], BLOCK_TOKENS + 40)
    cache.arena.decommit([lost])
    cache.arena.commit([lost])
    assert not finite(cache.attention([2, 4], BLOCK_TOKENS + 40, write=False))


def test_a_block_of_nobody_in_a_block_table_spoils_the_result(cache: Cache) -> None:
    cache.take([2])
    cache.arena.commit([3])
    assert not finite(cache.attention([2, 3], BLOCK_TOKENS + 40, write=False))


def test_stock_attention_on_a_cpu_reads_beyond_the_end_of_a_sequence() -> None:
    """Why blocks that are handed out are spared by NaN: with a weight of 0 stock reads whole tiles,
    which zeros and LARGE, but not NaN, let pass. When this fails, they need not be spared."""
    cache = Cache("nan")
    cache.arena.commit([2])
    assert not finite(cache.attention([2], 40))
    cache.arena.close()
