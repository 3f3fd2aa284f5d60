"""Pictures of what the files say. matplotlib is imported when a picture is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from integration.report.files import File, Files, Json

COLOURS = {
    "static": "#8c8c8c",
    "off": "#8c8c8c",
    "ours": "#1f77b4",
    "on": "#1f77b4",
    "kvcached": "#d95f02",
}
DPI = 110


def label(kind: str) -> str:
    return {"static": "static split", "off": "stock", "on": "elastic", "ours": "ours"}.get(
        kind, kind
    )


def swept(file: File) -> Json:
    return {kind: arm for kind, arm in file.data.get("arms", {}).items() if arm.get("rates")}


def colocation(file: File, arms: Json, path: Path) -> None:
    """Mean and p99 TTFT over the rate, and the share of requests within the service level."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for kind, arm in arms.items():
        rates = sorted(arm.get("rates", {}), key=float)
        x = [float(rate) for rate in rates]
        style = {"color": COLOURS[kind], "marker": "o", "label": label(kind)}
        for axis, which in zip(axes, ("mean", "p99"), strict=False):
            axis.plot(x, [arm["rates"][r]["ttft_ms"].get(which) for r in rates], **style)
        shares = [
            100 * arm["rates"][r]["within_slo"] / max(1, arm["rates"][r]["requests"]) for r in rates
        ]
        axes[2].plot(x, shares, **style)
    slo = file.data.get("slo", {})
    for axis, which in zip(axes, ("mean", "p99"), strict=False):
        axis.set_yscale("log")
        axis.set_title(f"{which} time to first token, ms")
        if "ttft_ms_at_most" in slo:
            axis.axhline(slo["ttft_ms_at_most"], color="#bbbbbb", linewidth=0.8, linestyle="--")
    axes[2].set_title("requests within the service level, %")
    axes[2].set_ylim(0, 102)
    for axis in axes:
        axis.set_xlabel("peak of each model, requests/s")
        axis.grid(alpha=0.3)
    axes[0].legend()
    _keep(figure, path, file)


def workloads(file: File) -> Json:
    found = file.data.get("workloads", {})
    return {name: each["on_over_off"] for name, each in found.items() if each.get("on_over_off")}


def pairs(file: File) -> Json:
    found = file.data.get("summary", {}).get("pairs", {})
    return {
        f"pair {name}" if name.isdigit() else f"{name} pair": each for name, each in found.items()
    }


def ratios(file: File, groups: Json, path: Path) -> None:
    """On over off: for each workload, or for each pair of runs."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(max(6.0, 1.25 * len(groups)), 3.8))
    bars = {"mean TTFT": "mean_ttft_ms", "p99 TTFT": "p99_ttft_ms", "mean TPOT": "mean_tpot_ms"}
    width = 0.8 / len(bars)
    for number, (name, key) in enumerate(bars.items()):
        x = [index + number * width for index in range(len(groups))]
        heights = [each.get(key, float("nan")) for each in groups.values()]
        axis.bar(x, heights, width, label=name)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xticks([index + 0.4 - width / 2 for index in range(len(groups))])
    axis.set_xticklabels(groups, rotation=20, ha="right")
    axis.set_ylabel("elastic over stock")
    values = [each[key] for each in groups.values() for key in bars.values() if key in each]
    axis.set_ylim(min(0.8, *values) - 0.05, max(1.2, *values) + 0.05)
    axis.legend()
    _keep(figure, path, file)


def sampled(file: File) -> Json:
    arms = file.data.get("result", {}).get("arms", [])
    return {arm["arm"]: arm["memory_series_gib"] for arm in arms if arm.get("memory_series_gib")}


def memory(file: File, arms: Json, path: Path) -> None:
    """Device memory over the run of each arm of onoff.py."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(9, 3.6))
    for name, series in arms.items():
        colour = COLOURS[name.split("-")[-1]]
        axis.plot(*zip(*series, strict=True), color=colour, alpha=0.8, label=name)
    axis.set_xlabel("seconds since the engine was started")
    axis.set_ylabel("device memory, GiB")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(title="start, plugin")
    _keep(figure, path, file)


def traced(file: File) -> Json:
    found = file.data.get("engines", {})
    return {name: each for name, each in found.items() if each.get("series")}


def footprint(file: File, engines: Json, path: Path) -> None:
    """Committed and packed bytes over time, of each server."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(engines), figsize=(6.5 * len(engines), 3.6), squeeze=False)
    for axis, (name, each) in zip(axes[0], engines.items(), strict=True):
        points = [(point["s"], *point[name]) for point in each["series"] if name in point]
        seconds, committed, live, cached = zip(*points, strict=True)
        packed = [one + two for one, two in zip(live, cached, strict=True)]
        axis.plot(seconds, committed, color=COLOURS["ours"], label="committed")
        axis.plot(seconds, packed, color="black", linewidth=0.9, label="packed floor")
        axis.fill_between(seconds, live, color="#9ecae1", label="live")
        axis.set_title(name)
        axis.set_xlabel("seconds")
        axis.set_ylabel("KV memory, GiB")
        axis.grid(alpha=0.3)
        axis.legend()
    _keep(figure, path, file)


class Plot(NamedTuple):
    """``data`` finds in a file what ``draw`` shows; nothing found, nothing drawn."""

    data: Callable[[File], Json]
    draw: Callable[[File, Json, Path], None]


PLOTS: Mapping[str, Plot] = {
    "colocation": Plot(swept, colocation),
    "overhead": Plot(workloads, ratios),
    "paired": Plot(pairs, ratios),
    "onoff-saturated": Plot(sampled, memory),
    "footprint": Plot(traced, footprint),
}
"""By the beginning of a file's name."""


def picture(file: File) -> str | None:
    """What the picture of a file is called; None if there is nothing to show."""
    for prefix, plot in PLOTS.items():
        if file.name.startswith(prefix) and plot.data(file):
            return file.name.removesuffix(".json") + ".png"
    return None


def draw(files: Files, folder: Path) -> list[str]:
    """All pictures that there are; their names."""
    drawn = []
    for prefix, plot in PLOTS.items():
        for file in files.named(prefix):
            if name := picture(file):
                plot.draw(file, plot.data(file), folder / name)
                drawn.append(name)
    return drawn


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _keep(figure: Any, path: Path, file: File) -> None:
    caption = f"{file.engine_version}, {file.device}, {file.commit}"
    figure.text(0.995, 0.005, caption, ha="right", va="bottom", fontsize=7, color="#777777")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    # Without the version of matplotlib: the same figures give the same file with each release.
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    _pyplot().close(figure)
