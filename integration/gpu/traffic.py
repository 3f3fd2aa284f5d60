"""Requests over time, open loop: when each is sent, and how long its prompt and answer are. Pure.

Times are in seconds from the start of a load. The same seed gives the same load, so that arms of a
comparison meet the same work; loads with other seeds have no prompt in common.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Ask(NamedTuple):
    """One request.

    Attributes:
        at_s: when it is sent.
        prompt_tokens: length of its prompt, common prefix included.
        output_tokens: length of its answer.
        prefix: which of the common prefixes it begins with; None: none.
        prefix_tokens: length of that prefix.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    prefix: int | None = None
    prefix_tokens: int = 0


def steady(rate: float, seconds: float, prompt: int, output: int, seed: int) -> list[Ask]:
    """``rate`` requests a second at random moments (Poisson), for ``seconds``; at least one."""
    dice = random.Random(seed)
    asks: list[Ask] = []
    at = dice.expovariate(rate)
    while at < seconds:
        asks.append(Ask(at, prompt, output))
        at += dice.expovariate(rate)
    return asks or [Ask(seconds / 2, prompt, output)]


def at_once(count: int, prompt: int, output: int) -> list[Ask]:
    """All at the first moment: what an engine can do when it never waits for work."""
    return [Ask(0.0, prompt, output)] * count


def ramp(peak: float, seconds: float, prompt: int, output: int, seed: int) -> list[Ask]:
    """From no request to ``peak`` a second and back to none, evenly; half of ``peak`` on average.

    This is the load of the published comparison: the rate goes up and down once per peak.
    """
    dice = random.Random(seed)
    asks = []
    for ask in steady(peak, seconds, prompt, output, seed):
        height = 1.0 - abs(2.0 * ask.at_s / seconds - 1.0)
        if dice.random() < height:
            asks.append(ask)
    return asks or [Ask(seconds / 2, prompt, output)]


def peaks(
    engines: Sequence[str],
    peak: float,
    seconds: float,
    prompt: int,
    output: int,
    seed: int,
    gap_s: float = 0.0,
) -> dict[str, list[Ask]]:
    """A ramp on each engine, one after the other: while one peaks, the others rest. ``gap_s`` after
    each all rest, so that what it left in a queue does not fall into the next one's peak."""
    plan = {}
    for number, engine in enumerate(engines):
        asks = ramp(peak, seconds, prompt, output, seed + number)
        plan[engine] = [ask._replace(at_s=ask.at_s + number * (seconds + gap_s)) for ask in asks]
    return plan


def prefixed(
    asks: Sequence[Ask], prefixes: int, prefix_tokens: int, seed: int, share: float = 1.0
) -> list[Ask]:
    """Let ``share`` of the requests begin with one of ``prefixes`` common prefixes."""
    dice = random.Random(seed)
    chosen = []
    for ask in asks:
        if dice.random() < share:
            which = dice.randrange(prefixes)
            ask = ask._replace(prefix=which, prefix_tokens=prefix_tokens)
            ask = ask._replace(prompt_tokens=max(ask.prompt_tokens, prefix_tokens + 1))
        chosen.append(ask)
    return chosen


def staggered(asks: Sequence[Ask], shortest: int, longest: int, seed: int) -> list[Ask]:
    """Give answers lengths from ``shortest`` to ``longest``, evenly on a logarithmic scale.

    Requests that start together then end one by one, and what they leave is scattered.
    """
    dice = random.Random(seed)
    return [
        ask._replace(output_tokens=round(shortest * (longest / shortest) ** dice.random()))
        for ask in asks
    ]


def prompts(asks: Sequence[Ask], vocabulary: int, seed: int) -> list[list[int]]:
    """Token ids of each request's prompt."""
    dice = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [dice.randrange(10, vocabulary - 10) for _ in range(count)]

    heads: dict[int, list[int]] = {}
    made = []
    for ask in asks:
        head: list[int] = []
        if ask.prefix is not None:
            if ask.prefix not in heads:
                heads[ask.prefix] = tokens(ask.prefix_tokens)
            head = heads[ask.prefix]
        made.append(head + tokens(ask.prompt_tokens - len(head)))
    return made


def ends_s(plan: Mapping[str, Sequence[Ask]]) -> float:
    """When the last request of a plan is sent; 0 of an empty one."""
    return max((ask.at_s for asks in plan.values() for ask in asks), default=0.0)


def peak_bytes(asks: Sequence[Ask], token_bytes: int) -> int:
    """KV bytes of all of them together, prefixes counted for each."""
    return token_bytes * sum(ask.prompt_tokens + ask.output_tokens for ask in asks)
