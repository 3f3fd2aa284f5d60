"""The results page as text."""

from __future__ import annotations

from collections.abc import Callable

from integration.report.files import File, Files, table
from integration.report.goals import GOALS, NOT_RUN
from integration.report.plots import picture
from integration.report.sections import SECTIONS

NAME = "RESULTS.md"
HEAD = """# Results

Made by `python -m integration.report` from the JSON files beside it; do not edit. Every figure is a
ratio or a time of one run on one machine; compare figures within one file only. Lines to beat are
what others published, or what was measured of them on the same GPU, as each says. A goal with
several runs is met only if all of them meet it; where only earlier ones missed it, that is said.
"""
RERUN = """## How to run it again

On a machine with an NVIDIA H100 or H200: `make bench-gpu`, or one program at a time, as
[`../gpu/README.md`](../gpu/README.md) says. Without a GPU: `make bench`. Then copy the JSON files
here and run `python -m integration.report`, which writes this page and its pictures anew. The
command of each run is in the last table.
"""


def page(files: Files) -> str:
    """All of it."""
    parts = [HEAD, "## Goals on the GPU\n", *goals(files), "", RERUN]
    parts += ["## Runs on a GPU\n"]
    for prefix, (title, render) in SECTIONS.items():
        parts += section(title, files.named(prefix), prefix, render)
    parts += ["## Without a GPU\n", *without_gpu(files), ""]
    parts += ["## Where each figure comes from\n", *provenance(files), ""]
    return "\n".join(parts)


def goals(files: Files) -> list[str]:
    head = ["figure", "line to beat", "goal", "measured", "verdict", "file"]
    return table(head, [goal.row(files) for goal in GOALS])


def section(
    title: str, found: list[File], prefix: str, render: Callable[[File], list[str]]
) -> list[str]:
    lines = [f"### {title}\n"]
    if not found:
        return [*lines, f"{NOT_RUN.capitalize()}: there is no `{prefix}-*.json`.\n"]
    for file in found:
        commit = f"commit `{file.commit}`" if file.commit else ""
        where = ", ".join(filter(None, (file.engine_version, file.device, file.date, commit)))
        lines += [f"`{file.name}`: {where}.\n", *render(file), ""]
        if notes := file.data.get("notes"):
            lines += [
                "What went otherwise than it should:",
                "",
                *(f"- {each}" for each in notes),
                "",
            ]
        if name := picture(file):
            lines += [f"![{title}: {file.name}]({name})", ""]
    return lines


def without_gpu(files: Files) -> list[str]:
    """The benchmarks of one machine without a GPU, each against its own goal."""
    parts = (churn, held_after_load, pool, ledger, storm, growth, first_prompt, hand_over, soak)
    rows = [row for part in parts for row in part(files)]
    return table(["figure", "measured", "goal", "verdict", "file"], rows)


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def churn(files: Files) -> list[list[object]]:
    file = files.one("bench-churn.json")
    if file is None:
        return []
    goal = file.data["goal"]
    return [
        [
            f"committed/live, simulated, {each['scenario']['name']}",
            each["committed_over_live"],
            f"at most {goal}",
            verdict(each["committed_over_live"] <= goal),
            f"`{file.name}`",
        ]
        for each in file.data["figures"]
    ]


def held_after_load(files: Files) -> list[list[object]]:
    file = files.one("bench-tail.json")
    if file is None:
        return []
    goal, found = file.data["goal"], file.data["after_load"]
    label = "committed/live after a load, vLLM's scheduler, no prefix cache"
    return [[label, found, f"at most {goal}", verdict(found <= goal), f"`{file.name}`"]]


def pool(files: Files) -> list[list[object]]:
    file = files.one("bench-pool.json")
    if file is None:
        return []
    goal = file.data["goal"]
    return [
        [
            f"block pool over vLLM's, {each['trace']}, caching {'on' if caching else 'off'}",
            each["ratio"],
            f"at most {goal}",
            verdict(each["ratio"] <= goal),
            f"`{file.name}`",
        ]
        for each in file.data["figures"]
        for caching in [each["prefix_caching"]]
    ]


