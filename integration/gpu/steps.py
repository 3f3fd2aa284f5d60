"""Where the time of a step goes, in stock and elastic engines: from what ``recorder`` wrote.

A pair of runs on one machine differs by a tenth, so the mean time to first token of a few hundred
requests cannot tell 1.01 from 1.05. The parts of a step are told apart here instead: what is ours
in front of a prompt's first token is counted in itself, and the rest is vLLM's and the device's.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from integration.gpu.record import Json

RECORDER = Path(__file__).resolve().parent / "recorder"
PARTS = ("schedule", "launch", "before", "after", "sample", "results")
"""In milliseconds: the scheduler; the model's launch without ours; ours in front of it, and after
the results of the step before have been told; the launch of sampling without ours; the scheduler
again, with the results."""
QUANTILES = (0.1, 0.5, 0.9)


def environment(path: Path) -> dict[str, str]:
    """For a server whose engine core is to write its steps to ``path``."""
    known = os.environ.get("PYTHONPATH", "")
    return {"KVC_STEPS": str(path), "PYTHONPATH": f"{RECORDER}{os.pathsep}{known}"}


def read(path: Path) -> list[Json]:
    """All steps in their order, in milliseconds; empty if the engine core wrote none."""
    if not path.exists():
        return []
    with path.open() as file:
        return [figures(json.loads(line)) for line in file]


def figures(row: Json) -> Json:
    """One step: when it was scheduled, what it computed, and what each part took."""
    spent = {part: [(b - a) * 1e3 for a, b in row.get(part, [])] for part in PARTS}
    told: Json = {part: sum(values) for part, values in spent.items() if values}
    ours = [*row.get("before", []), *row.get("after", [])]
    for part in ("launch", "sample"):
        for began, ended in row.get(part, []):
            told[part] -= sum((b - a) * 1e3 for a, b in ours if began <= a and b <= ended)
    for name, value in zip(
        ("forward_on_device", "sampling_on_device"), row["device_ms"], strict=False
    ):
        told[name] = value
    first = row["schedule"][0][0]
    told |= {"at": row["at"], "tokens": row["tokens"], "running": row["running"]}
    told["prompts"] = len(row["waited_s"])
    if told["prompts"]:
        told["waited"] = 1e3 * max(row["waited_s"])
        told["in_engine"] = told["waited"] + 1e3 * (row["results"][-1][1] - first)
    return told


def alone(steps: Sequence[Json], prompts: int) -> list[Json]:
    """Steps with so many prompts, after a step that had none."""
    pairs = itertools.pairwise(steps)
    return [step for before, step in pairs if step["prompts"] == prompts and not before["prompts"]]


def within(steps: Iterable[Json], windows: Sequence[tuple[float, float]]) -> list[Json]:
    """Those that began in one of the windows, in epoch seconds."""
    return [step for step in steps if any(a <= step["at"] < b for a, b in windows)]


def spread(steps: Sequence[Json]) -> Json:
    """Of each figure: its mean and some quantiles."""
    names = sorted({name for step in steps for name in step} - {"at", "prompts"})
    told: Json = {"steps": len(steps)}
    for name in names:
        values = sorted(step[name] for step in steps if name in step)
        cuts = [values[int(share * (len(values) - 1))] for share in QUANTILES]
        told[name] = {
            "mean": round(statistics.fmean(values), 4),
            "quantiles": [round(cut, 4) for cut in cuts],
        }
    return told


def means(steps: Sequence[Json]) -> Json:
    """Of each figure its mean: a process has its luck for life."""
    told = spread(steps)
    return {"steps": told.pop("steps")} | {name: of["mean"] for name, of in told.items()}


def compared(
    recorded: Mapping[str, Sequence[Json]], windows: Mapping[str, Sequence[tuple[float, float]]]
) -> Json:
    """Of each arm, for prompts that came alone and for steps without any.

    Args:
        recorded: what each engine wrote.
        windows: when each engine was served, by its name, which begins with that of its arm.
    """
    found: Json = {}
    for arm in ("off", "on"):
        names = [name for name in recorded if name.split("-")[0] == arm]
        each = [within(recorded[name], windows.get(name, ())) for name in names]
        prompts = {name: alone(of, 1) for name, of in zip(names, each, strict=True)}
        found[arm] = {
            "engines": {name: means(of) for name, of in prompts.items() if of},
            "prompt": spread([step for of in prompts.values() for step in of]),
            "decode": spread([step for steps in each for step in alone(steps, 0)]),
        }
    for what in ("prompt", "decode"):
        off, on = found["off"][what], found["on"][what]
        parts = [part for part in PARTS if part in on]
        added = {part: on[part]["mean"] - off.get(part, {"mean": 0.0})["mean"] for part in parts}
        found.setdefault("added_ms", {})[what] = {k: round(v, 4) for k, v in added.items()}
    return found
