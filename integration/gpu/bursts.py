"""Bursts in turn, and the figures of what came back. Pure: no engine, no clock, no files.

Times are in seconds, points in time in seconds since the epoch; names that end in ms say so.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Json = dict[str, Any]
ENGINES = ("a", "b")


class Load(NamedTuple):
    """Requests that reach an engine at the same moment; lengths in tokens."""

    requests: int
    prompt_tokens: int
    output_tokens: int

    def peak_bytes(self, token_bytes: int) -> int:
        """What they hold when all of them run and have grown to their full length."""
        return self.requests * (self.prompt_tokens + self.output_tokens) * token_bytes


@dataclass(frozen=True)
class Phase:
    """A burst on one engine, or on several at once: a seed for each."""

    label: str
    seeds: Mapping[str, int]


class Reply(NamedTuple):
    """What became of a request.

    Attributes:
        started: when it was sent.
        first_s: until its first token, 0 if none came.
        gaps_s: between its tokens.
        tokens: how many the server says it made.
        error: None if all is well.
    """

    started: float
    first_s: float
    gaps_s: Sequence[float]
    tokens: int
    error: str | None

    @property
    def ended(self) -> float:
        return self.started + self.first_s + sum(self.gaps_s)

    def token_times(self) -> list[float]:
        times = [self.started + self.first_s]
        for gap in self.gaps_s:
            times.append(times[-1] + gap)
        return times


def schedule(rounds: int, engines: Sequence[str] = ENGINES) -> list[Phase]:
    """Each round: the first engine, the second, the first again, then both.

    Every burst has a seed of its own, so that no prompt is met again in a prefix cache.
    """
    first, second = engines
    turns = [
        (first, (first,)),
        (second, (second,)),
        (f"{first}-again", (first,)),
        ("both", engines),
    ]
    phases = []
    for number in range(rounds):
        for turn, (name, busy) in enumerate(turns):
            seed = 1000 * (number + 1) + 10 * turn
            seeds = {engine: seed + engines.index(engine) for engine in busy}
            phases.append(Phase(f"{number + 1}-{name}", seeds))
    return phases


def prompts(load: Load, vocabulary: int, seed: int) -> list[list[int]]:
    """Token ids of each request: the same for the same seed, with no common prefix."""
    dice = random.Random(seed)
    return [
        [dice.randrange(10, vocabulary - 10) for _ in range(load.prompt_tokens)]
        for _ in range(load.requests)
    ]


def spread_ms(seconds: Iterable[float]) -> Json:
    """Mean, median, 99th percentile (nearest rank) and largest, in milliseconds; {} of nothing."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    rank = max(0, -(-99 * len(ordered) // 100) - 1)
    figures = {
        "mean": statistics.fmean(ordered),
        "median": statistics.median(ordered),
        "p99": ordered[rank],
        "max": ordered[-1],
    }
    return {name: round(1e3 * value, 3) for name, value in figures.items()}


def figures(replies: Sequence[Reply], load: Load, began: float) -> Json:
    """Latency and throughput of one burst on one engine.

    A reply with fewer tokens than were asked for has failed, and so has one that never came.
    """
    whole = [r for r in replies if r.error is None and r.tokens == load.output_tokens]
    errors = [r.error or f"{r.tokens} tokens came back" for r in replies if r not in whole]
    took_s = max((r.ended for r in whole), default=began) - began
    return {
        "requests": load.requests,
        "failed": load.requests - len(whole),
        "errors": errors[:3],
        "duration_s": round(took_s, 3),
        "ttft_ms": spread_ms(r.first_s for r in whole),
        "tpot_ms": spread_ms(sum(r.gaps_s) / (r.tokens - 1) for r in whole if r.tokens > 1),
        "output_tokens_per_s": round(sum(r.tokens for r in whole) / took_s, 1) if took_s else None,
    }


def longest_gap_s(replies: Sequence[Reply], begin: float, end: float) -> float | None:
    """The longest that any request waited for its next token, of the waits that touch a moment
    between ``begin`` and ``end``; None if there was none."""
    longest = None
    for reply in replies:
        times = reply.token_times()
        for before, after in itertools.pairwise(times):
            if before <= end and after >= begin:
                longest = max(longest or 0.0, after - before)
    return longest


def ratios(static: Json, elastic: Json) -> Json:
    """Static halves over one budget, for each phase and engine that both arms have: above 1 is in
    favour of the budget, except for tokens per second."""
    found: Json = {}
    for label, phase in static.items():
        for engine, stock in phase["engines"].items():
            ours = elastic.get(label, {}).get("engines", {}).get(engine)
            if ours is None:
                continue
            pairs = {
                "duration": (stock["duration_s"], ours["duration_s"]),
                "output_tokens_per_s": (stock["output_tokens_per_s"], ours["output_tokens_per_s"]),
            }
            for what in ("ttft_ms", "tpot_ms"):
                for which in ("mean", "p99"):
                    pairs[f"{which}_{what}"] = (stock[what].get(which), ours[what].get(which))
            found.setdefault(label, {})[engine] = {
                name: round(one / two, 3) for name, (one, two) in pairs.items() if one and two
            }
    return found
