"""Plays loads on one server when told to.

Bursts go through the request function of vLLM's own benchmark. Open-loop traffic goes through a
stream of our own, which also knows how far a request was when its load is called off.

Run by neighbours.py and reclaim.py as a child, one for each server: a client in one process would
be the bottleneck for two. Orders are files in a folder, ``LABEL.go``; so are the answers,
``LABEL.replies``, and an order to end, ``stop``.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from integration.gpu import traffic
from integration.gpu.bursts import Json, Load, Reply, prompts
from integration.gpu.process import Child, environment, python
from integration.gpu.record import write_json
from integration.gpu.slo import CUT_OFF
from integration.gpu.traffic import Ask

LOOK_S = 0.01
LEAD_S = 0.5
"""From an order to its burst: time to make prompts."""


class BurstClient:
    """The parent's side: gives orders and collects replies."""

    def __init__(
        self, name: str, folder: Path, port: int, model: str, vocabulary: int, o: Any
    ) -> None:
        self.folder = folder
        folder.mkdir()
        spec: Json = {"port": port, "model": model, "vocabulary": vocabulary, "folder": str(folder)}
        write_json(folder / "spec.json", spec)
        command = python("integration.gpu.burst_client", str(folder / "spec.json"))
        log = folder.parent / f"client-{name}.log"
        self.child = Child(command, log, environment(False, o.env, o.cache / "client"))

    @property
    def ready(self) -> bool:
        return (self.folder / "ready").exists()

    def order(self, label: str, at: float, load: Load, seed: int, streams: int = 0) -> None:
        """``load`` at the moment ``at``; with ``streams``, that many requests at any time until
        ``release`` is called."""
        spec = {"label": label, "at": at, "load": load, "seed": seed, "streams": streams}
        write_json(self.folder / f"{label}.go", spec)

    def send(self, label: str, at: float, asks: Sequence[Ask], seed: int, until: float) -> None:
        """Each of ``asks`` at its second after ``at``; what still runs at ``until`` is cut off."""
        spec = {"label": label, "at": at, "asks": asks, "seed": seed, "until": until}
        write_json(self.folder / f"{label}.go", spec)

    def release(self, label: str) -> None:
        (self.folder / f"{label}.enough").touch()

    def done(self, label: str) -> bool:
        return (self.folder / f"{label}.replies").exists()

    def replies(self, label: str) -> list[Reply]:
        """What came back so far of an order that is done; [] of one that is not."""
        with contextlib.suppress(FileNotFoundError):
            return [
                Reply(*each) for each in json.loads((self.folder / f"{label}.replies").read_text())
            ]
        return []


class Streamed:
    """The answer to one request as it comes in, server-sent events line by line."""

    def __init__(self, started: float, wanted: int) -> None:
        self.started = started
        self.wanted = wanted
        self.error: str | None = None
        self._moments: list[float] = []
        self._tokens = 0

    def take(self, line: bytes, now: float) -> None:
        if not line.startswith(b"data: {"):
            return
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            self.error = str(event["error"])[:200]
        if event.get("choices"):
            self._moments.append(now)
        if usage := event.get("usage"):
            self._tokens = usage["completion_tokens"]

    def reply(self) -> Reply:
        moments, error = self._moments, self.error
        if error is None and self._tokens != self.wanted:
            error = f"{self._tokens} tokens came back"
        first_s = round(moments[0] - self.started, 5) if moments else 0.0
        gaps = [round(late - early, 5) for early, late in itertools.pairwise(moments)]
        return Reply(self.started, first_s, gaps, self._tokens, error)


