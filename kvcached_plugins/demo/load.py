"""Bursts of requests, sent on a fixed schedule through the OpenAI completions API."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx


class Burst(NamedTuple):
    """Requests that reach one engine at the same moment."""

    engine: int
    at_s: float
    requests: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    seed: int


class Request(NamedTuple):
    prompt: list[int]
    output_tokens: int


class Reply(NamedTuple):
    """What became of one request; times are seconds since the schedule began."""

    burst: int
    engine: int
    due_s: float
    first_token_s: float
    done_s: float
    tokens: int
    error: str | None

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.due_s


@dataclass
class Progress:
    """Counts for one engine, updated while a schedule is played."""

    sent: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0


@dataclass
class Playback:
    """A schedule being played: its clock, its counts, and the replies so far."""

    engines: int
    started: float = field(default_factory=time.monotonic)
    replies: list[Reply] = field(default_factory=list)
    progress: list[Progress] = field(init=False)

    def __post_init__(self) -> None:
        self.progress = [Progress() for _ in range(self.engines)]

    def now_s(self) -> float:
        return time.monotonic() - self.started


def requests_of(burst: Burst, vocabulary: int) -> list[Request]:
    """The requests of a burst: the same for the same seed, and no two with a common prefix."""
    dice = random.Random(burst.seed)
    return [
        Request(
            [dice.randrange(2, vocabulary) for _ in range(dice.randint(*burst.prompt_tokens))],
            dice.randint(*burst.output_tokens),
        )
        for _ in range(burst.requests)
    ]


async def play(
    bursts: Sequence[Burst], urls: Sequence[str], vocabulary: int, playback: Playback
) -> None:
    """Send every burst when it is due, whether or not earlier ones have finished; wait for all."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=httpx.Timeout(300), limits=limits) as client:
        await asyncio.gather(
            *(
                _send_burst(client, index, burst, urls[burst.engine], vocabulary, playback)
                for index, burst in enumerate(bursts)
            )
        )


async def _send_burst(
    client: httpx.AsyncClient,
    index: int,
    burst: Burst,
    url: str,
    vocabulary: int,
    playback: Playback,
) -> None:
    requests = requests_of(burst, vocabulary)
    await asyncio.sleep(burst.at_s - playback.now_s())
    await asyncio.gather(
        *(_send(client, index, burst, url, request, playback) for request in requests)
    )


async def _send(
    client: httpx.AsyncClient,
    index: int,
    burst: Burst,
    url: str,
    request: Request,
    playback: Playback,
) -> None:
    progress = playback.progress[burst.engine]
    progress.sent += 1
    progress.running += 1
    body = {
        "model": "demo",
        "prompt": request.prompt,
        "max_tokens": request.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first_s = 0.0
    last = b""
    error: str | None = None
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                error = f"HTTP {response.status_code}: {(await response.aread())[:200]!r}"
            else:
                async for chunk in response.aiter_raw():
                    first_s = first_s or playback.now_s()
                    last = (last + chunk)[-2000:]
    except httpx.HTTPError as failure:
        error = f"{type(failure).__name__}: {failure}"
    tokens = _completion_tokens(last)
    if error is None and tokens != request.output_tokens:
        error = f"{tokens} of {request.output_tokens} tokens came back"
    progress.running -= 1
    progress.done += error is None
    progress.failed += error is not None
    playback.replies.append(
        Reply(index, burst.engine, burst.at_s, first_s, playback.now_s(), tokens, error)
    )


def _completion_tokens(tail: bytes) -> int:
    """The number of tokens that the usage record at the end of a stream tells; 0 without one."""
    for line in reversed(tail.split(b"\n")):
        if line.startswith(b"data: {") and b'"usage"' in line:
            usage = json.loads(line[6:]).get("usage") or {}
            return int(usage.get("completion_tokens", 0))
    return 0
