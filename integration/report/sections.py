"""The tables of the results page, one function for each kind of file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from integration.report.files import File, Json, number, table
from integration.report.memory import beside, density, footprint, reclaim, vmm_cost

TIMES = ("mean", "median", "p99")


def over(two: Json, one: Json, *path: str) -> float | None:
    """The figure at ``path`` in ``two`` over that in ``one``; None if either lacks it."""
    values = []
    for found in (two, one):
        for name in path:
            found = found.get(name, {}) if isinstance(found, dict) else {}
        values.append(found if isinstance(found, (int, float)) else None)
    second, first = values
    return second / first if second is not None and first else None


def saturated(file: File) -> list[str]:
    summary = file.data["result"]["summary"]
    arms = summary["arms"]
    rows = [
        [
            name,
            each["startup_s"],
            each["gib"].get("after_start"),
            each["gib_peak"],
            each["gib"].get("cache_dropped"),
        ]
        for name, each in arms.items()
    ]
    lines = table(
        ["start", "start-up, s", "GiB after start", "GiB, most", "GiB, idle, cache dropped"], rows
    )
    rates = summary["output_tokens_per_s"]
    lines += [
        "",
        *table(
            ["plugin", "output tokens/s, each repetition", "median"],
            [
                [
                    kind,
                    "; ".join(f"{rate:,.0f}" for rate in rates[kind]),
                    summary["median"].get(kind),
                ]
                for kind in ("off", "on")
            ],
        ),
    ]
    lines += ["", f"On over off, of the medians: **{summary['throughput_on_over_off']}**."]
    return lines


def preemption(file: File) -> list[str]:
    rows = []
    for name, each in file.data["result"]["summary"].items():
        if "/" in name:
            rows.append(
                [
                    name,
                    each["requests"],
                    each["identical"],
                    each["unexplained"],
                    each["largest_gap"],
                ]
            )
    return table(
        ["compared", "requests", "identical", "not explained", "largest gap, log probability"], rows
    )


def tokens(file: File) -> list[str]:
    rows = [
        [
            f"{each['compared']}, {each['load']}",
            each["requests"],
            each["identical"],
            each["median_first_difference"],
        ]
        for each in file.data["rows"]
    ]
    head = ["greedy tokens compared", "requests", "identical", "median first difference"]
    return [*table(head, rows), "", file.data["what"]]


def paired(file: File) -> list[str]:
    rows = []
    for name in dict.fromkeys(label.rsplit("-", 1)[0] for label in file.data["runs"]):
        off, on = (file.data["runs"].get(f"{name}-{arm}", {}) for arm in ("off", "on"))
        for what in ("ttft", "tpot"):
            for which in TIMES:
                key = f"{which}_{what}_ms"
                rows.append(
                    [
                        f"{name}: {which} {what.upper()}",
                        off.get(key),
                        on.get(key),
                        over(on, off, key),
                    ]
                )
    tokens = [
        [name, each["requests"], each["identical"], each["unexplained"]]
        for name, each in file.data["tokens"].items()
        if "/" in name
    ]
    return [
        *table(["pair, ms", "stock", "elastic", "elastic/stock"], rows),
        "",
        *table(["tokens compared", "requests", "identical", "not explained"], tokens),
    ]


def overhead(file: File) -> list[str]:
    rows = []
    for name, each in file.data.get("workloads", {}).items():
        if not each:
            continue
        off, on = each["off"], each["on"]
        for key in (
            "mean_ttft_ms",
            "median_ttft_ms",
            "p99_ttft_ms",
            "mean_tpot_ms",
            "median_tpot_ms",
            "p99_tpot_ms",
            "output_tokens_per_s",
        ):
            label = f"{name} ({each['rounds']}): {key.replace('_', ' ')}"
            rows.append([label, off.get(key), on.get(key), over(on, off, key)])
    engines, stock = (file.data.get(name, 1) for name in ("engines", "stock_engines"))
    room = "each with as much as a stock one" if file.data.get("roomy") else "with as much in all"
    what = "as vLLM starts by itself" if file.compiles else "without torch.compile"
    figures = {name: file.pairs(f"mean_{name}_ms") for name in ("ttft", "tpot")}
    pairs = [
        [name, each.count, str(each), str(figures["tpot"].get(name, ""))]
        for name, each in figures["ttft"].items()
    ]
    starts = [[name, each["startup_s"]] for name, each in file.data.get("servers", {}).items()]
    return [
        f"Stock engines: {stock}; elastic: {engines}, {room}; {what}. Medians over all rounds:",
        "",
        *table(["workload (rounds)", "stock", "elastic", "elastic/stock"], rows),
        "",
        "Elastic over stock in each pair of runs, which have the same prompts and the same minute "
        "of the machine: geometric mean and its standard error.",
        "",
        *table(["workload", "pairs", "mean TTFT", "mean TPOT"], pairs),
        "",
        *table(["plugin", "start-up of both at once, s"], starts),
        *steps(file.data.get("steps", {})),
    ]


STEP_PARTS = {
    "waited": "from arrival to its schedule",
    "schedule": "schedule",
    "before": "ours, in front of the launch",
    "launch": "launch of the model, without ours",
    "after": "ours, what can wait",
    "sample": "launch of sampling, without ours",
    "results": "schedule, with the results",
    "in_engine": "from arrival to the first token",
    "forward_on_device": "on the device: model, and what it waited for launches",
    "sampling_on_device": "on the device: sampling",
}


def steps(found: Json) -> list[str]:
    """What each part of a step took, if the run recorded its steps."""
    if not found.get("on"):
        return []
    arms = [found[arm][what] for what in ("prompt", "decode") for arm in ("off", "on")]
    rows = [
        [told, *(each.get(part, {}).get("mean") for each in arms)]
        for part, told in STEP_PARTS.items()
        if any(part in each for each in arms)
    ]
    counts = "; ".join(f"{each['steps']:,}" for each in arms)
    return [
        "",
        f"Means of steps with a prompt that came alone, and of those without any ({counts}):",
        "",
        *table(["ms", "prompt, stock", "elastic", "decode, stock", "elastic"], rows),
        *_by_workload(found.get("workloads", {})),
    ]


def _by_workload(workloads: Json) -> list[str]:
    rows = [
        [
            name,
            "; ".join(f"{of[arm]['prompt']['steps']:,}" for arm in ("off", "on")),
            *(of[arm]["prompt"].get("in_engine", {}).get("mean") for arm in ("off", "on")),
            *(_added(of, what) for what in ("prompt", "decode")),
        ]
        for name, of in workloads.items()
    ]
    heads = ["prompts alone", "to first token, stock, ms", "elastic", "ours, prompt", "decode"]
    return ["", *table(["workload", *heads], rows)] if rows else []


def _added(found: Json, what: str) -> float | None:
    """Milliseconds that an elastic cache puts in front of what a step of this kind has computed;
    what can wait is not in front of it."""
    added = found["added_ms"][what]
    parts = [added[part] for part in ("schedule", "before", "results") if part in added]
    return round(sum(parts), 4) if parts else None


def colocation(file: File) -> list[str]:
    arms = file.data.get("arms", {})
    rates = sorted({rate for arm in arms.values() for rate in arm.get("rates", {})}, key=float)
    rows = []
    for rate in rates:
        for kind, arm in arms.items():
            found = arm.get("rates", {}).get(rate)
            if found:
                ttft, tpot = found["ttft_ms"], found["tpot_ms"]
                bound = (
                    f" ({found['ttft_lower_bounds']} not yet)" if found["ttft_lower_bounds"] else ""
                )
                rows.append(
                    [
                        f"{rate}/s, {kind}",
                        ttft.get("mean"),
                        f"{number(ttft['p99'])}{bound}",
                        tpot.get("mean"),
                        found["requests"],
                        found["within_slo"],
                        found["preemptions"],
                    ]
                )
    slo = file.data.get("slo", {})
    lines = table(
        [
            "peak of each model, arm",
            "mean TTFT, ms",
            "p99 TTFT, ms",
            "mean TPOT, ms",
            "requests",
            "within SLO",
            "preemptions",
        ],
        rows,
    )
    lines += [
        "",
        *table(
            ["arm", "within SLO up to", "not from"],
            [
                [kind, *(arm["slo_requests_per_s"][name] for name in ("holds_to", "fails_from"))]
                for kind, arm in arms.items()
                if "slo_requests_per_s" in arm
            ],
        ),
    ]
    if slo:
        lines += [
            "",
            f"SLO: TTFT at most {slo['ttft_ms_at_most']:g} ms and TPOT at most "
            f"{slo['tpot_ms_at_most']:g} ms, for {100 * slo['share_at_least']:g} % of requests.",
        ]
    ratio_rows = [
        [
            f"{name.replace('_over_', ' / ')} at {rate}/s",
            each.get("mean_ttft_ms"),
            each.get("p99_ttft_ms"),
            each.get("mean_tpot_ms"),
            each.get("within_slo"),
        ]
        for name, by_rate in file.data.get("ratios", {}).items()
        for rate, each in by_rate.items()
    ]
    head = ["ratio", "mean TTFT", "p99 TTFT", "mean TPOT", "within SLO"]
    return [*lines, "", *table(head, ratio_rows)]


def activation(file: File) -> list[str]:
    rows = [
        [
            kind,
            each["sleep_ms"].get("median"),
            each["wake_ms"].get("median"),
            each["wake_to_first_token_ms"].get("median"),
            each["wake_to_first_token_ms"].get("max"),
            each["freed_gib"],
            each["same_tokens"],
        ]
        for kind, each in file.data.get("arms", {}).items()
    ]
    bus = file.data.get("bus", {}).get("to_device_gib_per_s")
    return [
        *table(
            [
                "arm",
                "sleep, ms",
                "wake, ms",
                "wake to first token, ms",
                "worst, ms",
                "GiB freed",
                "same tokens",
            ],
            rows,
        ),
        "",
        f"Weights over the bus ({bus} GiB/s, pinned, this run): {file.data.get('floor_ms')} ms.",
    ]


def neighbours(file: File) -> list[str]:
    rows = [
        [
            f"{label}, {engine}",
            each.get("duration"),
            each.get("mean_ttft_ms"),
            each.get("p99_ttft_ms"),
            each.get("mean_tpot_ms"),
        ]
        for label, engines in file.data.get("static_over_elastic", {}).items()
        for engine, each in engines.items()
    ]
    checks = [[name, value] for name, value in file.data.get("checks", {}).items()]
    return [
        *table(["static over elastic", "burst", "mean TTFT", "p99 TTFT", "mean TPOT"], rows),
        "",
        *table(["check", "value"], checks),
    ]


def sglang(file: File) -> list[str]:
    arms = file.data["arms"]
    names = [name for name in arms["off"] if name.startswith("saturated")]
    rows = []
    for name in names:
        off, on = (arms[arm][name]["output_tokens_per_s"] for arm in ("off", "on"))
        rows.append([f"{name}: output tokens/s", off, on, on / off])
    for what in ("ttft_ms", "tpot_ms"):
        for which in TIMES:
            off, on = (arms[arm]["half"][what][which] for arm in ("off", "on"))
            rows.append([f"half load: {which} {what[:4].upper()}, ms", off, on, on / off])
    for moment in ("started", names[-1], "drained+10s"):
        off, on = (arms[arm]["memory_gib"][moment].get("last") for arm in ("off", "on"))
        rows.append([f"device GiB, {moment}", off, on, None])
    told = file.data["compared"]
    return [
        *table(["figure", "stock", "elastic", "elastic/stock"], rows),
        "",
        f"Greedy tokens of {told['equal_answers']} of {told['answers']} requests are equal.",
    ]


def gpu_soak(file: File) -> list[str]:
    data = file.data
    rows = [
        ["answers of both servers", data["compared"]["requests"]],
        ["with other tokens than stock's", data["compared"]["differing"]],
        ["failed", data["failed"]],
        ["called off", data["called_off"]],
        *([f"moves: {what}", times] for what, times in data["moves"].items()),
        *([f"preemptions, {arm}", times] for arm, times in data["preemptions"].items()),
    ]
    told = "met" if data["passed"] else "**missed**"
    return [*table(["figure", "number"], rows), "", f"Nothing differs or fails: {told}."]


SECTIONS: Mapping[str, tuple[str, Callable[[File], list[str]]]] = {
    "onoff-saturated": ("Saturated throughput, start-up and memory of one engine", saturated),
    "onoff-eager": (
        "The same, eager and short: a look whether all runs, no measurement",
        saturated,
    ),
    "overhead": ("Overhead by workload", overhead),
    "paired": ("Latency at half load", paired),
    "tokens": ("Tokens", tokens),
    "onoff-preemption": ("Tokens under preemption", preemption),
    "colocation": ("Three models whose peaks come in turn", colocation),
    "neighbours": ("Two engines, one budget, bursts in turn", neighbours),
    "density": ("How many engines fit", density),
    "footprint": ("Footprint with staggered answers", footprint),
    "activation": ("Sleep and wake", activation),
    "reclaim": ("Memory from a neighbour's cache", reclaim),
    "sglang": ("SGLang alone", sglang),
    "gpu-soak": ("Memory given back at once and poisoned, random load", gpu_soak),
    "vmm-cost": ("What committing memory costs", vmm_cost),
    "beside": ("What driver calls cost kernels that run beside them", beside),
}
"""Kinds of GPU results, by the beginning of a file's name, in the order of the page."""