class Player:
    """The child's side."""

    def __init__(self, spec: Json) -> None:
        self.folder = Path(spec["folder"])
        self._url = f"http://127.0.0.1:{spec['port']}/v1/completions"
        self._model: str = spec["model"]
        self._vocabulary: int = spec["vocabulary"]

    async def run(self) -> None:
        import aiohttp

        tasks: set[asyncio.Task[None]] = set()
        seen: set[Path] = set()
        # A server drops a connection that was idle for 5 s, maybe just as it is used again.
        connections = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(connector=connections, timeout=timeout) as session:
            self._session = session
            (self.folder / "ready").touch()
            while not (self.folder / "stop").exists():
                for path in set(self.folder.glob("*.go")) - seen:
                    seen.add(path)
                    tasks.add(asyncio.create_task(self._play(json.loads(path.read_text()))))
                await asyncio.sleep(LOOK_S)

    async def _play(self, order: Json) -> None:
        label = order["label"]
        if "asks" in order:
            replies = await self._traffic(order)
            write_json(self.folder / f"{label}.replies", replies)
            return
        load = Load(*order["load"])
        if order["streams"]:
            replies = await self._stream(label, load, order["seed"], order["streams"])
        else:
            ready = prompts(load, self._vocabulary, order["seed"])
            await asyncio.sleep(order["at"] - time.time())
            asked = (self._ask(prompt, load.output_tokens) for prompt in ready)
            replies = list(await asyncio.gather(*asked))
        write_json(self.folder / f"{label}.replies", replies)

    async def _traffic(self, order: Json) -> list[Reply]:
        asks = [Ask(*each) for each in order["asks"]]
        ready = traffic.prompts(asks, self._vocabulary, order["seed"])

        async def one(ask: Ask, prompt: Sequence[int]) -> Reply:
            await asyncio.sleep(order["at"] + ask.at_s - time.time())
            streamed = Streamed(time.time(), ask.output_tokens)
            try:
                left_s = order["until"] - time.time()
                await asyncio.wait_for(self._follow(prompt, streamed), max(0.1, left_s))
            except asyncio.TimeoutError:  # not the builtin before 3.11
                streamed.error = CUT_OFF
            except Exception as error:
                streamed.error = f"{type(error).__name__}: {error}"[:200]
            return streamed.reply()

        both = zip(asks, ready, strict=True)
        return list(await asyncio.gather(*(one(ask, prompt) for ask, prompt in both)))

    async def _follow(self, prompt: Sequence[int], streamed: Streamed) -> None:
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": streamed.wanted,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with self._session.post(self._url, json=body) as answer:
            if answer.status != 200:
                streamed.error = f"status {answer.status}: {(await answer.text())[:150]}"
                return
            async for line in answer.content:
                streamed.take(line, time.time())

    async def _stream(self, label: str, load: Load, seed: int, streams: int) -> list[Reply]:
        replies: list[Reply] = []

        async def one(number: int) -> None:
            async for prompt in self._fresh_prompts(label, load, seed + 100_000 * number):
                replies.append(await self._ask(prompt, load.output_tokens))

        await asyncio.gather(*(one(number) for number in range(streams)))
        return replies

    async def _fresh_prompts(
        self, label: str, load: Load, seed: int
    ) -> AsyncIterator[Sequence[int]]:
        while not (self.folder / f"{label}.enough").exists():
            yield prompts(load._replace(requests=1), self._vocabulary, seed)[0]
            seed += 1

    async def _ask(self, prompt: Sequence[int], output_tokens: int) -> Reply:
        from vllm.benchmarks.lib.endpoint_request_func import (
            RequestFuncInput,
            async_request_openai_completions,
        )

        asked = RequestFuncInput(
            prompt=list(prompt),
            api_url=self._url,
            prompt_len=len(prompt),
            output_len=output_tokens,
            model=self._model,
            ignore_eos=True,
            extra_body={"temperature": 0.0},
        )
        began = time.time()
        got = await async_request_openai_completions(asked, self._session)
        error = None if got.success else (got.error.strip().splitlines() or ["no reason given"])[-1]
        gaps = [round(gap, 5) for gap in got.itl]
        return Reply(began, round(got.ttft, 5), gaps, got.output_tokens or 0, error)


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    import vllm.benchmarks.lib.endpoint_request_func  # noqa: F401 - slow, so now

    asyncio.run(Player(spec).run())
    os._exit(0)  # requests that still run are of no interest


if __name__ == "__main__":
    main()
