"""What must be reached on the GPU, against what the files say was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from integration.report.files import SATURATING, File, Files, Pairs, number

NOT_RUN = "not run"


MOST_TTFT = 1.01


@dataclass(frozen=True)
class Found:
    """One measurement of a goal's figure."""

    value: float
    text: str
    met: bool
    file: str


@dataclass(frozen=True)
class Goal:
    """A figure, the best that was published or measured of others, what we want, and where it is
    looked for. Files of several runs all count: the verdict is that of the worst, unless a function
    says otherwise. If only earlier runs missed it, that is said."""

    figure: str
    line: str
    goal: str
    found: Callable[[Files], Iterator[Found]]

    def row(self, files: Files) -> list[str]:
        found = list(self.found(files))
        if not found:
            return [self.figure, self.line, self.goal, NOT_RUN, "", ""]
        measured = "<br>".join(each.text for each in found)
        names = "<br>".join(f"`{name}`" for name in dict.fromkeys(each.file for each in found))
        return [self.figure, self.line, self.goal, measured, verdict(found, files), names]


def verdict(found: Sequence[Found], files: Files) -> str:
    """Whether all runs met a goal, or at least the newest one with each version of an engine."""
    if all(each.met for each in found):
        return "met"
    newest = {}
    for file in files.named(""):
        if any(each.file == file.name for each in found):
            newest[file.engine_version] = file.name
    if all(each.met for each in found if each.file in newest.values()):
        return "met by the newest run, **missed** by earlier ones"
    return "**missed**"


def on_gpu(files: Files, *prefixes: str) -> list[File]:
    """Runs on a CPU through the same code are trials of the code and tell nothing of a GPU."""
    return [file for file in files.named(*prefixes) if file.on_gpu]


def throughput(files: Files) -> Iterator[Found]:
    for file in on_gpu(files, "onoff-saturated", "overhead"):
        if "result" in file.data:
            ratio = file.data["result"]["summary"].get("throughput_on_over_off")
        else:
            told = file.data.get("goals", {}).get("throughput")
            ratio = told and told["on_over_off"]
        if ratio is not None:
            yield Found(ratio, number(ratio), ratio >= 0.995, file.name)


def first_token(files: Files) -> Iterator[Found]:
    """Of an engine that has its memory to itself."""
    for file in on_gpu(files, "paired", "overhead"):
        if file.in_turns:
            continue
        if "summary" in file.data:
            summary = file.data["summary"]
            ratios = [
                each["mean_ttft_ms"] for each in summary["pairs"].values() if "mean_ttft_ms" in each
            ]
            value = summary["on_over_off_of_medians"].get("mean_ttft_ms")
            if value:
                text = number(value)
                if len(ratios) > 1:
                    text += f" ({number(min(ratios))} to {number(max(ratios))})"
                yield Found(value, text, value <= MOST_TTFT, file.name)
        else:
            yield from _all_workloads(file)


def first_token_at_worst(files: Files) -> Iterator[Found]:
    """The same, of the workload in which an engine alone does worst."""
    for file in on_gpu(files, "overhead"):
        if not file.in_turns:
            yield from _worst_workload(file)


def first_token_in_turns(files: Files) -> Iterator[Found]:
    """Of engines that get their memory from the caches of others."""
    for file in on_gpu(files, "overhead"):
        if file.in_turns:
            yield from _worst_workload(file)


def _all_workloads(file: File) -> Iterator[Found]:
    below = _below_saturation(file)
    if below:
        mean = Pairs.over(below.values())
        text = f"{mean} in {len(below)} workload{'s' if len(below) > 1 else ''}{_compiled(file)}"
        yield Found(mean.ratio, text, mean.ratio <= MOST_TTFT, file.name)


def _worst_workload(file: File) -> Iterator[Found]:
    below = _below_saturation(file)
    if below:
        name = max(below, key=lambda each: below[each].ratio)
        ratio = below[name].ratio
        text = f"{below[name]} at {name}{_compiled(file)}"
        yield Found(ratio, text, ratio <= MOST_TTFT, file.name)


def _below_saturation(file: File) -> dict[str, Pairs]:
    pairs = file.pairs("mean_ttft_ms")
    return {name: pair for name, pair in pairs.items() if name not in SATURATING}


def _compiled(file: File) -> str:
    return ", torch.compile" if file.compiles else ""


