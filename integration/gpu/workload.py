"""The requests of a run and the comparison of what came out. Standard library only."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
Top = list[tuple[int, float]]


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """Token ids of one request, and per position the engine's best (token, logprob) pairs."""

    tokens: list[int]
    tops: list[Top]


def uniform(count: int, prompt_len: int, max_tokens: int, vocab: int, seed: int) -> list[Request]:
    """Equal lengths, nothing shared: the saturated case."""
    rnd = random.Random(seed)
    return [Request(_ids(rnd, prompt_len, vocab), max_tokens) for _ in range(count)]


def mixed(count: int, longest: int, max_tokens: int, vocab: int, seed: int) -> list[Request]:
    """Lengths spread evenly on a logarithmic scale, no prefix shared."""
    rnd = random.Random(seed)
    return [
        Request(_ids(rnd, _log_uniform(rnd, 16, longest), vocab), rnd.randint(8, max_tokens))
        for _ in range(count)
    ]


def staggered(count: int, longest: int, max_tokens: int, vocab: int, seed: int) -> list[Request]:
    """Two thirds begin with one of eight shared prefixes, so that cached blocks are met again."""
    rnd = random.Random(seed)
    prefixes = [_ids(rnd, rnd.randint(longest // 8, longest // 2), vocab) for _ in range(8)]
    requests = []
    for _ in range(count):
        length = _log_uniform(rnd, 16, longest)
        head = rnd.choice(prefixes)[: max(0, length - 8)] if rnd.random() < 2 / 3 else []
        prompt = head + _ids(rnd, length - len(head), vocab)
        requests.append(Request(prompt, rnd.randint(max_tokens // 8, max_tokens)))
    return requests


def context_pair(length: int, vocab: int, seed: int) -> list[Request]:
    """Two prompts that differ in their first eight tokens only."""
    rnd = random.Random(seed)
    rest = _ids(rnd, length - 8, vocab)
    return [Request(_ids(rnd, 8, vocab) + rest, 16) for _ in range(2)]


def _ids(rnd: random.Random, length: int, vocab: int) -> list[int]:
    return [rnd.randrange(10, vocab - 10) for _ in range(length)]


def _log_uniform(rnd: random.Random, low: int, high: int) -> int:
    return int(low * float(high / low) ** rnd.random())


def digest(answers: list[Answer]) -> str:
    text = json.dumps([answer.tokens for answer in answers])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compare(reference: list[Answer], other: list[Answer], examples: int = 12) -> Json:
    """How two runs of the same requests differ, and whether a near tie explains it.

    A request counts as explained when the other run's token at the first difference is among the
    reference's best few; ``largest_gap`` is then how far below the best it was, in log probability.
    Rounding gives gaps of a few hundredths; wrong KV gives tokens that are not among the best.
    """
    differing, unexplained, gaps = [], 0, []
    for index, (one, two) in enumerate(zip(reference, other, strict=True)):
        if one.tokens == two.tokens:
            continue
        pairs = zip(one.tokens, two.tokens, strict=False)
        shortest = min(len(one.tokens), len(two.tokens))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), shortest)
        gap = _gap(one, two, at)
        if gap is None:
            unexplained += 1
        else:
            gaps.append(gap)
        differing.append({"request": index, "position": at, "gap": gap})
    return {
        "requests": len(reference),
        "identical": len(reference) - len(differing),
        "differing": len(differing),
        "unexplained": unexplained,
        "largest_gap": max(gaps, default=0.0),
        "tokens_compared": sum(len(answer.tokens) for answer in reference),
        "examples": differing[:examples],
    }


def _gap(one: Answer, two: Answer, at: int) -> float | None:
    if at >= len(one.tokens) or at >= len(two.tokens) or at >= len(one.tops):
        return None
    top = dict(one.tops[at])
    if two.tokens[at] not in top:
        return None
    return round(max(top.values()) - top[two.tokens[at]], 5)


def pack(answers: list[Answer]) -> list[Json]:
    return [{"tokens": a.tokens, "tops": a.tops} for a in answers]


def unpack(packed: list[Json]) -> list[Answer]:
    return [Answer(p["tokens"], [[(t, lp) for t, lp in top] for top in p["tops"]]) for p in packed]
