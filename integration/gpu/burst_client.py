"""Plays bursts on one server when told to, with the request function of vLLM's own benchmark.

Run by neighbours.py and reclaim.py as a child, one for each server: a client in one process would
be the bottleneck for two. Orders are files in a folder, ``LABEL.go``; so are the answers,
``LABEL.replies``, and an order to end, ``stop``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from integration.gpu.bursts import Json, Load, Reply, prompts
from integration.gpu.process import Child, environment, python
from integration.gpu.record import write_json

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
        load, label = Load(*order["load"]), order["label"]
        if order["streams"]:
            replies = await self._stream(label, load, order["seed"], order["streams"])
        else:
            ready = prompts(load, self._vocabulary, order["seed"])
            await asyncio.sleep(order["at"] - time.time())
            asked = (self._ask(prompt, load.output_tokens) for prompt in ready)
            replies = list(await asyncio.gather(*asked))
        write_json(self.folder / f"{label}.replies", replies)

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
