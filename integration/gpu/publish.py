"""Copy what a run on a GPU left into ``integration/results``, and make the results page anew.

    python -m integration.gpu.publish FOLDER [--replace]

Files are named after what was run and the GPU, the colocation also after the engine. Runs on a CPU
are trials of these programs and are refused: they say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from pathlib import Path

from integration.report import plots
from integration.report.files import File, Files
from integration.report.page import NAME, page

RESULTS = Path(__file__).resolve().parent.parent / "results"
NAMES = {
    "paired": "paired-half-load",
    "vmm_cost": "vmm-cost",
    "beside": "beside",
    "neighbours": "neighbours",
    "reclaim": "reclaim",
    "overhead": "overhead",
    "colocation": "colocation",
    "footprint": "footprint",
    "density": "density",
    "activation": "activation",
    "sglang": "sglang",
    "soak": "gpu-soak",
}
"""What a program's file is called among the results, by what it is called where it was run."""


def target(file: File) -> str:
    """The name among the results: ``colocation-vllm-0.30.0-h200.json``."""
    words = [NAMES[file.name.removesuffix(".json")]]
    if words == ["colocation"]:
        words.append(file.engine_version.replace(" ", "-"))
    if words == ["neighbours"] and file.data["parameters"].get("second", "vllm") != "vllm":
        words.append(file.data["parameters"]["second"])
    if words == ["overhead"] and file.data.get("engines", 1) > 1:
        words.append("turns" if file.in_turns else "alone")
    if words == ["activation"] and file.data.get("shape", "8b") != "8b":
        words.append(file.data["shape"])
    gpu = file.facts["gpu"]["name"].removeprefix("NVIDIA ").split()[0]
    words.append(re.sub(r"[^a-z0-9]+", "-", gpu.lower()))
    return "-".join(words) + ".json"


def publish(folder: Path, results: Path, replace: bool) -> tuple[list[str], list[str]]:
    """Names of the files written, and sentences about those that were not."""
    written, refused = [], []
    for path in sorted(folder.glob("*.json")):
        if path.stem not in NAMES:
            continue
        text = path.read_text()
        file = File(path.name, json.loads(text))
        if not file.on_gpu:
            refused.append(f"{path.name} is of a CPU and says nothing of a GPU: not copied.")
            continue
        name = target(file)
        if not replace and (results / name).exists() and (results / name).read_text() != text:
            # An earlier run stays, also one that is less favourable.
            moment = re.sub(r"[^0-9]", "", file.moment)[:14]
            name = _free(results, f"{name.removesuffix('.json')}-{moment}", text)
        (results / name).write_text(text)
        written.append(name)
    return written, refused


def _free(results: Path, stem: str, text: str) -> str:
    """A name that no other run has: two lanes may have begun in the same second."""
    for number in itertools.count(1):
        name = f"{stem}.json" if number == 1 else f"{stem}-{number}.json"
        if not (results / name).exists() or (results / name).read_text() == text:
            return name
    raise AssertionError("numbers do not end")


def main() -> int:
    parser = argparse.ArgumentParser(prog="publish.py", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the run left its files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--replace", action="store_true", help="write over files of earlier runs")
    options = parser.parse_args()
    written, refused = publish(options.folder, options.results, options.replace)
    print(*written, *refused, sep="\n")
    if not written:
        print(f"{options.folder} has no results of a GPU: nothing was changed.", file=sys.stderr)
        return 1
    files = Files.read(options.results)
    (options.results / NAME).write_text(page(files))
    plots.draw(files, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
