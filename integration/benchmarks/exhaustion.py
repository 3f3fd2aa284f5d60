"""Too little memory: budgets from one request's worth upward, beside stock vLLM of the same size.

    python -m integration.benchmarks.exhaustion [--json FILE] [--sizes 9MiB,10MiB,...]

Each arm is a server of its own, sent all requests at once: its failures, its longest wait. Then an
engine whose memory somebody takes: another engine in the ledger that takes everything that is free,
every time, and gives it back; requests come all the time.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from integration.conftest import elastic_env, mixed_requests, write_test_model
from integration.engine import MIB, Request, Server, generate
from integration.gpu.record import MemorySampler, facts, write_json
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import format_size, parse_size

EXTENT_BYTES = MIB
REQUESTS = 60
SIZES = "8MiB,9MiB,10MiB,12MiB,16MiB,24MiB,48MiB"
"""A request of the longest length has 8 MiB; beside it there is the block that engines pad with."""
TAKEN_S, GIVEN_S = 6.0, 4.0
ROUNDS = 5
Json = dict[str, Any]


def served(
    server: Server, requests: Sequence[Request], expected: Sequence[list[int]], clients: int
) -> Json:
    """How long each request took, and whether it failed or had other tokens."""

    def one(request: Request) -> tuple[float, list[int] | None]:
        began = time.monotonic()
        try:
            tokens = server.complete(request)
        except Exception:
            return time.monotonic() - began, None
        return time.monotonic() - began, tokens

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as threads:
        answers = list(threads.map(one, requests))
    seconds = [each for each, _ in answers]
    pairs = list(zip(answers, expected, strict=True))
    return {
        "requests": len(requests),
        "failed": sum(tokens is None for _, tokens in answers),
        "different": sum(tokens not in (None, stock) for (_, tokens), stock in pairs),
        "all_s": round(time.monotonic() - began, 2),
        "median_wait_s": round(median(seconds), 2),
        "longest_wait_s": round(max(seconds), 2),
        "preemptions": int(server.metric("vllm:num_preemptions_total")),
    }


def arm(server: Server, requests: Sequence[Request], expected: Sequence[list[int]]) -> Json:
    """One server, unless it refuses to start; it is stopped afterwards."""
    try:
        server.wait_ready()
    except pytest.fail.Exception as error:
        said = [line for line in str(error).splitlines() if "Error" in line or "Refusal" in line]
        return {"refused": said[-1].split("ERROR")[-1].strip() if said else str(error)[-300:]}
    try:
        server.complete(requests[0])
        return served(server, requests, expected, len(requests))
    finally:
        server.stop()


def taken(folder: Path, budget_bytes: int, over: threading.Event, rounds: list[int]) -> None:
    """Take everything that is free for some time, give it back for some time."""
    with contextlib.closing(Ledger.open(folder, "host")) as ledger:
        account = ledger.join("greedy", budget_bytes)
        while not over.is_set():
            held, end = 0, time.monotonic() + TAKEN_S
            while time.monotonic() < end and not over.wait(0.005):
                granted = account.reserve(budget_bytes - held, EXTENT_BYTES)
                account.commit(granted, granted)
                held += granted
                account.report(held, 0, budget_bytes - held)
            rounds.append(held)
            account.release(held)
            account.report(0, 0)
            over.wait(GIVEN_S)
        account.close()


def beside_a_greedy_one(
    server: Server,
    folder: Path,
    budget_bytes: int,
    requests: Sequence[Request],
    expected: Sequence[list[int]],
) -> Json:
    try:
        server.wait_ready()
        many = list(requests) * ROUNDS
        alone = served(server, requests, expected, 8)
        over, rounds = threading.Event(), list[int]()
        greedy = threading.Thread(target=taken, args=(folder, budget_bytes, over, rounds))
        greedy.start()
        try:
            found = served(server, many, list(expected) * ROUNDS, 8)
        finally:
            over.set()
            greedy.join()
        again = served(server, requests, expected, 8)
        return {
            "taken_s": TAKEN_S,
            "given_s": GIVEN_S,
            "taken_bytes": rounds,
            "alone_before": alone,
            "beside": found,
            "alone_afterwards": again,
        }
    finally:
        server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sizes", default=SIZES)
    options = parser.parse_args()
    sizes = [parse_size(size) for size in options.sizes.split(",")]
    figures: Json = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_test_model(folder / "model")
        requests = mixed_requests(REQUESTS, seed=11)
        expected = generate(model, requests, folder, kv_cache_memory_bytes=256 * MIB).tokens

        def elastic(name: str, budget_bytes: int) -> Server:
            env = {
                **elastic_env(folder / name),
                "KVCACHED_BUDGET": str(budget_bytes),
                "KVCACHED_EXTENT": str(EXTENT_BYTES),
            }
            return Server(model, folder / f"{name}.log", env=env)

        for size in sizes:
            label = format_size(size)
            stock = ("--kv-cache-memory-bytes", str(size))
            figures[label] = {
                "stock": arm(
                    Server(model, folder / "stock.log", env={}, arguments=stock),
                    requests,
                    expected,
                ),
                "elastic": arm(elastic(f"of-{size}", size), requests, expected),
            }
            print(label, figures[label], flush=True)
        budget = 24 * MIB
        greedy = beside_a_greedy_one(
            elastic("greedy", budget), folder / "greedy", budget, requests, expected
        )
        print(greedy, flush=True)
    if options.json:
        setup = {"extent_bytes": EXTENT_BYTES, "greedy_budget_bytes": budget}
        report = {"facts": facts(MemorySampler()), "setup": setup}
        write_json(options.json, {**report, "sizes": figures, "greedy": greedy})
    return int(not passed(figures, greedy))


def passed(figures: Json, greedy: Json) -> bool:
    """Wherever stock serves, we serve; nothing fails or differs; and memory comes back."""
    arms = [pair["elastic"] for pair in figures.values() if "refused" not in pair["stock"]]
    arms += [greedy[part] for part in ("alone_before", "beside", "alone_afterwards")]
    return all(not (arm.get("failed", 1) or arm["different"]) for arm in arms)


if __name__ == "__main__":
    raise SystemExit(main())
