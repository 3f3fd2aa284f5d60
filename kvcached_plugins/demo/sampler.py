"""What each engine holds and does, a few times a second while a schedule is played."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx

from kvcached_plugins.demo.engines import Metrics
from kvcached_plugins.demo.load import Playback
from kvcached_plugins.demo.servers import Server, check_alive
from kvcached_vmm.ledger import Ledger

PERIOD_S = 0.25


class Memory(NamedTuple):
    """Bytes of KV cache: what the engine has taken from the machine, and what is in it."""

    held_bytes: int
    live_bytes: int
    cached_bytes: int = 0


class EngineSample(NamedTuple):
    held_bytes: int
    live_bytes: int
    cached_bytes: int
    running: int
    waiting: int


class Sample(NamedTuple):
    """One look at all engines, `at_s` seconds into the schedule."""

    at_s: float
    engines: tuple[EngineSample, ...]

    @property
    def held_bytes(self) -> int:
        return sum(engine.held_bytes for engine in self.engines)


MemoryOf = Callable[[Sequence[Server], Sequence[Metrics]], list[Memory]]


def elastic_memory(directory: Path) -> MemoryOf:
    """Memory as the shared ledger in `directory` tells it, by the engines' names."""

    ledgers: list[Ledger] = []

    def read(servers: Sequence[Server], metrics: Sequence[Metrics]) -> list[Memory]:
        if not ledgers:
            # The engines have made it by now; there is one per device, and they share one.
            ledgers.extend(Ledger.open(directory, path.stem) for path in directory.glob("*.ledger"))
        accounts = [account for ledger in ledgers for account in ledger.snapshot().accounts]
        return [
            Memory(
                sum(account.committed_bytes for account in own),
                sum(account.live_bytes for account in own),
                sum(account.cached_bytes for account in own),
            )
            for own in (
                # An engine that starts adds a word in brackets to its name.
                [account for account in accounts if account.name.split(" ")[0] == server.name]
                for server in servers
            )
        ]

    return read


def static_memory(kv_bytes_per_token: int) -> MemoryOf:
    """Memory of a stock engine: it takes its whole pool at start, and tells how full that is."""

    def read(servers: Sequence[Server], metrics: Sequence[Metrics]) -> list[Memory]:
        return [
            Memory(
                pool := found.pool_tokens * kv_bytes_per_token,
                int(pool * found.kv_usage),
            )
            for found in metrics
        ]

    return read


async def read_metrics(client: httpx.AsyncClient, servers: Sequence[Server]) -> list[Metrics]:
    answers = await asyncio.gather(*(client.get(f"{server.url}/metrics") for server in servers))
    return [
        server.engine.metrics(answer.text) for server, answer in zip(servers, answers, strict=True)
    ]


async def sample_until_cancelled(
    servers: Sequence[Server],
    memory_of: MemoryOf,
    playback: Playback,
    samples: list[Sample],
    shown: Callable[[Sample], None],
) -> None:
    """Append to `samples` every PERIOD_S. Raises ServerError when an engine has died."""
    async with httpx.AsyncClient(timeout=10) as client:
        metrics = await read_metrics(client, servers)
        # On its own: a busy engine answers late, and its memory is told by the ledger meanwhile.
        polling = asyncio.create_task(_poll_metrics(client, servers, metrics))
        try:
            while True:
                check_alive(servers)
                memory = memory_of(servers, metrics)
                sample = Sample(
                    playback.now_s(),
                    tuple(
                        EngineSample(*held, found.running, found.waiting)
                        for held, found in zip(memory, metrics, strict=True)
                    ),
                )
                samples.append(sample)
                shown(sample)
                await asyncio.sleep(PERIOD_S)
        finally:
            polling.cancel()


async def _poll_metrics(
    client: httpx.AsyncClient, servers: Sequence[Server], metrics: list[Metrics]
) -> None:
    while True:
        await asyncio.sleep(PERIOD_S)
        with contextlib.suppress(httpx.HTTPError):
            metrics[:] = await read_metrics(client, servers)
