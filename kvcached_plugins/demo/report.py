"""Figures of a measurement, side by side: a table for people, JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from rich.table import Table

from kvcached_plugins.demo.load import Burst
from kvcached_plugins.demo.session import Outcome
from kvcached_vmm.units import format_size


@dataclass(frozen=True)
class Figures:
    """What is compared. Times are in seconds, from the moment that a burst was due."""

    burst_done_s: list[float]
    burst_done_mean_s: float
    ttft_mean_s: float
    ttft_p99_s: float
    output_tokens: int
    output_tokens_per_s: float
    preemptions: int
    failed: int
    held_peak_bytes: int
    held_peak_of_one_bytes: int
    held_mean_bytes: int
    held_before_bytes: int
    held_last_bytes: int


def failed(outcome: Outcome) -> list[str]:
    """What the requests that failed came back with."""
    return [reply.error for reply in outcome.replies if reply.error is not None]


def figures(outcome: Outcome, bursts: Sequence[Burst]) -> Figures:
    good = [reply for reply in outcome.replies if reply.error is None]
    done = [
        max((reply.done_s for reply in good if reply.burst == index), default=math.nan) - burst.at_s
        for index, burst in enumerate(bursts)
    ]
    ttft = sorted(reply.ttft_s for reply in good) or [math.nan]
    tokens = sum(reply.tokens for reply in good)
    first_due_s = min(burst.at_s for burst in bursts)
    spent_s = max((reply.done_s for reply in good), default=math.nan) - first_due_s
    held = [sample.held_bytes for sample in outcome.samples]
    before = [sample.held_bytes for sample in outcome.samples if sample.at_s < first_due_s] or held
    return Figures(
        burst_done_s=[round(value, 2) for value in done],
        burst_done_mean_s=round(mean(done), 3),
        ttft_mean_s=round(mean(ttft), 3),
        ttft_p99_s=round(ttft[math.ceil(0.99 * len(ttft)) - 1], 3),
        output_tokens=tokens,
        output_tokens_per_s=round(tokens / spent_s, 3),
        preemptions=sum(outcome.preemptions),
        failed=len(failed(outcome)),
        held_peak_bytes=max(held),
        held_peak_of_one_bytes=max(
            engine.held_bytes for sample in outcome.samples for engine in sample.engines
        ),
        held_mean_bytes=round(mean(held)),
        held_before_bytes=before[-1],
        held_last_bytes=held[-1],
    )


def comparison(elastic: Figures, static: Figures) -> Table:
    """The table at the end. The last column says who is better, whoever that is."""
    table = Table(title="One budget for both, against half of it each", title_justify="left")
    table.add_column("")
    for heading in ("elastic", "static split", "elastic is"):
        table.add_column(heading, justify="right")

    def seconds(label: str, ours: float, theirs: float) -> None:
        table.add_row(label, f"{ours:.2f} s", f"{theirs:.2f} s", _verdict(theirs, ours, "faster"))

    def memory(label: str, ours: int, theirs: int) -> None:
        table.add_row(label, format_size(ours), format_size(theirs), "")

    pairs = zip(elastic.burst_done_s, static.burst_done_s, strict=True)
    for index, (ours, theirs) in enumerate(pairs):
        seconds(f"burst {index + 1} (model {'AB'[index % 2]}) done after", ours, theirs)
    seconds("a burst done after, mean", elastic.burst_done_mean_s, static.burst_done_mean_s)
    seconds("time to first token, mean", elastic.ttft_mean_s, static.ttft_mean_s)
    seconds("time to first token, p99", elastic.ttft_p99_s, static.ttft_p99_s)
    table.add_row(
        "output tokens per second",
        f"{elastic.output_tokens_per_s:.0f}",
        f"{static.output_tokens_per_s:.0f}",
        _verdict(elastic.output_tokens_per_s, static.output_tokens_per_s, "more"),
    )
    table.add_row("preemptions", str(elastic.preemptions), str(static.preemptions), "")
    table.add_row("failed requests", str(elastic.failed), str(static.failed), "")
    memory("KV memory, idle before", elastic.held_before_bytes, static.held_before_bytes)
    memory("KV memory, mean", elastic.held_mean_bytes, static.held_mean_bytes)
    memory("KV memory, peak of one", elastic.held_peak_of_one_bytes, static.held_peak_of_one_bytes)
    memory("KV memory, peak of both", elastic.held_peak_bytes, static.held_peak_bytes)
    memory("KV memory, idle after", elastic.held_last_bytes, static.held_last_bytes)
    return table


def as_json(
    setup: dict[str, Any], bursts: Sequence[Burst], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Everything measured, so that a picture or a figure can be made again from it."""
    return {
        "setup": setup,
        "bursts": [burst._asdict() for burst in bursts],
        **{
            outcome.mode: {
                # Times of a run in which requests failed would compare unlike things.
                "figures": asdict(figures(outcome, bursts)) if not failed(outcome) else None,
                "preemptions": outcome.preemptions,
                "samples": [
                    [round(sample.at_s, 2), *(list(engine) for engine in sample.engines)]
                    for sample in outcome.samples
                ],
                "sample_fields": ["at_s", "per engine: held, live, cached, running, waiting"],
                "errors": sorted(set(failed(outcome))),
            }
            for outcome in outcomes
        },
    }


def _verdict(larger: float, smaller: float, word: str) -> str:
    """How many times better, with the opposite word when it is worse, and neither within 3 %."""
    if not larger > 0 or not smaller > 0:
        return ""
    ratio = larger / smaller
    if 1 / 1.03 <= ratio <= 1.03:
        return "equal"
    if ratio >= 1:
        return f"[green]{ratio:.2f}x {word}[/]"
    return f"[red]{1 / ratio:.2f}x {'slower' if word == 'faster' else 'less'}[/]"
