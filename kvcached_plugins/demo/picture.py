"""The timeline: what both engines hold, elastic above, the static split below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcached_plugins.demo.load import Burst
from kvcached_plugins.demo.session import Outcome
from kvcached_vmm.units import GIB, MIB, format_size

COLOURS = ("#1f77b4", "#d95f02")


def can_draw() -> bool:
    """True where matplotlib is installed; the demo does without a picture elsewhere."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(
    path: Path,
    outcomes: Sequence[Outcome],
    bursts: Sequence[Burst],
    budget_bytes: int,
    caption: str,
) -> None:
    """Write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6 * len(outcomes) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(outcomes), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, outcome in zip(panels, outcomes, strict=True):
        _panel(panel, outcome, bursts, budget_bytes)
    panels[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    panels[-1].set_xlabel("seconds")
    figure.suptitle(caption, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _panel(panel: Any, outcome: Outcome, bursts: Sequence[Burst], budget_bytes: int) -> None:
    unit, unit_name = (GIB, "GiB") if budget_bytes >= 2 * GIB else (MIB, "MiB")
    times = [sample.at_s for sample in outcome.samples]
    below = [0.0] * len(times)
    for index, name in enumerate(outcome.engines):
        held = [sample.engines[index].held_bytes / unit for sample in outcome.samples]
        live = [sample.engines[index].live_bytes / unit for sample in outcome.samples]
        top = [a + b for a, b in zip(below, held, strict=True)]
        used = [a + b for a, b in zip(below, live, strict=True)]
        colour = COLOURS[index % len(COLOURS)]
        panel.fill_between(times, below, top, color=colour, alpha=0.25, lw=0, label=f"{name} holds")
        panel.fill_between(times, below, used, color=colour, alpha=0.85, lw=0, label=f"{name} uses")
        panel.plot(times, top, color=colour, lw=0.8)
        below = top
    panel.axhline(budget_bytes / unit, color="black", ls="--", lw=0.9, label="budget")
    for index, burst in enumerate(bursts):
        colour = COLOURS[burst.engine % len(COLOURS)]
        done = [reply.done_s for reply in outcome.replies if reply.burst == index]
        panel.axvline(burst.at_s, color=colour, lw=0.8, ls=":")
        if done:
            panel.hlines(
                budget_bytes / unit * (1.10 + 0.05 * (burst.engine % 2)),
                burst.at_s,
                max(done),
                color=colour,
                lw=3,
                label="burst, until its last token" if index == 0 else None,
            )
    title = {"elastic": "elastic: one budget for both", "static": "static: half of it each"}
    panel.set_title(title.get(outcome.mode, outcome.mode), loc="left", fontsize=10)
    panel.set_ylabel(f"KV memory, {unit_name}")
    panel.set_ylim(0, budget_bytes / unit * 1.22)
    panel.spines[["top", "right"]].set_visible(False)


def caption(device: str, budget_bytes: int, requests: int) -> str:
    return (
        f"Two models on {device}, {format_size(budget_bytes)} of KV memory in all;"
        f" bursts of {requests} requests in turn"
    )
