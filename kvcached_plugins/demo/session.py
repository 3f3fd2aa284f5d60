"""One measurement: start two engines, play the bursts, stop the engines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from kvcached_plugins.demo.engines import Metrics
from kvcached_plugins.demo.load import Burst, Playback, Reply, play
from kvcached_plugins.demo.profiles import Profile
from kvcached_plugins.demo.sampler import (
    MemoryOf,
    Sample,
    elastic_memory,
    read_metrics,
    sample_until_cancelled,
    static_memory,
)
from kvcached_plugins.demo.screen import Screen
from kvcached_plugins.demo.servers import Server, ServerSpec, running
from kvcached_vmm.units import floor_to

# Without these an engine asks the network for things that a model with random weights has not.
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@dataclass
class Outcome:
    """What one measurement found."""

    mode: str
    engines: Sequence[str]
    samples: list[Sample] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    preemptions: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Mode:
    """How the memory is divided: what each engine is started with, and how it is read."""

    name: str
    specs: Sequence[ServerSpec]
    memory_of: MemoryOf
    settle_s: float


def elastic(profile: Profile, models: Sequence[Path], budget_bytes: int, ledger: Path) -> Mode:
    """Both engines with the plugin on, in one budget."""
    engine = profile.engine
    env = {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_BUDGET": str(budget_bytes),
        "KVCACHED_DIR": str(ledger),
        # Short, so that the memory of a burst is seen to fall before the next but one begins.
        "KVCACHED_CACHE_TTL": "2",
        "KVCACHED_DECAY": "1",
    }
    specs = [
        ServerSpec(
            f"elastic-{model.name}",
            engine,
            model,
            engine.arguments,
            {**OFFLINE, **engine.env, **env, "KVCACHED_NAME": f"elastic-{model.name}"},
        )
        for model in models
    ]
    return Mode("elastic", specs, elastic_memory(ledger), settle_s=5)


def static(profile: Profile, models: Sequence[Path], budget_bytes: int) -> Mode:
    """Both engines as they come, each with its half of the budget."""
    engine, per_token = profile.engine, profile.shape.kv_bytes_per_token
    half_bytes = floor_to(budget_bytes // len(models), 1 << 20)
    arguments = [*engine.arguments, *engine.pool(half_bytes, per_token)]
    specs = [
        ServerSpec(
            f"static-{model.name}",
            engine,
            model,
            arguments,
            {**OFFLINE, **engine.env, "ENABLE_KVCACHED": "0"},
        )
        for model in models
    ]
    return Mode("static", specs, static_memory(per_token), settle_s=2)


def measure(
    mode: Mode, profile: Profile, bursts: Sequence[Burst], logs: Path, screen: Screen
) -> Outcome:
    """Run one mode from start to stop.

    Raises ServerError when an engine does not start, or ends before the last reply.
    """

    def waiting(gone_s: float) -> None:
        screen.waiting(f"{mode.name}: two engines are starting", gone_s)

    with running(mode.specs, logs, waiting) as servers:
        return asyncio.run(_play(mode, profile, bursts, servers, screen))


async def _play(
    mode: Mode,
    profile: Profile,
    bursts: Sequence[Burst],
    servers: Sequence[Server],
    screen: Screen,
) -> Outcome:
    urls = [server.url for server in servers]
    vocabulary = profile.shape.vocabulary
    await _warm_up(urls, vocabulary)
    outcome = Outcome(mode.name, [spec.model.name for spec in mode.specs])
    playback = Playback(len(servers))
    outcome.replies = playback.replies

    def show(sample: Sample) -> None:
        screen.show(mode.name, sample, playback)

    sampling = asyncio.create_task(
        sample_until_cancelled(servers, mode.memory_of, playback, outcome.samples, show)
    )
    playing = asyncio.create_task(play(bursts, urls, vocabulary, playback))
    try:
        # The sampler only ends by an engine's death, which must not be waited out.
        await asyncio.wait({sampling, playing}, return_when=asyncio.FIRST_COMPLETED)
        if sampling.done():
            sampling.result()
        playing.result()
        await asyncio.sleep(mode.settle_s)
    finally:
        for task in (playing, sampling):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling
    outcome.preemptions = [found.preemptions for found in await _last_metrics(servers)]
    return outcome


async def _warm_up(urls: Sequence[str], vocabulary: int) -> None:
    """One short request each: what an engine compiles at its first request is not our subject."""
    bursts = [
        Burst(engine, 0.0, 1, (16, 16), (4, 4), seed=-1 - engine) for engine in range(len(urls))
    ]
    await play(bursts, urls, vocabulary, Playback(len(urls)))


async def _last_metrics(servers: Sequence[Server]) -> list[Metrics]:
    async with httpx.AsyncClient(timeout=10) as client:
        return await read_metrics(client, servers)
