"""The tables of the results page that are about memory: how much, how soon, at what cost."""

from __future__ import annotations

from integration.report.files import File, table


def density(file: File) -> list[str]:
    rows = []
    total = file.facts.get("gpu", {}).get("total_gib")
    for crowd in file.data.get("crowds", []):
        last = crowd["waves"][-1] if crowd["waves"] else {}
        light = crowd.get("light_load", {})
        rows.append(
            [
                f"{crowd['model']}, {crowd['arm']}",
                crowd.get("engines", 0),
                crowd.get("stopped_by"),
                would_fit(total, last.get("gib_of_each")),
                crowd["kv_gib_of_each"],
                last.get("gib_of_each"),
                last.get("kv_idle_bytes_most"),
                light.get("completed"),
                light.get("ttft_ms", {}).get("p99"),
            ]
        )
    return table(
        [
            "model, arm",
            "engines",
            "ended by",
            "a whole GPU has room for, computed",
            "KV GiB of each, at most",
            "device GiB of each, idle",
            "KV bytes of an idle one, most",
            "light load: answered",
            "p99 TTFT, ms",
        ],
        rows,
    )


def would_fit(total_gib: float | None, gib_of_each: float | None) -> int | None:
    """How many engines of this size the whole device has room for: computed, none was started."""
    return int(total_gib // gib_of_each) if total_gib and gib_of_each else None


def footprint(file: File) -> list[str]:
    rows = [
        [
            name,
            each.get("live_peak_gib"),
            each.get("under_load"),
            each.get("after_load"),
            (each.get("idle") or {}).get("trimmed", {}).get("used"),
        ]
        for name, each in file.data.get("engines", {}).items()
    ]
    return table(
        [
            "prefix caching",
            "live, most, GiB",
            "committed/packed, under load",
            "after it",
            "GiB idle, cache dropped",
        ],
        rows,
    )


def reclaim(file: File) -> list[str]:
    rows = [
        [
            f"{size}, {peer}",
            each["grant_ms"].get("median"),
            each["grant_ms"].get("max"),
            each["grant_and_commit_ms"].get("median"),
            file.data.get("floor", {}).get(size, {}).get("hand_over_ms", {}).get("median"),
        ]
        for peer, sizes in file.data.get("peers", {}).items()
        for size, each in sizes.items()
    ]
    return table(
        [
            "asked for, peer",
            "to the grant, ms",
            "worst, ms",
            "to committed, ms",
            "the driver's own hand-over, ms",
        ],
        rows,
    )


def vmm_cost(file: File) -> list[str]:
    rows = [
        [
            f"{size}, {how.replace('_', ' ')}",
            each["commit"]["median_ms"],
            each["commit"]["p99_ms"],
            each["release"]["median_ms"],
        ]
        for size, found in file.data["extents"].items()
        for how, each in found.items()
        if "commit" in each
    ]
    goal = file.data["goal"]
    told = f"Goal: at most {goal['commit_ms_at_most']:g} ms with 32 MiB extents; "
    return [
        *table(["extent", "commit 1 GiB, ms", "p99, ms", "release, ms"], rows),
        "",
        f"{told}{'met' if goal['met'] else '**missed**'}.",
    ]


def beside(file: File) -> list[str]:
    rows = [
        [
            f"{size} x {each['extents']}, {what.replace('_', ' ')}",
            each[what].get("call_ms"),
            each[what]["without_ms"],
            each[what]["beside_ms"],
            each[what]["added_ms"],
        ]
        for size, each in file.data["figures"].items()
        for what in ("commit", "release", "commit_elsewhere", "release_elsewhere")
        if what in each
    ]
    head = ["extents", "commit, ms", "while another process releases 1 GiB, ms"]
    contended = [
        [f"{size} x {each['extents']}", *(told["median"] for told in each["contended"].values())]
        for size, each in file.data["figures"].items()
        if "contended" in each
    ]
    reads = [[where, ms] for where, ms in file.data["read_ms"].items()]
    return [
        *table(
            ["extents", "calls, ms", "step, ms", "step beside them, ms", "added, ms"],
            rows,
        ),
        "",
        *([*table(head, contended), ""] if contended else []),
        *table(["a layer of 4,096 blocks, read in random order", "ms"], reads),
    ]