def best_colocation(files: Files) -> Iterator[Found]:
    """The best of all rates is looked for, and a run may have only some: the verdict is that of the
    best run with the same engine."""
    told = [
        (file, file.data["goals"]) for file in on_gpu(files, "colocation") if file.data.get("goals")
    ]
    reached = {file.engine_version for file, goal in told if goal["best_met"]}
    for file, goal in told:
        value = goal["best_p99_ttft_static_over_ours"]
        text = f"{number(value)}x at {goal['best_at']:g}/s ({file.engine_version})"
        yield Found(value, text, file.engine_version in reached, file.name)


def worst_colocation(files: Files) -> Iterator[Found]:
    for file in on_gpu(files, "colocation"):
        told = file.data.get("goals", {})
        if told and told["worst_p99_ttft_ours_over_static"] is not None:
            value = told["worst_p99_ttft_ours_over_static"]
            text = f"{number(value)} at {told['worst_at']:g}/s ({file.engine_version})"
            yield Found(value, text, told["worst_met"], file.name)


def footprint(files: Files) -> Iterator[Found]:
    for file in on_gpu(files, "footprint"):
        for name, told in file.data.get("goals", {}).items():
            if name.startswith("after_load"):
                text = f"{number(told['ratio'])} ({name.removeprefix('after_load_')})"
                yield Found(told["ratio"], text, told["met"], file.name)


def idle(files: Files) -> Iterator[Found]:
    for file in on_gpu(files, "footprint", "density"):
        goals = file.data.get("goals", {})
        told = [goals["idle_kv_bytes"]] if "idle_kv_bytes" in goals else []
        told += [
            each["bytes"]
            for name, each in goals.items()
            if name.startswith("idle_") and isinstance(each, dict)
        ]
        if told:
            worst = max(told)
            yield Found(worst, f"{worst / 2**20:.1f} MiB", worst <= 32 << 20, file.name)


def wake(shape: str) -> Callable[[Files], Iterator[Found]]:
    def found(files: Files) -> Iterator[Found]:
        for file in on_gpu(files, "activation"):
            told = file.data.get("goals", {})
            if told and file.data.get("shape") == shape:
                value = told["wake_to_first_token_ms"] / 1e3
                yield Found(value, f"{value:.3f} s", told["met"], file.name)

    return found


def reclaim(files: Files) -> Iterator[Found]:
    for file in on_gpu(files, "reclaim"):
        for told in file.data.get("goals", []):
            if told["size"].replace(" ", "") == "8GiB" and told["peer"] == "idle":
                value = told["grant_ms"]
                yield Found(value, f"{number(value)} ms", told["met"], file.name)


GOALS = (
    Goal(
        "saturated throughput, on/off",
        "kvcached 0.98 (measured on an H200, vLLM 0.30.0)",
        "at least 0.995",
        throughput,
    ),
    Goal(
        "mean TTFT below saturation, on/off",
        "kvcached 1.04 to 1.09 (published)",
        "at most 1.01",
        first_token,
    ),
    Goal(
        "the same, the worst workload of a run",
        "",
        "at most 1.01",
        first_token_at_worst,
    ),
    Goal(
        "the same, where memory comes from the caches of others, the worst workload",
        "",
        "at most 1.01",
        first_token_in_turns,
    ),
    Goal(
        "colocation: best ratio of p99 TTFT, static/ours",
        "28x (published, A100-80G)",
        "at least 28x",
        best_colocation,
    ),
    Goal(
        "colocation: worst ratio of p99 TTFT at any rate, ours/static",
        "",
        "at most 1.02",
        worst_colocation,
    ),
    Goal(
        "footprint after load / packed floor",
        "1.4x at best, 4.6x before (published)",
        "at most 1.15",
        footprint,
    ),
    Goal(
        "idle KV bytes of an 8B engine",
        "0.77 to 1.4 GB (published)",
        "at most 32 MiB",
        idle,
    ),
    Goal("wake to first token, 8B", "0.7 s (published)", "at most 0.5 s", wake("8b")),
    Goal("wake to first token, 70B fp8", "1.5 s (published)", "at most 1.5 s", wake("70b-fp8")),
    Goal(
        "8 GiB from an idle neighbour's cache, request to grant",
        "not possible",
        "at most 50 ms",
        reclaim,
    ),
)