def ledger(files: Files) -> list[list[object]]:
    file = files.one("bench-ledger.json")
    if file is None:
        return []
    rows: list[list[object]] = []
    data = file.data
    for each in data["figures"]:
        contends = each["contending_processes"] > 1
        if each["operation"] == "reserve + cancel":
            which, limit = (
                ("p99_us", data["goal_contended_p99_us"])
                if contends
                else ("median_us", data["goal_us"])
            )
        elif each["operation"] == "kill to a peer's grant":
            which, limit = "median_us", data["goal_inherited_us"]
        else:
            continue
        who = f"{each['contending_processes']} contend" if contends else "alone"
        rows.append(
            [
                f"ledger: {each['operation']}, {each['accounts']} accounts, {who}, {which[:-3]}",
                f"{each[which]:,} us",
                f"at most {limit:g} us",
                verdict(each[which] <= limit),
                f"`{file.name}`",
            ]
        )
    return rows


def storm(files: Files) -> list[list[object]]:
    file = files.one("bench-ledger-storm.json")
    if file is None:
        return []
    parts = file.data["by_budget"].values()
    over = sum(each["over_committed_bytes"] for each in parts)
    kills = sum(each["kills"] for each in parts)
    operations = sum(each["operations"] for each in parts)
    figure = f"ledger: bytes over the budget, {operations:,} operations, {kills:,} kills"
    return [[figure, over, "0", verdict(file.data["passed"]), f"`{file.name}`"]]


def growth(files: Files) -> list[list[object]]:
    rows: list[list[object]] = []
    for file in files.named("bench-growth"):
        ours, stock = file.data["elastic"], file.data["static"]
        told = f"{ours['preempted']} of {ours['requests']} requests; with a third of the memory "
        told += f"and no neighbours {stock['preempted']}"
        figure = f"preempted while growing into two caches, scheduler only, commit `{file.commit}`"
        rows.append([figure, told, "0", verdict(not ours["preempted"]), f"`{file.name}`"])
    return rows


def first_prompt(files: Files) -> list[list[object]]:
    rows: list[list[object]] = []
    for file in files.named("bench-first-prompt"):
        goal = file.data["goal_ms"]
        for each in file.data["figures"]:
            figure = (
                "a prompt of 1,024 tokens waits for the cache of engines that rest, whose device "
            )
            figure += f"is {each['late_ms']:g} ms late, scheduler only, commit `{file.commit}`"
            told = f"{each['median_ms']:.1f} ms, at most {each['longest_ms']:.1f} ms"
            met = each["median_ms"] <= goal
            rows.append([figure, told, f"median {goal:g} ms", verdict(met), f"`{file.name}`"])
    return rows


def hand_over(files: Files) -> list[list[object]]:
    rows: list[list[object]] = []
    for name, where in (
        ("bench-reclaim.json", ""),
        ("bench-reclaim-noisy.json", ", a first run when the machine was busier"),
        ("bench-reclaim-one-process.json", ", its worker in the engine core's process"),
    ):
        file = files.one(name)
        told = file.data if file else {"figures": []}
        figures = told["figures"]
        kernel = min((each["median_kernel_seconds"] for each in figures), default=0.0)
        for each in figures:
            step = each["step_seconds"]
            rows.append(
                [
                    f"1 GiB from the cache of a peer that is {each['peer']}{where}, host memory",
                    f"{1e3 * each['median_seconds']:.0f} ms",
                    f"the kernel's own {1e3 * kernel:.0f} ms"
                    + (f", a step of {1e3 * step:.0f} ms" if step else "")
                    + ", and 10 ms",
                    verdict(each["peer"] not in told["missed"]),
                    f"`{name}`",
                ]
            )
    return rows


def soak(files: Files) -> list[list[object]]:
    rows: list[list[object]] = []
    for file in files.named("soak"):
        found = file.data["findings"]
        grown = "; ".join(found["grown"])
        told = f"{found['completed']:,} requests, {len(found['different'])} with other tokens"
        if grown:
            told += f"; grown: {grown}"
        setup = file.data["setup"]
        who = f"{setup['engines']} engine{'s' if setup['engines'] > 1 else ''}"
        if setup.get("stock"):
            who += ", stock vLLM"
        if setup.get("control"):
            who += " beside a stock one"
        figure = f"soak, {setup['minutes']:g} min, {who}"
        rows.append(
            [
                figure,
                told,
                "nothing differs or grows",
                verdict(file.data["passed"]),
                f"`{file.name}`",
            ]
        )
    return rows


def provenance(files: Files) -> list[str]:
    head = ["file", "command", "machine", "versions", "date", "commit"]
    return table(
        head,
        [
            [
                f"[`{file.name}`]({file.name})",
                f"`{file.command}`" if file.command else None,
                file.device or None,
                file.versions or None,
                file.date or None,
                f"`{file.commit}`" if file.commit else None,
            ]
            for file in files.all
        ],
    )
