"""All benchmarks that need a GPU, one after the other, in order of worth: ``make bench-gpu``.

Where something is missing it says what, in one sentence, and starts nothing. A program that fails
or misses a goal does not keep the others from running; what each left is in the folder for results,
and ``python -m integration.gpu.publish FOLDER`` makes a page of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from integration.models import LLAMA_1B, LLAMA_8B, write_model

MODELS = {"llama8b": LLAMA_8B, "llama1b": LLAMA_1B}


class Program(NamedTuple):
    """One benchmark: its module, its arguments, and the seconds after which it ends by itself."""

    name: str
    arguments: tuple[str, ...]
    deadline_s: float
    takes_model: bool = True


PROGRAMS = (
    Program("paired", ("--pairs", "5"), 330.0),
    Program("vmm_cost", (), 60.0, takes_model=False),
    Program("neighbours", (), 560.0),
    Program("reclaim", (), 420.0),
    Program("colocation", (), 560.0),
    Program("overhead", (), 560.0),
    Program("footprint", (), 240.0),
    Program("activation", (), 240.0),
    Program("density", (), 560.0),
)
"""In order of worth. ``vmm_cost`` takes no deadline; its figure is what it takes."""


def gpu_name() -> str | None:
    """The first NVIDIA GPU's name; None where the driver lists none."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    asked = [smi, "--query-gpu=name", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False)
    names = told.stdout.strip().splitlines() if told.returncode == 0 else []
    return names[0] if names else None


def missing(
    gpu: Callable[[], str | None] = gpu_name,
    installed: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None,
) -> str | None:
    """What keeps the benchmarks from running here, in one sentence; None if nothing does."""
    if gpu() is None:
        return (
            "No NVIDIA GPU here (nvidia-smi lists none), so nothing was measured: run this on a "
            "machine with an H100 or H200, or `make bench` for what needs no GPU."
        )
    if not installed("vllm"):
        return (
            "vLLM is not installed here, so nothing was measured: "
            "`python integration/engine_env.py --engine vllm`, then this again in .venv-vllm."
        )
    if not installed("aiohttp"):
        return "aiohttp is not installed here, so nothing was measured: `pip install aiohttp`."
    return None


def command(program: Program, out: Path, model: Path) -> list[str]:
    """How one of them is run."""
    words = [sys.executable, "-P", "-m", f"integration.gpu.{program.name}", "--out", str(out)]
    words += program.arguments
    if program.takes_model:
        words += ["--model", str(model), "--deadline-s", f"{program.deadline_s:g}"]
    return words


def chosen(names: str) -> list[Program]:
    """Those whose names are in a comma-separated list; all of them if it is empty."""
    wanted = [name for name in names.split(",") if name]
    known = [program.name for program in PROGRAMS]
    if unknown := [name for name in wanted if name not in known]:
        raise argparse.ArgumentTypeError(f"no such benchmark: {unknown[0]}; there are {known}")
    return [program for program in PROGRAMS if not wanted or program.name in wanted]


def run(programs: Sequence[Program], out: Path, model: Path) -> dict[str, int]:
    """The exit status of each."""
    statuses = {}
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    for program in programs:
        env = {**os.environ, "KVC_START": str(time.time()), "PYTHONPATH": os.pathsep.join(paths)}
        print(f"{program.name}: up to {program.deadline_s / 60:.0f} min", flush=True)
        words = command(program, out, model)
        statuses[program.name] = subprocess.run(words, env=env, check=False).returncode
    return statuses


def main() -> int:
    parser = argparse.ArgumentParser(prog="suite.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--model", type=Path, help="folder of an 8B model; default: one is made")
    parser.add_argument("--only", type=chosen, default=list(PROGRAMS), help="a,b,c of them")
    options = parser.parse_args()
    if why := missing():
        print(why, file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    model = options.model
    if model is None:
        for name, shape in MODELS.items():
            write_model(options.out / "models" / name, shape)
        model = options.out / "models" / "llama8b"
    statuses = run(options.only, options.out, model)
    for name, status in statuses.items():
        told = "done, all goals met" if status == 0 else f"ended with {status}: a goal or more"
        print(f"{name}: {told}")
    print(f"python -m integration.gpu.publish {options.out}")
    return max(statuses.values(), default=0)


if __name__ == "__main__":
    sys.exit(main())
