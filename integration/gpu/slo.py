"""What a load was served like, and until which rate that is good enough. Pure.

A service level is a bound on the time to the first token and one on the mean time between tokens,
for each request; a rate is within it when a share of its requests is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from integration.gpu.bursts import Json, Reply, spread_ms

CUT_OFF = "cut off"
"""The error of a request that was still running when its load was called off."""


@dataclass(frozen=True)
class Slo:
    """Seconds to the first token and between tokens, and the share of requests within both."""

    ttft_s: float
    tpot_s: float
    share: float = 0.99

    def holds(self, reply: Reply) -> bool:
        """Whether this request was served within the bounds; one that failed was not."""
        if reply.error is not None:
            return False
        return reply.first_s <= self.ttft_s and between_s(reply) <= self.tpot_s

    def describe(self) -> Json:
        return {
            "ttft_ms_at_most": round(1e3 * self.ttft_s, 3),
            "tpot_ms_at_most": round(1e3 * self.tpot_s, 3),
            "share_at_least": self.share,
        }


def between_s(reply: Reply) -> float:
    """Mean seconds between its tokens; 0 where there is but one."""
    return sum(reply.gaps_s) / (reply.tokens - 1) if reply.tokens > 1 else 0.0


def served(replies: Sequence[Reply], asked: int, slo: Slo, began: float, until: float) -> Json:
    """Figures of one load on one engine, or on several together.

    A request that was cut off before its first token has waited at least until ``until``, and that
    wait counts in ``ttft_ms``: leaving it out would flatter who serves least. How many such lower
    bounds there are is in ``ttft_lower_bounds``.
    """
    whole = [reply for reply in replies if reply.error is None]
    cut = [reply for reply in replies if reply.error == CUT_OFF]
    errors = [reply.error for reply in replies if reply.error not in (None, CUT_OFF)]
    unseen = [until - reply.started for reply in cut if not reply.first_s]
    firsts = [reply.first_s for reply in whole + cut if reply.first_s] + unseen
    took_s = max((reply.ended for reply in whole), default=began) - began
    return {
        "requests": asked,
        "completed": len(whole),
        "cut_off": len(cut),
        "failed": asked - len(whole) - len(cut),
        "errors": errors[:3],
        "within_slo": sum(map(slo.holds, whole)),
        "duration_s": round(took_s, 3),
        "ttft_ms": spread_ms(firsts),
        "ttft_lower_bounds": len(unseen),
        "tpot_ms": spread_ms(between_s(reply) for reply in whole if reply.tokens > 1),
        "output_tokens_per_s": (
            round(sum(reply.tokens for reply in whole) / took_s, 1) if took_s else None
        ),
    }


class Point(NamedTuple):
    """One rate of a sweep: of ``requests``, so many were within the service level."""

    rate: float
    requests: int
    within: int


def leaves(points: Iterable[Point], share: float) -> Json:
    """Between which rates an arm leaves its service level.

    Rates count from below: the first that is not within ends it, whatever comes above. ``holds_to``
    is None if no rate held, ``fails_from`` if all did, which says that the sweep was too short.
    """
    holds_to = fails_from = None
    for point in sorted(points):
        if point.requests and point.within >= share * point.requests:
            holds_to = point.rate
        else:
            fails_from = point.rate
            break
    return {"holds_to": holds_to, "fails_from": fails_from}


def saturated(found: Json, factor: float, slo: Slo) -> bool:
    """Whether a higher rate would tell nothing more: TTFT is ``factor`` beyond the bound, on
    average, or a tenth of the requests was cut off."""
    mean = found["ttft_ms"].get("mean", 0.0)
    return bool(
        mean > factor * 1e3 * slo.ttft_s or found["cut_off"] > 0.1 * max(1, found["requests"])
    )


def sweep_order(rates: Sequence[float]) -> list[float]:
    """Rates in order of worth, for a sweep that may be cut short: the middle, then the ends, then
    what halves the gaps. A sweep that ends early is then coarse and not one-sided."""
    ordered = sorted(set(rates))
    if len(ordered) < 3:
        return ordered
    middle = ordered[len(ordered) // 2]
    order = [middle, ordered[-1], ordered[0]]
    while left := [rate for rate in ordered if rate not in order]:
        order.append(max(left, key=lambda rate: (min(abs(rate - one) for one in order), -rate)))
    return order
