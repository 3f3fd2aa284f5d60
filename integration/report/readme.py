"""The rows of the README's tables of GPU figures, as the files have them.

A test compares them with the README, so that no figure there is older than its file.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from integration.report.files import File, Files, Pairs

SATURATED = "onoff-saturated-h200.json"
TOKENS = "tokens-h200.json"
GRAPH_TOKENS = "paired-half-load-h200.json"
PREEMPTED = "onoff-preemption-h200.json"
PAIRED = "paired-half-load-h100.json"
COST = "vmm-cost-h100.json"
SGLANG = "sglang-h100.json"
RECLAIM = "reclaim-h100.json"
NEIGHBOURS = "neighbours-h100.json"
MIXED = "neighbours-sglang-h100.json"
AWAKE = "activation-h100.json"
COLOCATED = "colocation-vllm-0.30.0-h200.json"
COLOCATED_NEW = "colocation-vllm-0.33.0-h200.json"
COLOCATED_AGAIN = "colocation-vllm-0.30.0-h200-20261129175640.json"
COMPILED = (
    ("colocation-vllm-0.33.0-h200-20261130081402.json", "4"),
    ("colocation-vllm-0.33.0-h200-20261130054322.json", "6"),
    ("colocation-vllm-0.33.0-h200-20261130023216.json", "8"),
    ("colocation-vllm-0.30.0-h200-20261130023223.json", "6"),
)
"""The newest run of each rate that has a static split too; RESULTS.md has all."""
OVERHEAD = "overhead-h200.json"
ALONE_NOW = (
    "overhead-alone-h200-20261130053435.json",
    "overhead-alone-h200-20261130053434.json",
    "overhead-alone-h200-20261130080519.json",
)
ALONE = (
    "overhead-alone-h200.json",
    "overhead-alone-h200-20261129233616-2.json",
    "overhead-alone-h200-20261130022315.json",
    "overhead-alone-h200-20261130050447.json",
)
TURNS = (
    "overhead-turns-h200-20261129200546.json",
    "overhead-turns-h200-20261129231421.json",
    "overhead-turns-h200-20261130022315.json",
    "overhead-turns-h200-20261130030556.json",
    "overhead-turns-h200-20261130050447.json",
)
TURNS_NOW = ("overhead-turns-h200-20261130082047.json",)
UNCOMPILED_TURNS = ("overhead-turns-h200-20261129175639.json",)
BUSY = "overhead-alone-h200-20261129233616.json"
DENSE = "density-h200-20261129233102.json"
FOOTPRINT = "footprint-h200-20261130021759.json"
LARGE = "activation-70b-fp8-h200.json"
GROWTH = "bench-growth.json"
NONE = "\N{EN DASH}"


_MEANS = ("mean_ttft_ms", "mean_tpot_ms")


def tables(files: Files) -> dict[str, list[str]]:
    """The rows of each table, as Markdown, by how its head begins."""
    held = {file.name: file for file in files.all}
    return {
        "| NVIDIA H100": [
            _half_load(held[PAIRED]),
            *_sglang(held[SGLANG]),
            _awake(held[AWAKE]),
            _reclaim(held[RECLAIM]),
            _burst(held[NEIGHBOURS], "two vLLM, 24 GiB of KV between them: a burst on one"),
            _burst(held[MIXED], "a vLLM and an SGLang, 24 GiB between them: a burst on one"),
            _commit(held[COST]),
        ],
        "| NVIDIA H200": [
            *_saturated(held[SATURATED]),
            _throughput(held[BUSY]),
            _dense(held[DENSE]),
            _footprint(held[FOOTPRINT]),
            _awake(held[LARGE], ", 70B shape in fp8"),
            _tokens(held[TOKENS], held[GRAPH_TOKENS], held[PREEMPTED]),
            _overhead(held[OVERHEAD]),
            *(
                _pairs([held[name] for name in names])
                for names in (ALONE_NOW, ALONE, TURNS_NOW, TURNS, UNCOMPILED_TURNS)
            ),
        ],
        "| Three Llama-3.1-8B": [
            row
            for name in (COLOCATED, COLOCATED_AGAIN, COLOCATED_NEW)
            for row in _colocated(held[name])
        ]
        + [row for name, *rates in COMPILED for row in _colocated(held[name], rates)],
        "| An engine that grows": [_growth(held[GROWTH])],
    }


def _row(label: str, stock: str, ours: str, name: str) -> str:
    where = name if name == "same" else f"`{name}`"
    return f"| {label} | {stock} | {ours} | {where} |"


def _half_load(file: File) -> str:
    median = file.data["summary"]["median"]
    stock, ours = (
        f"{median[arm][_MEANS[0]]:.1f} / {median[arm][_MEANS[1]]:.2f} ms" for arm in ("off", "on")
    )
    ratio = " / ".join(f"{median['on'][key] / median['off'][key]:.2f}" for key in _MEANS)
    pairs = sum(name.isdigit() for name in file.data["summary"]["pairs"])
    label = f"half load, 11 req/s, KV grows from nothing in each of {pairs} runs: mean TTFT / TPOT"
    return _row(label, stock, f"{ours} ({ratio})", PAIRED)


def _sglang(file: File) -> list[str]:
    arms, told = file.data["arms"], file.data["compared"]

    def rate(arm: str) -> float:
        return statistics.median(
            each["output_tokens_per_s"]
            for name, each in arms[arm].items()
            if name.startswith("saturated")
        )

    def half(arm: str) -> str:
        ttft, tpot = (arms[arm]["half"][what]["mean"] for what in ("ttft_ms", "tpot_ms"))
        return f"{ttft:.1f} / {tpot:.2f} ms"

    off, on = rate("off"), rate("on")
    ratios = f"{told['ttft_ms_mean']:.2f} / {told['tpot_ms_mean']:.2f}"
    memory = [f"{arms[arm]['memory_gib']['started']['last']:.1f} GiB" for arm in ("off", "on")]
    return [
        _row(
            "SGLang 0.5.17, output tokens/s, saturated, 256 x (1024 + 256)",
            f"{off:,.0f}",
            f"{on:,.0f} ({on / off:.3f})",
            SGLANG,
        ),
        _row("same, half load: mean TTFT / TPOT", half("off"), f"{half('on')} ({ratios})", "same"),
        _row("same, GPU memory after start", *memory, "same"),
        _row(
            "same, greedy tokens",
            "",
            f"identical: {told['equal_answers']} of {told['answers']}",
            "same",
        ),
    ]


def _awake(file: File, of: str = "") -> str:
    stock, ours = (
        f"{file.data['arms'][kind]['wake_to_first_token_ms']['median']:.0f} ms"
        for kind in ("static", "ours")
    )
    return _row(f"vLLM's sleep mode{of}: wake to first token", stock, ours, file.name)


def _reclaim(file: File) -> str:
    def grant(peer: str, size: str) -> str:
        return f"{file.data['peers'][peer][size]['grant_ms']['median']:.1f}"

    figures = f"{grant('idle', '1 GiB')} / {grant('idle', '8 GiB')} ms"
    ours = f"{figures}; {grant('busy', '1 GiB')} / {grant('busy', '8 GiB')} ms"
    label = "1 / 8 GiB that an idle neighbour holds as prefix cache, to the grant; a serving one"
    return _row(label, NONE, ours, RECLAIM)


def _burst(file: File, label: str) -> str:
    """Bursts on one engine while the other rests; the first of each, and those after."""
    arms = file.data["arms"]

    def times(arm: str) -> tuple[list[float], list[float]]:
        phases = arms[arm]["phases"].values()
        alone = [each["engines"] for each in phases if len(each["engines"]) == 1]
        bursts = [each for engines in alone for each in engines.values()]
        return [each["ttft_ms"]["mean"] for each in bursts], [each["duration_s"] for each in bursts]

    cells = []
    for arm in ("static", "elastic"):
        ttft, took = times(arm)
        cells.append(f"{statistics.fmean(ttft) / 1e3:.2f} / {statistics.fmean(took):.1f} s")
    told = f"{label} (mean TTFT / done after), halves against one budget"
    return _row(told, *cells, file.name)


def _colocated(file: File, rates: Sequence[str] = ()) -> list[str]:
    """TTFT of each arm by rate, all or ``rates``; that of an arm that did not run is left out."""
    arms, version = file.data["arms"], file.facts["versions"]["vllm"]
    rows = []
    for rate in sorted(rates or arms["ours"]["rates"], key=float):
        cells = []
        for kind in ("static", "kvcached", "ours"):
            found = arms.get(kind, {"rates": {}})["rates"].get(rate)
            if found is None:
                cells.append(NONE)
                continue
            ttft = [found["ttft_ms"][what] / 1e3 for what in ("mean", "p99")]
            share = 100 * found["within_slo"] / found["requests"]
            cells.append(f"{ttft[0]:.2f} / {ttft[1]:.2f} s; {share:.0f} %")
        compared = file.data["ratios"].get("static_over_ours", {}).get(rate)
        ratio = _times(compared["p99_ttft_ms"]) if compared else NONE
        started = ", `torch.compile`" if file.compiles else ""
        what = f"peaks of {rate} requests/s, vLLM {version}{started}"
        rows.append(f"| {what} | {' | '.join(cells)} | {ratio} | `{file.name}` |")
    return rows


def _overhead(file: File) -> str:
    """One engine that has the device to itself: the least and the most of all workloads."""
    works = [each["on_over_off"] for each in file.data["workloads"].values()]

    def spread(name: str) -> str:
        values = sorted(each[name] for each in works)
        return f"{values[0]:.2f} to {values[-1]:.2f}, median {statistics.median(values):.2f}"

    told = f"TTFT {spread('mean_ttft_ms')}; TPOT {spread('mean_tpot_ms')}"
    label = f"{len(works)} workloads one after the other, 1 to 2 rounds, a noisy machine: means"
    return _row(label, "1", told, file.name)


def _pairs(files: Sequence[File]) -> str:
    """Pairs of runs on stock and elastic engines, each alone, or elastic ones that take turns."""
    ttft, tpot = (_pooled(files, key) for key in _MEANS)
    first = files[0]
    version = first.facts["versions"]["vllm"]
    started = "as it starts by itself" if first.compiles else "without `torch.compile`"
    who = "in turns in the memory of one stock engine" if first.in_turns else "each alone"
    at = ", ".join(dict.fromkeys(file.commit for file in files))
    label = f"vLLM {version} {started}, {who}, pairs of runs at {at}: mean TTFT / TPOT"
    told = "; ".join(f"{name} ({pair.count}): {pair} / {tpot[name]}" for name, pair in ttft.items())
    names = ", ".join(f"`{file.name}`" for file in files)
    return f"| {label} | 1 | {told} | {names} |"


def _pooled(files: Sequence[File], figure: str) -> dict[str, Pairs]:
    """The pairs of all ``files``, by workload, and the mean of the workloads."""
    found: dict[str, list[float]] = {}
    for file in files:
        for name, ratios in file.ratios(figure).items():
            found.setdefault(name, []).extend(ratios)
    pairs = {name: Pairs.of(ratios) for name, ratios in found.items()}
    return {**pairs, "mean": Pairs.over(pairs.values())}


def _throughput(file: File) -> str:
    pair = file.pairs("output_tokens_per_s")["saturated"]
    version = file.facts["versions"]["vllm"]
    pairs = f"{pair.count} pairs of runs: output tokens/s, saturated"
    label = f"vLLM {version} as it starts by itself, {pairs}"
    assert pair.error is not None
    return _row(label, "1", f"{pair.ratio:.4f} \N{PLUS-MINUS SIGN} {pair.error:.4f}", file.name)


def _dense(file: File) -> str:
    """How many engines served at once; a fixed part of memory each, or ours."""
    crowds = {each["arm"]: each for each in file.data["crowds"]}
    stock, ours = crowds["static"], crowds["ours"]
    label = "8B engines that start and serve, 8 GiB of KV each or one budget"
    idle = max(wave["kv_idle_bytes_most"] for wave in ours["waves"]) >> 20
    told = f"{ours['engines']}, idle with {idle} MiB of KV each"
    return _row(label, str(stock["engines"]), told, file.name)


def _footprint(file: File) -> str:
    """Committed over what is live or cached, from the last request to the last answer."""
    plain, caching = (
        f"{file.data['engines'][name]['after_load']:.2f}" for name in ("plain", "caching")
    )
    label = "KV memory held over needed while long answers end, prefix caching off / on"
    return _row(label, NONE, f"{plain} / {caching}", file.name)


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2g}x"


def _growth(file: File) -> str:
    cells = []
    for kind in ("static", "elastic"):
        found = file.data[kind]
        first = found["first_token_ms"]
        told = f"{first['mean']:,.0f} / {first['p99']:,.0f} ms"
        cells.append(f"{told}; {found['preempted']} of {found['requests']}")
    return f"| time to first token, mean / p99; preempted | {' | '.join(cells)} | `{GROWTH}` |"


def _commit(file: File) -> str:
    low, high = (
        f"{file.data['extents'][size]['one_call']['commit']['median_ms']:.1f}"
        for size in ("32MiB", "16MiB")
    )
    return _row("committing 1 GiB, extents of 32 / 16 MiB", NONE, f"{low} / {high} ms", COST)


def _saturated(file: File) -> list[str]:
    summary = file.data["result"]["summary"]
    off, on = (summary["median"][kind] for kind in ("off", "on"))
    ratio = summary["throughput_on_over_off"]
    stock, ours = (summary["arms"][name]["gib"] for name in ("A0-off", "A1-on"))
    memory = [
        f"{each['after_start']:.1f} / {each['cache_dropped']:.1f} GiB" for each in (stock, ours)
    ]
    return [
        _row(
            "output tokens/s, saturated, 256 x (1024 + 256), 48 GiB of KV",
            f"{off:,.0f}",
            f"{on:,.0f} ({ratio:.3f})",
            SATURATED,
        ),
        _row("GPU memory after start / after load, cache dropped", *memory, "same"),
    ]


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
        f"| identical: {'; '.join(told)} | `{TOKENS}`, `{GRAPH_TOKENS}` |"
    )
