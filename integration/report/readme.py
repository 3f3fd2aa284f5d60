"""The rows of the README's table of GPU figures, as the files have them.

A test compares them with the README, so that no figure there is older than its file.
"""

from __future__ import annotations

from integration.report.files import File, Files

SATURATED = "onoff-saturated-h200.json"
PAIRED = "paired-half-load-h200.json"
COST = "vmm-cost-h200.json"
TOKENS = "tokens-h200.json"


def rows(files: Files) -> list[str]:
    """Each row, as Markdown."""
    held = {file.name: file for file in files.all}
    return [
        *_saturated(held[SATURATED]),
        *_half_load(held[PAIRED]),
        _commit(held[COST]),
        _tokens(held[TOKENS], held[PAIRED], held["onoff-preemption-h200.json"]),
    ]


def _saturated(file: File) -> list[str]:
    summary = file.data["result"]["summary"]
    off, on = (summary["median"][kind] for kind in ("off", "on"))
    ratio = summary["throughput_on_over_off"]
    stock, ours = (summary["arms"][name]["gib"] for name in ("A0-off", "A1-on"))
    memory = [
        f"{each['after_start']:.1f} / {each['cache_dropped']:.1f} GiB" for each in (stock, ours)
    ]
    return [
        "| output tokens/s, saturated, 256 x (1024 + 256), 48 GiB of KV "
        f"| {off:,.0f} | {on:,.0f} ({ratio:.3f}) | `{SATURATED}` |",
        f"| GPU memory after start / after load, cache dropped | {' | '.join(memory)} | same |",
    ]


def _half_load(file: File) -> list[str]:
    summary, runs = file.data["summary"], file.data["runs"]

    def row(label: str, off: dict[str, float], on: dict[str, float], where: str) -> str:
        keys = ("mean_ttft_ms", "mean_tpot_ms")
        stock, ours = (f"{each[keys[0]]:.1f} / {each[keys[1]]:.2f} ms" for each in (off, on))
        ratio = " / ".join(f"{on[key] / off[key]:.2f}" for key in keys)
        return f"| {label} | {stock} | {ours} ({ratio}) | {where} |"

    median = summary["median"]
    return [
        row(
            "half load, 11 req/s, 30 GiB of KV: mean TTFT / TPOT",
            median["off"],
            median["on"],
            f"`{PAIRED}`",
        ),
        row("same, while KV grows by 24 GiB", runs["1-off"], runs["1-on"], "same"),
        row("same, once the memory is there", runs["2-off"], runs["2-on"], "same"),
    ]


def _commit(file: File) -> str:
    def median_ms(size: str, how: str) -> float:
        return float(file.data["extents"][size][how]["commit"]["median_ms"])

    low, high = sorted(median_ms("16MiB", how) for how in ("one_call", "a_call_per_extent"))
    figure = f"{low:.1f} to {high:.1f} / {median_ms('32MiB', 'one_call'):.1f} ms"
    return f"| committing 1 GiB, extents of 16 / 32 MiB | \N{EN DASH} | {figure} | `{COST}` |"


def _tokens(file: File, paired: File, preempted: File) -> str:
    eager = [each for each in file.data["rows"] if each["compared"].startswith("eager")]
    graphs = [paired.data["tokens"][f"off/on:{part}"] for part in ("alone", "concurrent")]
    summary = preempted.data["result"]["summary"]
    both = summary["C-bi-off/C-bi-on"]
    preemptions = summary["arms"]["C-bi-on"]["counters"]["vllm:num_preemptions"]
    told = [
        f"{sum(each['identical'] for each in part)} of {sum(each['requests'] for each in part)}"
        for part in (eager, graphs, [both])
    ]
    return (
        f"| greedy tokens, same kernels: eager; CUDA graphs; {preemptions} preemptions | "
        f"| identical: {'; '.join(told)} | `{TOKENS}`, `{PAIRED}` |"
    )
